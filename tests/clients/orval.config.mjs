export default {
  books: { input: 'openapi.json', output: { target: 'generated/orval/books.ts', client: 'fetch', mode: 'single' } },
};
