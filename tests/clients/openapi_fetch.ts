// What a user of openapi-typescript and openapi-fetch does: the same as in flow.py.
import assert from 'node:assert/strict';
import { setTimeout } from 'node:timers/promises';
import createClient from 'openapi-fetch';
import type { components, paths } from './generated/openapi_typescript';

const baseUrl = process.argv[2], name = 'openapi-fetch', password = 'a long way to Arrakis';

function expect<T>(answer: { data?: T; error?: components['schemas']['Problem']; response: Response }): T {
  assert(answer.response.ok && answer.data !== undefined, JSON.stringify(answer.error));
  return answer.data;
}

async function signIn(username: string, password: string) {
  const answer = await createClient<paths>({ baseUrl }).POST('/login', { body: { username, password } });
  return createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${expect(answer).access_token}` } });
}

const admin = await signIn('admin', 'admin');
const account = { username: name, email: `${name}@example.com`, password };
const user = expect(await createClient<paths>({ baseUrl }).POST('/auth/register', { body: account }));
const reader = await signIn(name, password);

// A patch of one field leaves the others as they are.
const described = { title: 'Dune', author: name, pages: 535, price: 9.99 };
const book = expect(await reader.POST('/books', { body: described }));
const path = { book_id: book.id };
const changed = expect(await reader.PATCH('/books/{book_id}', { params: { path }, body: { publisher: 'Ace' } }));
assert.deepEqual([changed.title, changed.author, changed.pages, changed.price], ['Dune', name, 535, 9.99]);
assert.deepEqual([changed.publisher, changed.version], ['Ace', book.version + 1]);

for (const title of ['Emma', 'Persuasion']) expect(await reader.POST('/books', { body: { title, author: name } }));
const titles: string[] = [];
let cursor: string | undefined;
do {
  const page = expect(await reader.GET('/books', { params: { query: { author: name, limit: 2, cursor } } }));
  titles.push(...page.items.map((found) => found.title));
  cursor = page.next ?? undefined;
  assert.equal(page.total, 3);
} while (cursor !== undefined);
assert.deepEqual(titles, ['Dune', 'Emma', 'Persuasion']);

const form = new FormData();
form.append('file', new File([`title,author\nUbik,${name}\n`], 'books.csv', { type: 'text/csv' }));
// It takes `format: binary` for a string, and leaves the form to the caller.
let upload = expect(await reader.POST('/books/upload', { body: { file: '' }, bodySerializer: () => form }));
while (upload.status === 'queued' || upload.status === 'processing') {
  await setTimeout(50);
  upload = expect(await reader.GET('/books/upload/{upload_id}', { params: { path: { upload_id: upload.id } } }));
}
assert.deepEqual([upload.status, upload.inserted, upload.failed], ['completed', 1, 0]);

expect(await reader.POST('/my-library/{book_id}', { params: { path }, body: { status: 'reading' } }));
const { error: refused } = await reader.POST('/my-library/{book_id}', { params: { path }, body: {} });
assert.deepEqual([refused?.status, refused?.code], [409, 'already_shelved']);
const entry = expect(await reader.PATCH('/my-library/{book_id}', { params: { path }, body: { rating: 4.5 } }));
assert.deepEqual([entry.status, entry.rating], ['reading', 4.5]);

const stock = expect(await admin.POST('/books/{book_id}/stock', { params: { path }, body: { quantity: 1 } }));
const loan = expect(await reader.POST('/loans', { body: { book_id: book.id } }));
assert.deepEqual([stock.available, loan.username, loan.returned_at], [1, name, null]);

const last: Record<string, unknown> = {};
for (let after = 0; !('loan.created' in last); ) {
  const query = { after, limit: 5, types: 'book.*,shelf.*,loan.*' };
  const events = expect(await reader.GET('/events', { params: { query } }));
  for (const event of events.items) last[event.type] = event.data;
  after = events.next;
}
for (const type of ['book.updated', 'books.imported', 'shelf.created', 'shelf.updated', 'book.stock']) assert(type in last, type);
assert.deepEqual(last['loan.created'] as components['schemas']['EventData']['loan.created'], loan);
assert.equal((last['book.stock'] as components['schemas']['EventData']['book.stock']).on_loan, 1);

// A suspended account stays suspended, whatever else is patched.
const whose = { path: { user_id: user.id } };
expect(await admin.PATCH('/users/{user_id}', { params: whose, body: { is_active: false } }));
const renamed = expect(await admin.PATCH('/users/{user_id}', { params: whose, body: { full_name: 'Paul' } }));
assert.deepEqual([renamed.full_name, renamed.is_active, renamed.role], ['Paul', false, user.role]);
assert.equal((await reader.POST('/books', { body: described })).error?.status, 401);
