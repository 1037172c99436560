// What a user of the client does that hey-api generates: the same as in flow.py.
import assert from 'node:assert/strict';
import { setTimeout } from 'node:timers/promises';
import * as api from './generated/hey_api/index.js';
import { createClient } from './generated/hey_api/client/index.js';

const baseUrl = process.argv[2], name = 'hey-api', password = 'a long way to Arrakis';
const visitor = createClient({ baseUrl });

function expect<T>(answer: { data?: T; error?: unknown; response?: Response }): T {
  assert(answer.response?.ok && answer.data !== undefined, JSON.stringify(answer.error));
  return answer.data;
}

async function signIn(username: string, password: string) {
  const tokens = expect(await api.login({ client: visitor, body: { username, password } }));
  return createClient({ baseUrl, auth: tokens.access_token });
}

const admin = await signIn('admin', 'admin');
const account = { username: name, email: `${name}@example.com`, password };
const user = expect(await api.register({ client: visitor, body: account }));
const reader = await signIn(name, password);

// A patch of one field leaves the others as they are.
const described = { title: 'Dune', author: name, pages: 535, price: 9.99 };
const book = expect(await api.createBook({ client: reader, body: described }));
const path = { book_id: book.id };
const changed = expect(await api.updateBook({ client: reader, path, body: { publisher: 'Ace' } }));
assert.deepEqual([changed.title, changed.author, changed.pages, changed.price], ['Dune', name, 535, 9.99]);
assert.deepEqual([changed.publisher, changed.version], ['Ace', book.version + 1]);

for (const title of ['Emma', 'Persuasion']) expect(await api.createBook({ client: reader, body: { title, author: name } }));
const titles: string[] = [];
let cursor: string | undefined;
do {
  const page: api.PageBookPublic = expect(await api.listBooks({ client: reader, query: { author: name, limit: 2, cursor } }));
  titles.push(...page.items.map((found) => found.title));
  cursor = page.next ?? undefined;
  assert.equal(page.total, 3);
} while (cursor !== undefined);
assert.deepEqual(titles, ['Dune', 'Emma', 'Persuasion']);

const file = new File([`title,author\nUbik,${name}\n`], 'books.csv', { type: 'text/csv' });
let upload = expect(await api.uploadBooks({ client: reader, body: { file } }));
while (upload.status === 'queued' || upload.status === 'processing') {
  await setTimeout(50);
  upload = expect(await api.readUpload({ client: reader, path: { upload_id: upload.id } }));
}
assert.deepEqual([upload.status, upload.inserted, upload.failed], ['completed', 1, 0]);

expect(await api.shelveBook({ client: reader, path, body: { status: 'reading' } }));
const { error: refused } = await api.shelveBook({ client: reader, path, body: {} });
assert.deepEqual([refused?.status, refused?.code], [409, 'already_shelved']);
const entry = expect(await api.updateEntry({ client: reader, path, body: { rating: 4.5 } }));
assert.deepEqual([entry.status, entry.rating], ['reading', 4.5]);

const stock = expect(await api.changeStock({ client: admin, path, body: { quantity: 1 } }));
const loan = expect(await api.borrow({ client: reader, body: { book_id: book.id } }));
assert.deepEqual([stock.available, loan.username, loan.returned_at], [1, name, null]);

const last: Record<string, unknown> = {};
for (let after = 0; !('loan.created' in last); ) {
  const events = expect(await api.listEvents({ client: reader, query: { after, limit: 5, types: 'book.*,shelf.*,loan.*' } }));
  for (const event of events.items) last[event.type] = event.data;
  after = events.next;
}
for (const type of ['book.updated', 'books.imported', 'shelf.created', 'shelf.updated', 'book.stock']) assert(type in last, type);
assert.deepEqual(last['loan.created'] as api.EventData['loan.created'], loan);
assert.equal((last['book.stock'] as api.EventData['book.stock']).on_loan, 1);

// A suspended account stays suspended, whatever else is patched.
const whose = { user_id: user.id };
expect(await api.updateUser({ client: admin, path: whose, body: { is_active: false } }));
const renamed = expect(await api.updateUser({ client: admin, path: whose, body: { full_name: 'Paul' } }));
assert.deepEqual([renamed.full_name, renamed.is_active, renamed.role], ['Paul', false, user.role]);
assert.equal((await api.createBook({ client: reader, body: described })).error?.status, 401);
