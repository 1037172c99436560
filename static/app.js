// What users wrote enters the page as text only: as children of `el`, never as HTML. The page's policy forbids the rest.
// Addresses are relative to where the service lives, which is in <base>.
const $ = id => document.getElementById(id);
const all = selector => document.querySelectorAll(selector);
const isPrivate = 'private' in document.body.dataset; // the catalogue is for those who are signed in
const STATUSES = { wishlist: 'Wishlist', reading: 'Reading', completed: 'Completed', abandoned: 'Abandoned' };
const SHELVES = Object.entries(STATUSES);
const sleep = ms => new Promise(done => { setTimeout(done, ms); });
function fill(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name.startsWith('--')) node.style.setProperty(name, value);
    else if (value != null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter(child => child != null && child !== false));
  return node;
}
const el = (tag, props = {}, ...children) => fill(document.createElement(tag), props, children);
const put = (node, ...children) => { node.replaceChildren(); fill(node, {}, children); };
function redraw(node, ...children) { // what had the focus in it has it again
  const controls = () => [...node.querySelectorAll('a, button, select, input')], focused = controls().indexOf(document.activeElement);
  put(node, ...children);
  controls()[focused]?.focus();
}
const once = work => { let at = null; return ({ detail }) => { if (detail < 2) at ??= work().finally(() => { at = null; }); }; }; // not for a double click
const button = (text, onclick, more = {}) => el('button', { type: 'button', onclick, ...more }, text);
const link = (href, text, more = {}) => el('a', { href, ...more }, text);
const options = (choices, chosen) => choices.map(([value, text]) => el('option', { value, selected: value === chosen }, text));
function choose(select, value) { // even one that is not, or no longer, among its options
  if (![...select.options].some(option => option.value === value)) select.append(...options([[value, value]]));
  select.value = value;
}
function offer(select, first, choices) { // what is chosen stays
  const was = select.value;
  put(select, options([['', first], ...choices]));
  choose(select, was);
}
const facts = (...all) => el('p', { class: 'facts' }, all.filter(Boolean).map(fact => el('span', {}, fact)));
const mark = (kind, ...children) => el('span', { class: kind }, children);
const chip = text => mark('chip', text);
const bdi = text => el('bdi', {}, text); // of users, in any direction of writing
const inRow = (...children) => el('p', { class: 'row' }, children);
const grow = (...children) => el('div', { class: 'grow' }, children);
const way = (href, text) => link(href, text, { class: 'button' });
const nothing = (title, text, ...ways) => [el('h3', {}, title), text && el('p', {}, text), inRow(ways)];
const alertSlot = () => el('p', { class: 'problem', role: 'alert' });
const plural = (n, one, many = `${one}s`) => `${n.toLocaleString('en')} ${n === 1 ? one : many}`;
const day = moment => new Date(moment).toLocaleDateString('en', { dateStyle: 'medium' });
const year = y => y == null ? null : y < 0 ? `${-y} BCE` : String(y);
const star = (seen, heard, more = '') => el('span', {}, el('span', { class: 'star', 'aria-hidden': true }, seen), mark('unseen', heard), more);
const stars = n => star('★'.repeat(n) + ['', '¼', '½', '¾'][n % 1 * 4] + '☆'.repeat(5 - n), `${n} of 5 stars`);
const rating = ({ rating_count: n, rating }) => n > 0 && star('★ ', 'rated ', `${rating.toFixed(1)} (${n.toLocaleString('en')})`);
const languages = new Intl.DisplayNames('en', { type: 'language' });
const languageName = code => { try { return code && languages.of(code); } catch { return code; } }; // a word is no code
const isIsbn = text => /^[\dx\s-]{10,17}$/i.test(text);
const say = text => { $('say').textContent = text; };
const number = text => [...text].reduce((sum, c) => (sum * 31 + c.codePointAt(0)) % 9973, 7);
function cover({ id, title, author, isbn }, size = '') { // drawn at once; the real one, where there is one, comes over it (a picture is asked for without a token)
  return el('div', { class: `cover look-${number(title) % 4} ${size}`, '--hue': number(author) % 360, 'aria-hidden': true },
    el('strong', { dir: 'auto' }, title.replace(/\s*\(.*\)$/, '') || title), el('em', { dir: 'auto' }, author),
    isbn && !isPrivate && el('img', { alt: '', loading: 'lazy', decoding: 'async', onerror: event => event.target.remove(),
      src: `books/${id}/cover?optional=true&v=${isbn}` }));
}
// --- requests ------------------------------------------------------------------------------------------------------
const problem = ({ detail, errors = [] }, status) => Object.assign(new Error(detail ?? `The server answered ${status}.`), { errors, status }); // RFC 9457
let token = null, me = null, newToken = null; // the refresh token is a cookie that scripts can't read
const otherTabs = new BroadcastChannel('login'); // they have the same cookie
otherTabs.onmessage = ({ data }) => { token = null; if (data === 'out') signedOut(); else signedIn().catch(() => {}); };
const lock = work => navigator.locks ? navigator.locks.request('refresh', work) : work(); // only https and localhost have locks
async function ask(path, token, { method = 'GET', json, body = json && JSON.stringify(json), headers, signal, keepalive } = {}) {
  const more = { ...(json && { 'Content-Type': 'application/json' }), ...(token && { Authorization: `Bearer ${token}` }) };
  const answer = await fetch(path, { method, body, signal, keepalive, headers: { ...headers, ...more } }).catch(error => {
    if (signal?.aborted && error.name !== 'TimeoutError') throw error;
    reachable(false);
    throw problem({ detail: 'The server can’t be reached. Try again in a moment.' });
  });
  reachable(true);
  if (answer.ok) return answer;
  throw problem(await answer.json().catch(() => ({})), answer.status);
}
function refreshToken() { // one at a time, over all tabs: the cookie works once
  newToken ??= lock(async () => {
    try { token = (await (await ask('auth/refresh', null, { method: 'POST', keepalive: true })).json()).access_token; } catch (error) {
      if (error.status !== 401) throw error;
      await signedOut(me ? 'Your login has ended. Sign in again.' : '');
    }
  }).finally(() => { newToken = null; });
  return newToken;
}
async function send(path, how = {}) {
  await newToken?.catch(() => {});
  const used = token;
  try { return await ask(path, used, how); } catch (error) {
    if (error.status !== 401 || !used) throw error;
    if (token === used) await refreshToken();
    return ask(path, token, how);
  }
}
const soon = () => AbortSignal.timeout(30000); // an answer that never comes must not hold up those after it
const get = async (path, query) => (await send(query ? `${path}?${new URLSearchParams(query)}` : path, { signal: soon() })).json();
const api = async (method, path, json) => { const answer = await send(path, { method, json }); return answer.status === 204 ? null : answer.json(); };
// --- problems, beside what they are about --------------------------------------------------------------------------
function clear(where) {
  for (const field of where.querySelectorAll('[aria-invalid]')) field.removeAttribute('aria-invalid');
  where.querySelector('.problem').textContent = '';
}
function show(where, error) {
  if (!error.errors) console.error(error);
  const faults = error.errors ?? [], fields = faults.map(({ loc }) => where.elements?.namedItem(loc.at(-1))).filter(field => field?.focus);
  where.querySelector('.problem').textContent = faults.length > 1 ? faults.map(({ loc, msg }) => `${loc.at(-1)}: ${msg}`).join('; ') : error.message;
  for (const field of fields) field.setAttribute('aria-invalid', true);
  fields[0]?.focus();
}
async function attempt(where, work) { // what it gives; where it fails, the problem is shown there
  clear(where);
  where.ariaBusy = 'true';
  try { return await work(); } catch (error) { if (error.name !== 'AbortError') show(where, error); } finally { where.ariaBusy = 'false'; }
}
const tries = (where, work) => once(() => attempt(where, work)); // for a button
function onSubmit(form, work) {
  form.addEventListener('submit', event => {
    event.preventDefault();
    if (form.ariaBusy !== 'true') attempt(form, () => work(Object.fromEntries(new FormData(form, event.submitter)))); // else Enter was pressed twice
  });
}
// --- lists, page by page -------------------------------------------------------------------------------------------
function tableOf(label, columns, body) {
  const names = el('tr', {}, columns.map(name => el('th', { scope: 'col' }, name)));
  return el('div', { class: 'scroll', role: 'region', tabindex: 0, 'aria-label': label },
    el('table', {}, el('caption', {}, label), el('thead', {}, names), body));
}
// Below what is in `root`, the form of the list among it. `kind` is the class of the list, or the names of a table's
// columns. `path` is asked for the rows; `address` gives the list's own address (#/…) for the fields of its form and a
// page, and a list without one keeps its place to itself. `params` may turn the fields into other parameters.
function pages({ root, label, kind = 'rows', path, address, params = fields => fields, limit = 24, key, row, skeleton, empty = () => [] }) {
  const isTable = Array.isArray(kind), list = el(isTable ? 'tbody' : 'ul', { class: !isTable && kind, tabindex: kind === 'strip' ? 0 : -1, 'aria-label': label });
  const none = el('div', { class: 'empty' }), pager = el('nav', { class: 'pager', hidden: true, 'aria-label': `Pages of ${label}` });
  const form = root.querySelector('form'), counter = root.querySelector('.count');
  root.append(alertSlot(), isTable ? tableOf(label, kind, list) : list, none, pager);
  const drawn = new Map(); // by key: a row's node
  let page = null, offset = 0, wanted = 0, shows = '', asking = new AbortController(), typing; // `wanted` is the offset that was asked for last
  const fields = () => form ? Object.fromEntries([...new FormData(form)].filter(([, value]) => value.trim())) : {};
  const place = at => address({ ...fields(), ...(at && { page: at / limit + 1 }) });
  function draw(item, isNew) {
    const text = JSON.stringify(item), node = drawn.get(key(item)) ?? el(isTable ? 'tr' : 'li', { class: isNew && 'new' });
    drawn.set(key(item), node);
    if (node.shows === text) return node;
    redraw(node, row(item, node));
    return Object.assign(node, { shows: text });
  }
  function drawAll(quiet) { // moves no node that stands right, so that none loses the focus
    const had = list.contains(document.activeElement), items = page?.items ?? [], isNew = quiet && drawn.size > 0, nodes = items.map(item => draw(item, isNew));
    for (const [id, node] of drawn) if (!nodes.includes(node)) drawn.delete(id);
    for (const node of [...list.children]) if (!nodes.includes(node)) node.remove();
    nodes.forEach((node, i) => { if (list.children[i] !== node) list.insertBefore(node, list.children[i] ?? null); });
    put(none, page && !items.length ? empty(page, fields()) : []);
    drawPager(items.length);
    if (counter) counter.textContent = page ? page.total.toLocaleString('en') : '';
    if (had) keepFocus(list);
  }
  function step(text, at) {
    return address ? link(place(at), text, { class: 'button' }) : button(text, () => self.load(false, at).then(() => { list.focus(); root.scrollIntoView(); }));
  }
  function drawPager(count) {
    const text = page ? `${(offset + 1).toLocaleString('en')}–${(offset + count).toLocaleString('en')} of ${page.total.toLocaleString('en')}` : '';
    pager.hidden = !offset && !page?.next;
    const now = `${text} ${address?.(fields())} ${page?.next}`;
    if (pager.shows === now) return; // or a click in progress would be lost
    pager.shows = now;
    put(pager, offset > 0 && step('Previous', Math.max(0, offset - limit)), el('span', {}, text), page?.next && step('Next', offset + limit));
  }
  function drawSkeleton() {
    if (!page && skeleton) put(list, Array.from({ length: limit }, () => el('li', { class: 'skeleton', 'aria-hidden': true }, skeleton())));
  }
  async function read(quiet, at) {
    asking.abort(); // the answer to an earlier question is of no more use
    wanted = at;
    const { signal } = asking = new AbortController(), query = new URLSearchParams({ ...params(fields()), limit, offset: at }).toString();
    const answer = await send(`${path()}?${query}`, { signal: AbortSignal.any([signal, soon()]) });
    const found = await answer.json();
    if (signal.aborted) return;
    if (!found.items.length && at && found.total) { await read(quiet, Math.floor((found.total - 1) / limit) * limit); return; }
    [page, offset, shows] = [found, at, query];
    lastId ??= answer.headers.get('X-Event-Cursor');
    drawAll(quiet);
    if (!quiet) say(`${label}: ${page.total}.`);
  }
  async function load(quiet, at = wanted) {
    if (quiet) return read(true, at).catch(() => {});
    drawSkeleton();
    await attempt(root, () => read(false, at));
    if (!page) drawAll();
  }
  const self = {
    load,
    async open({ page: number = 1, ...values } = {}) { // as its address says; what is drawn already is only looked after
      form?.reset();
      for (const [name, value] of Object.entries(values)) {
        const field = form?.elements.namedItem(name);
        if (field?.options) choose(field, value); else if (field) field[field.type === 'checkbox' ? 'checked' : 'value'] = value;
      }
      const at = (Math.max(1, Math.floor(number) || 1) - 1) * limit;
      const turned = page && at !== offset;
      await load(Boolean(page) && shows === new URLSearchParams({ ...params(fields()), limit, offset: at }).toString(), at);
      if (turned) { list.focus({ preventScroll: true }); (form ?? list).scrollIntoView(); }
    },
    forget() { asking.abort(); [page, offset, wanted, shows] = [null, 0, 0, '']; drawAll(); },
  };
  form?.addEventListener('input', ({ target }) => { // typing changes the address in place, a choice is a step that Back takes back
    clearTimeout(typing);
    if (target.type !== 'search') { moveTo(place(0)); return; }
    typing = setTimeout(() => { pager.hidden = true; history.replaceState(history.state, '', place(0)); setTitle(); load(false, 0); }, 15);
  });
  form?.addEventListener('submit', event => event.preventDefault());
  drawSkeleton();
  return self;
}
// A view made here: its heading, what stands beside that, and what is below.
function section(name, title, beside, ...below) {
  const heading = el('h2', { id: `h-${name}`, tabindex: -1 }, title);
  return $('main').appendChild(el('section', { id: `view-${name}`, 'aria-labelledby': heading.id, hidden: true },
    el('div', { class: 'top' }, heading, beside), below));
}
const filterForm = (...fields) => el('form', { role: 'search', class: 'filters' }, fields);
const unseenLabel = (text, input, more) => el('label', more, mark('unseen', `${text} `), input);
const wordsFilter = (label, placeholder) => unseenLabel(label,
  el('input', { type: 'search', name: 'search', maxlength: 500, autocomplete: 'off', placeholder }), { class: 'wide' });
const choiceFilter = (name, label, choices) => unseenLabel(label, el('select', { name }, options(Object.entries(choices))));
// A form made here: what its `work` returns is told in it.
function formOf({ title, parts, verb, how, also, work, ...attributes }) {
  const note = el('p', { class: 'note', role: 'status' });
  const form = el('form', { class: 'panel', ...attributes }, title && el('h3', {}, title), parts, alertSlot(), note,
    inRow(el('button', { class: how }, verb), also));
  onSubmit(form, async fields => { note.textContent = ''; const told = await work(fields); form.reset(); note.textContent = told ?? ''; });
  return form;
}
const field = (name, text, more = {}) => el('label', {}, `${text} `, el('input', { name, required: true, maxlength: 254, ...more }));
const emailField = (text, value) => field('email', text, { type: 'email', autocomplete: 'email', value });
const userName = (text, more) => field('username', text, { autocomplete: 'username', autocapitalize: 'none', spellcheck: 'false', ...more });
const fullName = (text, more) => field('full_name', text, { required: false, autocomplete: 'name', maxlength: 100, ...more });
const secret = (name, text, more = {}) => field(name, text, { type: 'password', autocomplete: 'current-password', maxlength: 1000, ...more });
const newSecret = (name, text) => secret(name, `${text}, of at least 8 characters`, { autocomplete: 'new-password', minlength: 8, maxlength: 128 });
function fillIn(form, values, typed = {}) { // `was` is what is stored
  for (const field of form.elements) {
    if (!field.name || field.type === 'radio') continue;
    if (field.type === 'checkbox') field.checked = values[field.name];
    else { field.value = values[field.name] ?? ''; field.was = field.value; }
    if (field.name in typed) field.value = typed[field.name] ?? '';
  }
}
const changesOf = form => Object.fromEntries(Object.entries(valuesOf(form)).filter(([name]) => form.elements[name].value !== form.elements[name].was));
const valuesOf = form => Object.fromEntries([...form.elements].filter(({ name }) => name).map(({ name, type, value, checked }) => // null where nothing is
  [name, type === 'checkbox' ? checked : value.trim() === '' ? null : type === 'number' ? Number(value) : value]));
function closeDialog(id) { $(id)?.close(); $(id)?.remove(); }
// In place of the one that is open; nothing of it stays in the page. `left` is called as it is closed by who sees it.
function openDialog(id, kind, title, form, left) {
  closeDialog(id);
  const dialog = el('dialog', { id, class: kind, 'aria-labelledby': `title-${id}`, onclose() {
    if (!dialog.isConnected) return;
    dialog.remove();
    left?.(dialog.returnValue);
  } }, el('div', { class: 'top' }, el('h2', { id: `title-${id}` }, title), button('Close', () => dialog.close())), form);
  document.body.append(dialog);
  dialog.showModal();
  form.querySelector('input, button').focus();
  return form;
}
const sure = (question, text, verb) => new Promise(done => openDialog('sure', 'small', question,
  el('form', { method: 'dialog' }, el('p', { id: 'sure-text' }, text),
    inRow(el('button', { value: '', 'aria-describedby': 'sure-text' }, 'Cancel'), el('button', { value: 'yes', class: 'danger' }, verb))),
  answer => done(answer === 'yes')));
const ifSure = (where, question, text, verb, work) => once(async () => { if (await sure(question, text, verb)) await attempt(where, work); });
const to = (path, fields = {}) => { const query = new URLSearchParams(fields).toString(); return `#/${path}${query && `?${query}`}`; };
const moveTo = address => { location.hash = address; };
// --- the catalogue -------------------------------------------------------------------------------------------------
const filters = $('catalogue').appendChild(filterForm(
  wordsFilter('Search for', 'Title, author, ISBN, publisher'), choiceFilter('genre', 'Genre', { '': 'All genres' }),
  choiceFilter('sort', 'Sort by', { '': 'Best match', '-created': 'Newest first', title: 'By title', author: 'By author',
    year: 'Oldest work first', '-year': 'Latest work first', '-rating': 'Best rated' }),
  el('label', { class: 'pill' }, el('input', { type: 'checkbox', name: 'available', value: 'true' }), ' Available')));
const linkTo = (id, title) => link(`#/book/${id}`, bdi(title), { 'data-book': id });
const catalogue = pages({
  root: $('catalogue'), label: 'Books', kind: 'covers', path: () => 'books', address: fields => to('', fields), key: book => book.id,
  row: book => [el('div', { class: 'on' }, cover(seen(book)), stock(book)),
    el('h3', {}, linkTo(book.id, book.title)), el('p', { class: 'by' }, bdi(book.author)),
    facts(year(book.publication_year), book.genre), facts(rating(book))],
  skeleton: () => [el('div', { class: 'cover' }), el('h3', {}, ' '), el('p', { class: 'by' }, ' '), facts(' '), facts(' ')],
  empty: ({ suggestions = [] }, fields) => Object.keys(fields).length ? nothingFound(suggestions, fields) : emptyCatalogue(),
});
const books = new Map(); // those that were drawn last: a book's view begins with what is known of it
function seen(book) { if (books.size > 500) books.clear(); books.set(book.id, book); return book; }
const stock = ({ copies, available }) => copies > 0 && el('span', { class: available ? 'stock good' : 'stock' },
  copies > 1 ? `${available} of ${copies} available` : available ? 'available' : 'on loan');
function drawSpines() { // for the eye alone
  if ($('spines').children.length) return;
  put($('spines'), [...books.values()].slice(0, 16).map(({ title, author }) =>
    el('span', { '--hue': number(author) % 360, '--tall': number(title) % 30 }, title)));
}
function nothingFound(suggestions, { search = '', ...others }) {
  const meant = suggestions.flatMap((words, i) => [i ? ', ' : 'Did you mean ', link(to('', { ...others, search: words }), words)]);
  return nothing('No books match.', meant.length > 0 && [...meant, '?'],
    way('#/', 'Show everything'), search && way(to('add', { search }), 'Add it by ISBN or by words'));
}
const emptyCatalogue = () => me
  ? nothing('The catalogue is empty.', 'Be the first to add a book, or bring in a file.', way('#/add', 'Add the first book'),
    me.role === 'admin' && button('Load fifty classics', tries($('catalogue'), loadSample), { class: 'strong' }))
  : nothing('The catalogue is empty.', 'Sign in and add the first book.', button('Sign in', () => openSignIn(), { class: 'strong' }));
async function loadSample() {
  const body = new FormData();
  body.append('file', await (await send('static/sample_books.csv')).blob(), 'sample_books.csv');
  await startUpload(body);
}
const loadGenres = () => get('books/genres').then(genres => offer(filters.elements.genre, 'All genres',
  genres.map(({ genre, count }) => [genre, `${genre} (${count})`])), () => {});
// --- adding books --------------------------------------------------------------------------------------------------
const findForm = $('find'), addForm = $('add-form');
let scanning = Promise.resolve(); // one line after the other, however fast they are typed
findForm.addEventListener('submit', event => {
  event.preventDefault();
  const field = findForm.elements.search, words = field.value.trim();
  if (!isIsbn(words)) { history.replaceState(history.state, '', to('add', { search: words })); findCandidates(words); return; }
  const line = el('li', {}, el('span', {}, words), mark('soft', 'Looking it up…'));
  field.value = '';
  clear(findForm);
  $('added').prepend(line);
  scanning = scanning.then(async () => put(line, el('span', {}, words), await orWhy(addIsbn(words.replace(/[\s-]/g, '')))));
});
function openAdd({ query: { search } }) {
  put($('candidates'));
  findForm.elements.search.value = search ?? '';
  findForm.elements.search.focus();
  if (search) return findCandidates(search);
}
async function lookUp(query) { // in one catalogue after the other, until one knows it
  let error = null;
  for (const source of ['google', 'openlibrary']) {
    const found = await get('books/external', { ...query, source, max_results: 10 }).catch(problem => { error = problem; });
    if (found?.items.length) return found.items;
  }
  if (error) throw error;
  return [];
}
const findCandidates = words => attempt(findForm, async () => {
  const found = await lookUp({ q: words });
  put($('candidates'), found.map(drawCandidate), !found.length && el('li', {}, 'No other catalogue knows it. Type it in by hand.'));
});
function drawCandidate(candidate) {
  const { title, author, publication_year, publisher, isbn } = candidate, place = grow();
  const add = async () => put(place, await orWhy(addFound(candidate)));
  fill(place, {}, [el('h3', {}, bdi(title)), el('p', { class: 'by' }, bdi(author)),
    facts(year(publication_year), publisher, isbn && `ISBN ${isbn}`), button('Add', once(add), { class: 'strong', 'aria-label': `Add ${title}` })]);
  return el('li', {}, cover({ ...candidate, isbn: null }, 'small'), place);
}
async function addFound({ source, ref, isbn }) {
  const here = isbn && (await get('books', { isbn })).items[0], book = here || await api('POST', 'books/external', { source, ref });
  return mark(here ? 'soft' : 'good', here ? 'Here already: ' : 'Added: ', linkTo(book.id, book.title));
}
async function addIsbn(isbn) {
  const here = (await get('books', { isbn })).total, [found] = here ? [{}] : await lookUp({ isbn });
  return found ? addFound({ ...found, isbn }) : mark('bad', 'Unknown. ', button('Type it in by hand', () => byHand(isbn), { class: 'link' }));
}
const orWhy = work => work.catch(error => mark('bad', error.message));
function byHand(isbn) { addForm.closest('details').open = true; addForm.elements.isbn.value = isbn; addForm.elements.title.focus(); }
onSubmit(addForm, async () => {
  const book = await api('POST', 'books', valuesOf(addForm));
  addForm.reset();
  refreshAll();
  moveTo(`#/book/${book.id}`);
});
// --- one book ------------------------------------------------------------------------------------------------------
const bookView = $('view-book'), mine = $('mine');
let shown = null, entry = null, held = null; // the book in its view, what my shelf says of it, and my loan of it
const note = text => { $('book-note').textContent = text; };
const reviews = pages({
  root: $('book-reviews'), label: 'Reviews', kind: 'reviews', path: () => `books/${shown.id}/reviews`, limit: 10, key: review => review.username,
  row: ({ username, rating, review, updated_at }) => [
    inRow(el('strong', {}, bdi(username)), rating && stars(rating), mark('soft', day(updated_at))),
    review && el('p', { class: 'text', dir: 'auto' }, review),
    button('Remove', takeAway(shown.id, username), { class: 'link danger', 'data-staff': '', 'aria-label': `Remove the review of ${username}` }),
  ],
  empty: () => 'Nobody has reviewed it yet.',
});
const takeAway = (id, username) => ifSure(bookView, `Remove the review of ${username}?`,
  'Its stars go, too. The book stays on the shelf of its reader.', 'Remove', async () => {
    await api('DELETE', `books/${id}/reviews/${encodeURIComponent(username)}`);
    note('The review is gone.');
    await Promise.all([readBook(id), reviews.load(true)]);
  });
async function openBook(id) {
  if (shown?.id !== id) {
    [shown, held] = [{ id }, null];
    for (const part of all('.side, .rest, #mine')) part.hidden = true;
    put($('book-title'), 'A book');
    for (const part of all('#book-head, #book-info')) put(part);
    note('');
    reviews.forget();
    stockForm.reset();
    if (books.has(id)) drawBook(shown = books.get(id));
  }
  await attempt(bookView, async () => {
    const reading = readBook(id);
    if (!shown.title) await reading.catch(error => { put($('book-title'), error.status ? 'There is no such book' : 'A book'); throw error; });
    await Promise.all([reading, reviews.load(Boolean(shown?.title), 0)]);
    if (me && shown?.id === id) await readMine(id);
  });
}
const readBook = id => get(`books/${id}`).then(book => shown?.id === id && !(book.version < shown.version) && drawBook(shown = book));
async function readMine(id) { // not the entry itself: where there is none, its 404 would be an error in the browser's log
  const [{ items: [mine] }, { items: lent }] = await Promise.all([get(`my-library?book_id=${id}`), get(`loans?user_id=${me.id}&limit=100`)]);
  if (shown?.id !== id) return;
  held = lent.find(loan => loan.book_id === id && !loan.returned_at) ?? null;
  drawMine(mine);
  drawDesk();
}
function drawBook(book) {
  const known = {
    Genre: book.genre && link(to('', { genre: book.genre }), bdi(book.genre)), Published: book.published_date ?? year(book.publication_year),
    Publisher: book.publisher, Language: languageName(book.language), Pages: book.pages, ISBN: book.isbn, Price: book.price?.toFixed(2),
  };
  setTitle();
  for (const part of all('.side, .rest')) part.hidden = false;
  put($('book-title'), bdi(book.title));
  const shows = `${book.id} ${book.title} ${book.author} ${book.isbn}`;
  if ($('book-cover').shows !== shows) put($('book-cover'), cover(book));
  $('book-cover').shows = shows;
  put($('book-head'), el('p', { class: 'lead' }, 'by ', ...book.author.split(', ').filter(Boolean).flatMap((name, i) => [i ? ', ' : '', link(to('', { search: name }), bdi(name))])),
    el('p', {}, rating(book) || mark('soft', 'Not rated yet')));
  put($('book-info'), book.description && el('p', { class: 'text', dir: 'auto' }, book.description),
    el('dl', {}, Object.entries(known).flatMap(([name, value]) => value ? [el('dt', {}, name), el('dd', {}, value)] : [])),
    /^https?:\/\//i.test(book.cover_url ?? '') // a link, not a picture: its host need not know who reads what here
      && link(book.cover_url, 'Its cover, on another site', { target: '_blank', rel: 'noreferrer noopener' }));
  drawDesk();
}
function drawDesk() {
  const { copies, available } = shown;
  $('stock-now').textContent = [held && `You have it until ${day(held.due_at)}.`,
    copies ? `${available} of ${plural(copies, 'copy', 'copies')} available.` : 'There is no copy to lend.'].filter(Boolean).join(' ');
  [borrow.hidden, giveBack.hidden, renew.hidden, edit.hidden] = [!me || !available || held, !held, !mayRenew(held), !mayEdit(shown)];
  [edit.href, lendIt.href, lendIt.hidden, share.href] = [`#/edit/${shown.id}`, `#/desk?book=${shown.id}`, !available, `b/${shown.id}`];
  Object.assign(stockForm.elements.copies, { min: copies - available, defaultValue: copies }); // those on loan are the least; what is typed stays
}
const mayEdit = book => isStaff() || me && book.added_by === me.id;
const MOST_RENEWALS = 2; // of the service
const mayRenew = loan => Boolean(loan) && !loan.returned_at && loan.renewals < MOST_RENEWALS && new Date(loan.due_at) > new Date();
const loanButton = (text, path, json, told, more) => button(text, tries(bookView, async () => {
  const { id } = shown, loan = await api('POST', path(), json?.());
  await Promise.all([readBook(id), readMine(id)]);
  note(told(loan)); // once its buttons can be pressed again
  keepFocus($('book-title'));
}), more);
const borrow = loanButton('Borrow it', () => 'loans', () => ({ book_id: shown.id }), ({ due_at }) => `Yours until ${day(due_at)}.`, { class: 'strong' });
const giveBack = loanButton('Return it', () => `loans/${held.id}/return`, null, () => 'You brought it back.');
const renew = loanButton('Renew it', () => `loans/${held.id}/renew`, null, ({ due_at }) => `You may keep it until ${day(due_at)}.`);
const share = way('', 'Copy a link to share'), edit = way('', 'Edit it'), lendIt = way('', 'Lend it to somebody');
share.onclick = async event => { // without a clipboard it is a link like others
  if (!navigator.clipboard) return;
  event.preventDefault();
  await navigator.clipboard.writeText(share.href).then(() => note('The link is copied.'), () => note(share.href));
};
const stockForm = formOf({
  id: 'stock', 'data-staff': '', verb: 'Set the number', parts: [lendIt, field('copies', 'Copies that the library has', { type: 'number', max: 1000000 })],
  async work({ copies }) {
    const { id } = shown, now = await api('PUT', `books/${id}/stock`, { copies: Number(copies) });
    note(`The library has ${plural(now.copies, 'copy', 'copies')} of it.`);
    await readBook(id);
  },
});
$('book-desk').append(borrow, giveBack, renew, share, edit, stockForm);
mine.elements.status.append(...options(SHELVES));
function drawStars(rating) { // a rating between whole stars is kept, and is one choice more
  put($('stars'), el('legend', {}, 'My rating, for everybody to see'), [...new Set([0, 1, 2, 3, 4, 5, rating ?? 0])].sort().map(n => el('label', {},
    el('input', { class: 'unseen', type: 'radio', name: 'rating', value: n || '', checked: n === (rating ?? 0),
      'aria-label': n ? plural(n, 'star') : 'no rating' }),
    n ? n % 1 ? String(n) : '★' : 'no rating')));
}
function drawMine(now, told = '') {
  entry = now;
  clear(mine);
  if (told) note(told);
  const dayOf = moment => moment?.slice(0, 10);
  fillIn(mine, { status: 'wishlist', ...entry, started_at: dayOf(entry?.started_at), finished_at: dayOf(entry?.finished_at),
    tags: entry?.tags.join(', '), undated: entry?.status === 'completed' && !entry.finished_at });
  drawStars(entry?.rating);
  chooseDays();
  [mine.hidden, $('opinion').hidden, $('unshelve').hidden] = [false, !entry, !entry];
  mine.querySelector('.strong').textContent = entry ? 'Save' : 'Put it on my shelf';
}
async function changeMine(told, method, json) {
  note('');
  const { id } = shown, now = await api(method, `my-library/${id}`, json);
  refreshAll();
  if (shown?.id !== id) return;
  drawMine(now, told);
  await Promise.all([readBook(id), reviews.load(true)]);
  keepFocus($('book-title'));
}
onSubmit(mine, fields => entry ? changeMine('Saved.', 'PATCH', changedMine(fields))
  : changeMine('It is on your shelf.', 'POST', { status: fields.status }));
$('unshelve').onclick = tries(mine, () => changeMine('It is off your shelf.', 'DELETE'));
// --- my shelf ------------------------------------------------------------------------------------------------------
const dated = moment => new Date(moment).toLocaleDateString('en', { dateStyle: 'medium', timeZone: 'UTC' }); // days are counted and typed in UTC
const shelfAddress = ({ status, ...fields }) => to(status ? `shelf/${status}` : 'shelf', fields);
const shelfTabs = el('nav', { class: 'tabs', 'aria-label': 'Parts of my shelf' }), shelfTags = choiceFilter('tag', 'Tag', { '': 'All tags' });
const shelfView = section('shelf', 'My shelf',
  [mark('count'), inRow(button('Export as CSV', once(() => exportShelf())), way('#/import', 'Import'))], shelfTabs,
  filterForm(el('input', { name: 'status', hidden: true }), wordsFilter('Search my shelf for', 'Title or author on my shelf'), shelfTags,
    choiceFilter('sort', 'Sort by', { '': 'Added last', '-finished': 'Finished last', '-updated': 'Changed last',
      title: 'By title', author: 'By author', '-rating': 'Best rated' })));
const exportShelf = () => attempt(shelfView, () => saveFile('my-library/export', 'my-library.csv'));
const shelf = pages({
  root: shelfView, label: 'Books on my shelf', path: () => 'my-library', address: shelfAddress, key: item => item.book_id, row: drawEntry,
  skeleton: () => [el('div', { class: 'cover small' }), grow(el('h3', {}, ' '), el('p', { class: 'by' }, ' '), facts(' '))],
  empty: (_, { status, ...filters }) => Object.keys(filters).length
    ? nothing('No books on your shelf match.', null, way(shelfAddress({ status }), 'Show all of it'))
    : nothing('Nothing here yet.', 'Find a book in the catalogue and put it on your shelf, or bring in your shelf from Goodreads, StoryGraph or LibraryThing.',
      way('#/', 'To the catalogue'), way('#/import', 'Import')),
});
const heading = ({ book_id, book: { title, author } }) => [el('h3', {}, linkTo(book_id, title)), el('p', { class: 'by' }, bdi(author))];
function drawEntry(item, node) {
  const { book_id, book, status, rating, tags, review } = item;
  const choice = el('select', { 'aria-label': `Status of ${book.title}`, onchange: () => move(node, item, choice.value) }, options(SHELVES, status));
  return [thumbnail(book), grow(heading(item), facts(rating && stars(rating), ...milestones(item)),
    tags.length > 0 && el('p', { class: 'row tags' }, tags.map(tag => link(to('shelf', { tag }), bdi(tag), { class: 'chip' }))),
    review && el('p', { class: 'text soft', dir: 'auto' }, review.length > 200 ? `${review.slice(0, 200)}…` : review),
    status === 'reading' && reached(item), alertSlot()),
  el('div', { class: 'aside' }, choice, link(`#/book/${book_id}`, 'Rate and review', { class: 'button' }))];
}
const thumbnail = book => link(`#/book/${book.id}`, cover(book, 'small'), { tabindex: -1, 'aria-hidden': true }); // the title is a link, too
function milestones({ status, rating, started_at, finished_at, added_at }) {
  const ended = { completed: 'finished', abandoned: 'put aside' }[status], isUndated = status === 'completed' && !finished_at;
  return [status === 'wishlist' && rating && 'rated before reading it', started_at && `started ${dated(started_at)}`, isUndated && 'finished, day not known',
    ended && finished_at && `${ended} ${dated(finished_at)}`, !ended && !started_at && `added ${dated(added_at)}`];
}
function reached({ book_id, page, book: { title, pages: last } }) { // saved when it is typed
  const field = el('input', { name: 'page', type: 'number', min: 0, max: 100000, value: page, 'aria-label': `Page reached in ${title}`,
    onchange: () => form.requestSubmit() });
  const form = el('form', { class: 'reached' },
    last && el('progress', { max: last, value: Math.min(page ?? 0, last), 'aria-label': `How much of ${title} is read` }),
    el('label', {}, 'Page ', field, last && ` of ${last.toLocaleString('en')}`),
    button('Finished', once(() => move(form, { book_id, book: { title } }, 'completed')), { class: 'link', 'aria-label': `I finished ${title}` }), alertSlot());
  onSubmit(form, async fields => {
    await api('PATCH', `my-library/${book_id}`, { page: fields.page ? Number(fields.page) : null });
    say(`${title}: page ${fields.page || 'not known'}.`);
    await VIEWS[at.name].refresh();
  });
  return form;
}
async function move(where, { book_id, book, status: was }, status) {
  const now = await attempt(where, () => api('PATCH', `my-library/${book_id}`, { status }));
  if (!now) { if (was) where.querySelector('select').value = was; return; }
  say(`${book.title} is on ${STATUSES[now.status]}.`);
  await VIEWS[at.name].refresh();
  keepFocus(sectionOf(at.name).querySelector('.rows, .covers'));
}
function drawTabs(nav, path, names, counts, chosen) { // each keeps what else the address asks for as it is clicked
  const address = name => { const { page, ...query } = parse(location.hash).query; return to(name ? `${path}/${name}` : path, query); };
  redraw(nav, Object.entries(names).map(([name, text]) => link(address(name),
    [text, counts[name] != null && mark('soft', ` ${counts[name].toLocaleString('en')}`)],
    { 'aria-current': name === chosen ? 'page' : 'false', onclick: event => { event.currentTarget.href = address(name); } })));
}
async function loadTabs() { // the counts are of the whole shelf
  const stats = await get('my-library/stats').catch(() => null);
  if (!stats || at.name !== 'shelf') return;
  drawTabs(shelfTabs, 'shelf', { '': 'All', ...STATUSES }, { '': stats.total, ...stats.by_status }, at.id);
  offer(shelfTags.lastChild, 'All tags', stats.top_tags.map(({ tag }) => [tag, tag]).sort());
}
async function saveFile(path, name) { // which needs the token
  const saved = el('a', { href: URL.createObjectURL(await (await send(path)).blob()), download: name });
  saved.click();
  setTimeout(() => URL.revokeObjectURL(saved.href), 10000);
}
const reading = pages({ // above the catalogue
  root: $('now'), label: 'Books that I am reading', kind: 'strip', path: () => 'my-library', params: () => ({ status: 'reading' }), limit: 12, key: item => item.book_id,
  row: item => [thumbnail(item.book), grow(heading(item), reached(item))],
  empty: () => ['Nothing at the moment. ', link('#/shelf/wishlist', 'Begin a book of your wishlist'), ', or find one below.'],
});
const openNow = () => me && !$('now').hidden && reading.load(true, 0);
function chooseDays() { // those that the status has
  const { status: { value: status }, page, finished_at, undated } = mine.elements;
  page.parentNode.hidden = !['reading', 'abandoned'].includes(status);
  finished_at.parentNode.hidden = !['completed', 'abandoned'].includes(status);
  undated.parentNode.hidden = status !== 'completed';
  finished_at.disabled = status === 'completed' && undated.checked;
  $('stars-note').hidden = status !== 'wishlist';
}
mine.onchange = chooseDays;
function changedMine({ status, rating }) { // a day that was not changed keeps its time
  const { undated, ...changed } = changesOf(mine), now = { ...changed, status, rating: Number(rating) || null };
  for (const name of ['started_at', 'finished_at']) if (now[name]) now[name] += 'T12:00:00Z';
  if ('tags' in now) now.tags = now.tags?.split(',').map(tag => tag.trim()).filter(Boolean) ?? [];
  return undated && status === 'completed' ? { ...now, finished_at: null } : now;
}
// --- statistics ----------------------------------------------------------------------------------------------------
function bars(title, unit, rows) { // [name, number, address]
  const most = Math.max(...rows.map(([, n]) => n), 1);
  const drawn = rows.map(([name, n, address]) => el('li', { '--part': `${n / most * 100}%` },
    bdi(address ? link(address, name) : name), ' ', el('span', {}, n.toLocaleString('en'), mark('unseen', ` ${unit}`))));
  return rows.some(([, n]) => n) && el('div', { class: 'panel' }, el('h3', {}, title), el('ul', { class: 'bars', 'aria-label': title }, drawn));
}
const figure = (n, text) => el('p', { class: 'panel' }, mark('big', n.toLocaleString('en')), ' ', mark('soft', text));
const charts = el('div', { id: 'charts' }), statsView = section('stats', 'Statistics', null, alertSlot(), charts);
const loadStats = () => attempt(statsView, async () => {
  const stats = await get('my-library/stats'), shows = JSON.stringify(stats);
  if (charts.shows !== shows) drawStats(stats);
  charts.shows = shows;
});
function drawStats({ total, by_status, by_year, undated, average_rating, rating_count, top_genres, top_tags, top_authors }) {
  const isEmpty = !total && el('p', {}, 'Your shelf is empty. ', link('#/', 'Find a book'), ' or ', link('#/import', 'bring in your shelf'), '.');
  const thisYear = by_year.find(({ year }) => year === new Date().getUTCFullYear()) ?? { books: 0, pages: 0 };
  redraw(charts, isEmpty || [el('div', { class: 'cards figures' },
    figure(by_status.completed, 'books finished'), figure(thisYear.books, 'of them this year'), figure(thisYear.pages, 'pages this year'),
    figure(average_rating == null ? '–' : `★ ${average_rating.toFixed(2)}`, `on average, of ${plural(rating_count, 'rating')}`)),
  el('div', { class: 'columns' },
    bars('On my shelf', 'books', SHELVES.map(([status, name]) => [name, by_status[status], `#/shelf/${status}`])),
    bars('Top genres', 'books', top_genres.map(({ genre, count }) => [genre, count, to('', { genre })])),
    bars('Books finished by year', 'books', [...by_year.map(({ year, books }) => [String(year), books]), ...undated ? [['day not known', undated]] : []]),
    bars('Pages finished by year', 'pages', by_year.map(({ year, pages }) => [String(year), pages])),
    bars('Top authors', 'books', top_authors.map(({ author, count }) => [author, count, to('shelf/completed', { search: author })])),
    bars('Top tags', 'books', top_tags.map(({ tag, count }) => [tag, count, to('shelf/completed', { tag })])))]);
}
// --- lending -------------------------------------------------------------------------------------------------------
const LOANS = { overdue: 'Overdue', active: 'On loan', returned: 'Returned', all: 'All' };
const loanTabs = el('nav', { class: 'tabs', 'aria-label': 'Loans' });
const cardForm = el('form', {}, el('input', { type: 'hidden', name: 'status' }), unseenLabel('Only of the card number',
  el('input', { name: 'user_id', type: 'search', inputmode: 'numeric', placeholder: 'Card number' }), { 'data-staff': '' }));
const lendingView = section('lending', 'Lending', cardForm, loanTabs);
const loans = pages({
  root: lendingView, label: 'Loans', path: () => 'loans', address: ({ status, ...fields }) => to(`lending/${status}`, fields), key: loan => loan.id,
  params: ({ status, ...fields }) => ({ ...fields, ...(status && status !== 'all' && { status }) }), // none before the view is opened
  row(loan, node) {
    const { id, book_id, user_id, title, username, quantity, borrowed_at, due_at, returned_at, renewals } = loan, late = new Date(due_at) < new Date();
    const send = async what => { await api('POST', `loans/${id}/${what.toLowerCase()}`); await refreshLoans(); };
    const change = what => button(what, tries(node, () => send(what)), { 'aria-label': `${what} ${title}` });
    return [
      grow(el('h3', {}, book_id ? linkTo(book_id, title) : title),
        isStaff() && username && el('p', {}, 'lent to ', link(to('lending/all', { user_id }), bdi(username)), mark('soft', ` · card ${user_id}`)),
        facts(quantity > 1 && plural(quantity, 'copy', 'copies'), `since ${day(borrowed_at)}`,
          returned_at ? mark('good', `returned ${day(returned_at)}`) : el('span', { class: late && 'bad' }, `${late ? 'overdue since' : 'due'} ${day(due_at)}`),
          renewals > 0 && `renewed ${plural(renewals, 'time')}`), alertSlot()),
      !returned_at && el('div', { class: 'row' }, mayRenew(loan) && change('Renew'), change('Return')),
    ];
  },
  empty: (_, { status }) => nothing(status === 'overdue' ? 'Nothing is overdue.' : 'No loans here.',
    'Books with a copy to lend have a “Borrow it” button.', way('#/', 'To the catalogue')),
});
const card = cardForm.elements; // whose loans, and which
async function loadLoanTabs(chosen, user_id) { // the overdue first, if there are any
  const count = status => get('loans', { ...(user_id && { user_id }), status, limit: 1 });
  const [{ total: overdue }, { total: active }] = await Promise.all([count('overdue'), count('active')]);
  const now = Object.hasOwn(LOANS, chosen) ? chosen : overdue ? 'overdue' : 'active';
  drawTabs(loanTabs, 'lending', LOANS, { overdue, active }, now);
  return now;
}
const openLending = ({ id, query }) => attempt(lendingView, async () => loans.open({ ...query, status: await loadLoanTabs(id, query.user_id) }));
const refreshLoans = () => Promise.all([loans.load(true), loadLoanTabs(card.status.value, card.user_id.value)]);
card.user_id.addEventListener('input', () => loadLoanTabs(card.status.value, card.user_id.value).catch(() => {}));
// --- files ---------------------------------------------------------------------------------------------------------
const uploadForm = $('upload');
let job = null;
const running = ({ status }) => ['queued', 'processing'].includes(status);
const WORDS = { queued: 'Waiting…', processing: 'Working…', completed: 'Done.', failed: 'Failed.', cancelled: 'Cancelled.' };
const EXPORTS = { // by columns that only they have
  'a shelf that was exported here': ['exclusiveshelf', 'addedat'], 'an export of Goodreads': ['exclusiveshelf', 'myrating'],
  'an export of the StoryGraph': ['readstatus', 'starrating'], 'an export of LibraryThing': ['primaryauthor', 'collections'],
  'an export of BookWyrm': ['authortext', 'shelf'],
};
async function recognise() { // the file's first line, before anything is sent
  const { file: { files: [file] }, shelve } = uploadForm.elements;
  $('choices').hidden = !file;
  clear(uploadForm);
  if (!file) return;
  const bytes = new Uint8Array(await file.slice(0, 65536).arrayBuffer()), [a, b] = bytes;
  const encoding = a === 0xFE || a === 0 ? 'utf-16be' : a === 0xFF || b === 0 ? 'utf-16le' : 'utf-8';
  const header = new TextDecoder(encoding).decode(bytes).replace(/^sep=.\r?\n/, '').split(/[\r\n]/, 1)[0];
  const columns = header.split(/[,;\t|]/).map(cell => cell.replace(/[\s_"'-]/g, '').toLowerCase());
  const [known] = Object.entries(EXPORTS).find(([, names]) => names.every(name => columns.includes(name))) ?? [];
  const isList = columns.some(name => /title|^name$/.test(name)) && columns.some(name => /author/.test(name));
  $('recognised').textContent = `${file.name}: ${known ?? (isList ? 'a list of books' : 'no columns “title” and “author” in its first row')}`;
  shelve.checked = Boolean(known);
  $('to-shelf').hidden = !known;
  chooseGoal();
  $('recognised').focus();
}
function chooseGoal() {
  const { shelve, dry_run } = uploadForm.elements;
  $('public').hidden = !shelve.checked;
  uploadForm.querySelector('.strong').textContent = `Upload ${dry_run.checked ? 'to try it' : shelve.checked ? 'to my shelf' : 'to the catalogue'}`;
}
uploadForm.elements.file.addEventListener('change', recognise);
$('choices').addEventListener('change', chooseGoal);
onSubmit(uploadForm, async () => {
  const body = new FormData(uploadForm), { shelve } = uploadForm.elements;
  body.delete('shelve'); // an address of its own
  await startUpload(body, shelve.checked ? 'my-library/import' : 'books/upload');
  uploadForm.reset();
  $('choices').hidden = true;
});
$('view-import').ondragover = event => event.preventDefault(); // beside the field, a browser would leave the page for the file
$('view-import').ondrop = event => {
  event.preventDefault();
  if ($('import-start').hidden || !event.dataTransfer.files.length) return;
  uploadForm.elements.file.files = event.dataTransfer.files;
  recognise();
};
async function startUpload(body, path = 'books/upload') {
  watch(await (await send(path, { method: 'POST', body })).json());
  moveTo(`#/import/${job.id}`);
}
async function openImport({ id, query }) {
  $('import-start').hidden = Boolean(id);
  $('h-uploads').textContent = isStaff() ? 'Uploads of everybody' : 'My uploads';
  if (id && job?.id === Number(id)) return;
  [job, $('job').hidden] = [null, true];
  clear($('view-import'));
  if (!id) { await uploads.open(query); return; }
  await attempt($('view-import'), async () => {
    const upload = await get(`books/upload/${Number(id) || 0}`);
    if (at.name === 'import' && at.id === id) watch(upload);
  });
}
async function watch(upload) {
  for (drawJob(upload); job?.id === upload.id && running(job);) {
    await sleep(250);
    const now = await get(`books/upload/${upload.id}`).catch(() => sleep(2000)); // the server may be away for a while
    if (job?.id === upload.id && now) drawJob(now);
  }
}
function drawJob(now) {
  job = now;
  const { dry_run, shelve, rows, inserted, updated, failed, warnings, hint } = job, view = $('job'), bar = view.querySelector('progress');
  $('job-name').textContent = job.filename;
  [bar.value, bar.hidden, $('job-cancel').hidden] = [job.progress, !running(job), !running(job)];
  view.querySelector('.problem').textContent = job.error ?? '';
  if ($('job-state').textContent !== WORDS[job.status]) $('job-state').textContent = WORDS[job.status]; // else it is read aloud again
  $('job-told').textContent = running(job) ? `${rows.toLocaleString('en')} rows so far` : became(job);
  $('job-hint').textContent = hint ?? '';
  $('job-to').href = shelve ? '#/shelf' : '#/?sort=-created';
  $('job-to').textContent = shelve ? 'To my shelf' : 'To the catalogue';
  $('job-to').hidden = running(job) || dry_run || !(inserted + updated);
  [view.hidden, $('job-error').hidden, $('job-warning').hidden] = [false, running(job) || !failed, running(job) || !warnings];
  $('job-download').hidden = $('job-error').hidden;
  if (!$('job-warning').hidden) lacking(job).then(lacks => { if (job === now) $('job-told').textContent = became(job, lacks); }, () => {});
  if (!$('job-error').hidden) refused.load(false, 0);
  if (!$('job-warning').hidden) warned.load(false, 0);
}
function became({ shelve, dry_run, rows, inserted, updated, skipped, failed }, lacks = []) {
  const where = shelve ? 'on your shelf' : 'in the catalogue', would = (maybe, now) => dry_run ? `would ${maybe}` : now;
  const told = [[inserted, `book ${would('be', 'is')} ${where}`, `books ${would('be', 'are')} ${where}`],
    [updated, `${would('be', 'was')} updated`, `${would('be', 'were')} updated`], [skipped, 'was there already', 'were there already'],
    [failed, 'row was refused', 'rows were refused'], ...lacks];
  return rows ? told.filter(([n]) => n).map(of => plural(...of)).join(', ').replace(/.$/, '$&.') : 'No row was read.';
}
const LACKS = { page: 'a page count', isbn: 'an ISBN', year: 'a year', rating: 'a rating', price: 'a price', url: 'a cover', date: 'a date' };
async function lacking({ id, warnings, dry_run }) { // how many rows went in without what
  const { items, total } = await get(`books/upload/${id}/errors`, { severity: 'warning', limit: 100 }), rows = new Map();
  const went = dry_run ? 'would go in' : 'went in', entry = (n, what) => [n, `${went} ${what}`, `${went} ${what}`];
  if (total > items.length) return [entry(warnings, 'with a warning')];
  for (const { row, field, message } of items) {
    const [, what] = Object.entries(LACKS).find(([part]) => field?.toLowerCase().includes(part)) ?? [];
    const without = what && message.endsWith('left out') ? `without ${what}` : 'with a warning';
    rows.set(without, (rows.get(without) ?? new Set()).add(row));
  }
  return [...rows].map(([without, of]) => entry(of.size, without));
}
const issues = (severity, label, says) => pages({
  root: $(`job-${severity}`), label, kind: ['Row', 'Column', 'Value', says],
  path: () => `books/upload/${job.id}/errors`, params: () => ({ severity }), limit: 20, key: JSON.stringify,
  row: ({ row, field, value, message }) => [row, field, value, message].map(cell => el('td', {}, cell)),
});
const refused = issues('error', 'Refused rows', 'Why'), warned = issues('warning', 'Warnings: these rows went in', 'What');
$('job-download').onclick = tries($('job'), () => saveFile(`books/upload/${job.id}/errors?format=csv`, `upload-${job.id}-refused.csv`));
$('job-cancel').onclick = tries($('job'), async () => { drawJob(await api('POST', `books/upload/${job.id}/cancel`)); keepFocus($('h-import')); });
const uploads = pages({
  root: $('uploads'), label: 'Uploads', path: () => 'books/upload', address: fields => to('import', fields), limit: 10, key: upload => upload.id,
  row: ({ id, filename, status, created_at, rows, failed, warnings }) => [
    el('p', { class: 'grow' }, link(`#/import/${id}`, bdi(filename)), ' ', el('span', { class: status === 'failed' ? 'chip bad' : 'chip' }, WORDS[status])),
    facts(day(created_at), plural(rows, 'row'), failed > 0 && `${failed.toLocaleString('en')} refused`, warnings > 0 && plural(warnings, 'warning')),
  ],
  empty: () => 'No file yet.',
});
// --- who is signed in ----------------------------------------------------------------------------------------------
const isStaff = () => ['librarian', 'admin'].includes(me?.role);
const mailAgain = async email => { await api('POST', 'auth/verify-email', { email }); return 'It is on its way.'; };
const openAccount = (title, form) => openDialog('account', 'small', title, formOf({ how: 'strong', ...form }));
function openSignIn({ username, password, email } = {}) { // at once where all is known, after signing up
  const form = openAccount('Sign in', {
    id: 'sign', verb: 'Sign in', parts: [userName('User name or e-mail address', { value: username }), secret('password', 'Password'),
      el('p', { class: 'soft' }, document.body.dataset.hint)],
    also: [button('I have no account yet', openSignUp, { class: 'link' }), button('Forgotten your password?', () => askForCode(form), { class: 'link' })],
    async work(fields) {
      await logIn(fields.username, fields.password).catch(error => {
        if (error.status === 403 && !form.nextSibling) form.after(confirmation(email ?? addressIn(form))); // the address must be confirmed first
        throw error;
      });
      if (email) $('news').textContent = `Welcome! A mail is on its way to ${email}: its link confirms your address.`;
    },
  });
  if (!password) return;
  form.elements.password.value = password;
  form.requestSubmit();
}
const addressIn = form => form.elements.username.value.match(/.*@.*/)?.[0];
const confirmation = email => formOf({
  id: 'confirm', verb: 'Send it again', parts: [el('p', {}, 'A mail is on its way to you. Follow its link to confirm your address, then sign in.'),
    emailField('Address to confirm', email)], work: fields => mailAgain(fields.email),
});
const openSignUp = () => openAccount('Sign up', {
  verb: 'Sign up', parts: [userName('User name'), emailField('E-mail address'),
    fullName('Full name, if you like'), newSecret('password', 'Password')],
  also: button('I have an account', () => openSignIn(), { class: 'link' }),
  async work(fields) { await api('POST', 'auth/register', fields); openSignIn(fields); },
});
const openCode = form => openAccount('A new password', { id: 'forgot', also: button('Back to signing in', () => openSignIn(), { class: 'link' }), ...form });
const askForCode = form => openCode({
  verb: 'Mail me a code', parts: emailField('E-mail address', addressIn(form)),
  async work({ email }) { await api('POST', 'auth/forgot-password', { email }); useCode(email); },
});
const useCode = email => openCode({
  verb: 'Set the new password', parts: [
    el('p', { class: 'note', role: 'status' }, `If an account has the address ${email}, a code of six digits is on its way to it, for ten minutes.`),
    field('otp', 'Code', { inputmode: 'numeric', autocomplete: 'one-time-code', pattern: '[0-9]{6}', maxlength: 6 }),
    newSecret('new_password', 'New password')],
  async work(fields) {
    await api('POST', 'auth/reset-password', { email, ...fields });
    await logIn(email, fields.new_password);
    $('news').textContent = 'Your new password is set.';
  },
});
for (const node of all('[data-open]')) node.onclick = () => node.dataset.open === 'up' ? openSignUp() : openSignIn();
async function logIn(username, password) {
  token = (await api('POST', 'login?cookie=true', { username, password })).access_token;
  await signedIn();
  otherTabs.postMessage('in');
  closeDialog('account');
  keepFocus();
}
$('sign-out').onclick = async () => {
  connection?.abort(); // a stream that has just been asked for would be refused
  await api('POST', 'auth/logout').catch(() => {});
  otherTabs.postMessage('out');
  signedOut();
};
function keepFocus(wanted = $('main')) { // where what had it is gone
  const at = document.activeElement;
  if (at === document.body || !at.getClientRects().length) wanted.focus({ preventScroll: true });
}
async function signedIn() {
  if (!token) await refreshToken();
  if (!token) return;
  me = await get('users/me');
  localStorage.role = me.role; // for the next start, which then draws the right links at once
  drawRole(me.role);
  drawWho();
  route();
  reconnect();
  say(`Signed in as ${me.username}.`);
}
function signedOut(why = '') { // the page begins anew, so that nothing of this account stays in it
  delete localStorage.role;
  if (why) sessionStorage.why = why; // until it is shown
  location.reload();
  return new Promise(() => {}); // until then, nothing goes on
}
function drawRole(role) {
  const roles = { member: role, staff: ['librarian', 'admin'].includes(role), admin: role === 'admin' };
  for (const [name, has] of Object.entries(roles)) document.body.classList.toggle(name, Boolean(has));
}
const drawWho = () => put($('who'), bdi(me.full_name ?? me.username), el('span', {}, `, ${me.role}`));
// --- my account ----------------------------------------------------------------------------------------------------
const myCard = el('p', { class: 'facts' }), myAddress = el('div', { id: 'my-address' }), mySessions = el('div');
const myForms = Object.fromEntries(Object.entries({
  name: { title: 'Who I am', verb: 'Save the name', parts: [myCard, fullName('Full name, shown to staff and to you')],
    work: ({ full_name }) => changeMe({ full_name: full_name.trim() || null }, 'Saved.') },
  email: { title: 'E-mail address', verb: 'Change the address', parts: [myAddress, emailField('New address'), secret('current_password', 'My password')],
    work: fields => changeMe(fields, `A mail is on its way to ${fields.email}.`) },
  password: { title: 'Password', verb: 'Change the password', parts:
    [secret('current_password', 'Present password'), newSecret('new_password', 'New password')],
    async work(fields) { await api('POST', 'auth/change-password', fields); sessions.load(true); return 'Your new password is set.'; } },
  sessions: { title: 'Where I am signed in', verb: 'Sign out everywhere else', parts: mySessions,
    async work() {
      for (const { id, current } of (await get('auth/sessions?limit=100')).items) if (!current) await api('DELETE', `auth/sessions/${id}`);
      await sessions.load(true);
    } },
  data: { title: 'All about me', verb: 'Download it', parts: el('p', {}, 'All that is stored about you: account, shelf, reviews, loans, uploads and sessions.'),
    work: () => saveFile('users/me/export', `books-${me.username}.json`) },
  deletion: { title: 'Delete my account', verb: 'Delete my account', how: 'danger',
    parts: [el('p', {}, 'Your shelf, reviews, uploads and past loans go with it, for good. Books that you added stay.'), secret('password', 'My password')],
    async work(fields) { await api('DELETE', 'users/me', fields); otherTabs.postMessage('out'); await signedOut('Your account is deleted.'); } },
}).map(([name, form]) => [name, formOf(form)]));
const accountView = section('account', 'My account', null, el('div', { class: 'columns' }, Object.values(myForms)));
const device = agent => [/Firefox|Chrome|Safari/, /Android|iPhone|iPad|Windows|Mac OS|Linux(?!; Android)/]
  .map(known => agent?.match(known)?.[0]).filter(Boolean).join(' on ') || agent || 'An unknown program';
const sessions = pages({
  root: mySessions, label: 'My sessions', path: () => 'auth/sessions', limit: 10, key: session => session.id,
  row: ({ id, user_agent, created_at, last_used_at, current }, node) => [
    grow(el('strong', {}, device(user_agent)), ' ', current && chip('this one'),
      facts(`since ${day(created_at)}`, `last used ${day(last_used_at)}`), alertSlot()),
    !current && button('End', tries(node, async () => { await api('DELETE', `auth/sessions/${id}`); await sessions.load(true); }),
      { 'aria-label': `End the session of ${device(user_agent)}` })],
});
const openMe = () => attempt(accountView, async () => { [me] = await Promise.all([get('users/me'), sessions.load(true)]); drawMe(); });
async function changeMe(change, told) { me = await api('PATCH', 'users/me', change); drawMe(); return told; }
function drawMe() {
  const { id, username, role, full_name, email, email_verified_at, pending_email, created_at } = me, { name, email: form } = myForms;
  const waits = pending_email ? `${pending_email} takes its place when you follow the link that was mailed there.` : 'Follow the link that was mailed to you.';
  const press = (text, work) => button(text, tries(form, async () => { form.querySelector('.note').textContent = await work(); }), { class: 'link' });
  drawWho();
  put(myCard, el('b', {}, bdi(username)), el('b', {}, `Card number ${id}`), el('span', {}, role), el('span', {}, `since ${day(created_at)}`));
  name.elements.full_name.defaultValue = full_name ?? '';
  put(myAddress, el('p', {}, el('strong', {}, email), ' ', email_verified_at ? mark('good', '✓ confirmed') : mark('bad', 'not confirmed yet')),
    (pending_email || !email_verified_at) && inRow(mark('soft', waits),
      press('Send the mail again', () => mailAgain(pending_email ?? email)),
      pending_email && press('Keep the old one', () => changeMe({ email }, 'Your address stays as it is.'))));
}
// --- editing a book ------------------------------------------------------------------------------------------------
const editForm = fill(addForm.cloneNode(true), { id: 'edit-form' }, []);
let edited = null; // as it was read: what is sent is what differs
const openEdit = id => attempt(editForm, async () => {
  [edited, deleteBook.hidden] = [null, true];
  editForm.reset();
  drawEdited(await get(`books/${id}`));
});
function drawEdited(book, typed) {
  edited = book;
  fillIn(editForm, book, typed);
  deleteBook.hidden = !mayEdit(book);
}
async function changeEdited(method, json) { // where somebody else was faster, theirs is shown, and what was typed stays
  const was = edited;
  try { await send(`books/${was.id}`, { method, json, headers: { 'If-Match': `"${was.version}"` } }); } catch (error) {
    if (error.status !== 412) throw error;
    const now = await get(`books/${was.id}`), changed = [...editForm.elements].filter(({ name }) => name && now[name] !== was[name]);
    drawEdited(now, changesOf(editForm));
    const told = changed.map(({ name, labels: [label] }) => `${label.textContent.trim()} is now “${now[name] ?? ''}”.`);
    throw problem({ detail: ['Somebody has changed it meanwhile.', ...told, 'Do it again if that is still right.'].join(' ') });
  }
}
onSubmit(editForm, async () => { await changeEdited('PATCH', changesOf(editForm)); leave(`#/book/${edited.id}`); });
const deleteBook = button('Delete this book', ifSure(editForm, 'Delete this book?', 'Its reviews and its place on shelves go with it. This can’t be undone.',
  'Delete it', async () => { await changeEdited('DELETE'); leave('#/'); }), { class: 'danger' });
section('edit', 'Edit a book', deleteBook, editForm);
const leave = address => { history.replaceState(null, '', address); route(true); }; // Back does not lead to what was left
// --- users ---------------------------------------------------------------------------------------------------------
const ROLES = [['reader', 'Reader'], ['librarian', 'Librarian'], ['admin', 'Admin']];
const usersView = section('users', 'Users', [mark('count'), way('#/users/new', 'New user')], filterForm(
  wordsFilter('Search users for', 'User name, e-mail address, full name'), choiceFilter('role', 'Role', { '': 'All roles', ...Object.fromEntries(ROLES) }),
  choiceFilter('is_active', 'State', { '': 'Active or not', true: 'Active', false: 'Deactivated' })));
const users = pages({
  root: usersView, label: 'Users', kind: ['User', 'Role', 'State', 'E-mail address', 'Since'],
  path: () => 'users', address: fields => to('users', fields), limit: 50, key: user => user.id,
  row: ({ id, username, email, full_name, role, is_active, email_verified_at, created_at }) => [
    [link(`#/users/${id}`, bdi(username)), full_name && el('div', { class: 'soft' }, bdi(full_name))],
    role === 'reader' ? role : chip(role), el('span', { class: is_active ? 'good' : 'bad' }, is_active ? 'Active' : 'Deactivated'),
    [email, !email_verified_at && el('div', { class: 'soft' }, 'not confirmed')], day(created_at)].map(cell => el('td', {}, cell)),
  empty: () => 'No users match.',
});
let opened = null; // the id in the form, 'new', or none
async function openUsers({ id, query }) {
  const was = opened, tbody = usersView.querySelector('tbody');
  opened = id;
  if (!id) closeDialog('user');
  if (!id || !tbody.children.length) await users.open(query);
  if (id) await attempt(usersView, async () => drawUser(id === 'new' ? {} : await get(`users/${Number(id) || 0}`)));
  else if (was) (tbody.querySelector(`a[href="#/users/${was}"]`) ?? $('h-users')).focus();
}
function drawUser({ id, username, email, full_name, role = 'reader', is_active, pending_email, created_at }) {
  const change = async (method, json) => { await api(method, id ? `users/${id}` : 'users', json); $('user').close(); await users.load(true); };
  const form = formOf({
    verb: id ? 'Save' : 'Create the account', how: 'strong', work: () => change(id ? 'PATCH' : 'POST', valuesOf(form)), parts: [
      id ? facts(`Card number ${id}`, `since ${day(created_at)}`, pending_email && `${pending_email} waits to be confirmed`,
        link(to('lending/all', { user_id: id }), 'Loans')) : userName('User name', { maxlength: 50, autocomplete: 'off' }),
      field('email', 'E-mail address', { type: 'email', autocomplete: 'off', value: email }),
      fullName('Full name', { autocomplete: 'off', value: full_name }),
      !id && newSecret('password', 'Password, to be told to its owner'), el('label', {}, 'Role ', el('select', { name: 'role' }, options(ROLES, role))),
      id && el('label', {}, el('input', { type: 'checkbox', name: 'is_active', checked: is_active }), ' Active: may sign in')],
    also: id && button('Delete the account', (...how) => remove(...how), { class: 'danger' }),
  });
  const remove = ifSure(form, `Delete the account of ${username}?`,
    'Its shelf, reviews, uploads and past loans go with it, for good. Books that it added stay.', 'Delete it', () => change('DELETE'));
  openDialog('user', 'drawer', id ? bdi(username) : 'New user', form, () => {
    if (at.name === 'users' && at.id) /^#\/users(\?|$)/.test(history.state?.from) ? history.back() : leave('#/users');
  });
}
// --- the desk ------------------------------------------------------------------------------------------------------
const desk = formOf({
  title: 'Lend to a reader', verb: 'Lend', how: 'strong', work: lend, parts: [
    el('div', { class: 'fields' }, field('book', 'Book: ISBN or title', { autocomplete: 'off', maxlength: 500 }),
      field('reader', 'Reader: card number (admins: or name)', { autocomplete: 'off' }),
      field('until', 'Until, if not the usual time', { type: 'date', required: false })),
    el('p', { class: 'soft' }, 'Readers find their card number under “My account”. What they bring back is under ', link('#/lending', 'their loans'), '.')],
});
section('desk', 'Desk', null, desk, formOf({
  'data-admin': '', title: 'Backup', verb: 'Download a backup', parts: el('p', {}, 'A consistent copy of the whole database, made while everybody goes on working.'),
  work: () => saveFile('admin/backup', `books-${new Date().toISOString().slice(0, 10)}.db`),
}));
async function openDesk({ query }) {
  const book = query.book && await get(`books/${Number(query.book) || 0}`).catch(() => null);
  if (!book) return;
  desk.elements.book.value = `${book.title}, ${book.author} #${book.id}`;
  desk.elements.reader.focus();
}
async function idOf(text, path) { // a card number, a book's #id, its ISBN, or words that find one alone
  const [, id] = text.match(path === 'users' ? /^(\d+)$/ : /#(\d+)$/) ?? [];
  if (id) return Number(id);
  const { items: [found], total } = await get(path, { [path === 'books' && isIsbn(text) ? 'isbn' : 'search']: text, limit: 1 });
  if (total !== 1) throw problem({ detail: total ? `“${text}” is found ${total.toLocaleString('en')} times.` : `“${text}” is not found.` });
  return found.id;
}
async function lend({ book, reader, until }) { // the reader stays, for the next book
  const loan = { book_id: await idOf(book.trim(), 'books'), user_id: await idOf(reader.trim(), 'users'), ...(until && { due_at: `${until}T23:59:59Z` }) };
  const { title, username, due_at } = await api('POST', 'loans', loan);
  desk.elements.reader.defaultValue = reader;
  desk.elements.book.focus();
  return `${title} is lent to ${username} until ${day(due_at)}.`;
}
// --- views, each with an address -----------------------------------------------------------------------------------
// A view is `#/name/id?query`: its title, `who` may see it, what opens it there, and what draws it anew after a change.
const VIEWS = {
  '': { title: 'Catalogue', open: ({ query }) => Promise.all([catalogue.open(query).then(drawSpines), loadGenres(), openNow()]),
    refresh: () => Promise.all([catalogue.load(true), loadGenres(), openNow()]) },
  book: { title: 'Book', open: ({ id }) => openBook(Number(id) || 0), refresh: () => shown?.id && Promise.all([readBook(shown.id), reviews.load(true)]) },
  add: { title: 'Add a book', who: 'member', open: openAdd },
  shelf: { title: 'My shelf', who: 'member', open: ({ id, query }) => Promise.all([shelf.open({ status: id, ...query }), loadTabs()]),
    refresh: () => Promise.all([shelf.load(true), loadTabs()]) },
  stats: { title: 'Statistics', who: 'member', open: loadStats, refresh: loadStats },
  lending: { title: 'Lending', who: 'member', open: openLending, refresh: refreshLoans },
  import: { title: 'Import', who: 'member', open: openImport, refresh: () => at.id || uploads.load(true) },
  edit: { title: 'Edit a book', who: 'member', open: ({ id }) => openEdit(Number(id) || 0) },
  account: { title: 'My account', who: 'member', open: openMe },
  users: { title: 'Users', who: 'admin', open: openUsers, refresh: () => users.load(true) },
  desk: { title: 'Desk', who: 'staff', open: openDesk },
};
const sectionOf = name => $(`view-${name}`);
const allowed = (who = isPrivate && 'member') => !who || document.body.classList.contains(who);
function parse(address) {
  const [path, query] = address.replace(/^#?\/?/, '').split('?'), [name, id = ''] = path.split('/');
  return { name: Object.hasOwn(VIEWS, name) ? name : '', id, query: Object.fromEntries(new URLSearchParams(query)) };
}
let at = parse(''), entryKey = null, last = '', routes = 0;
const scrolled = new Map(); // by entry of the history: how far down
history.scrollRestoration = 'manual'; // a list must be drawn first
function setTitle() {
  const { query } = parse(location.hash), title = at.name === 'book' && shown?.title || VIEWS[at.name].title;
  document.title = `${query.search ? `“${query.search}” · ` : ''}${title} · Books`;
}
async function route(moved = false) {
  const from = at, turn = ++routes;
  scrolled.set(entryKey, scrollY);
  at = parse(location.hash);
  $('now').hidden = Object.keys(at.query).length > 0; // a search is about other books
  if (!history.state?.key) history.replaceState({ key: Date.now() + Math.random(), from: last }, '');
  [entryKey, last] = [history.state.key, location.hash];
  if (history.state.y != null) { scrolled.set(entryKey, history.state.y); history.replaceState({ ...history.state, y: null }, ''); }
  const view = VIEWS[at.name], place = allowed(view.who) ? at.name : 'invite', section = sectionOf(place);
  for (const other of all('main > section')) other.hidden = other !== section;
  for (const link of all('header nav a')) link.setAttribute('aria-current', parse(link.hash).name === at.name ? 'page' : 'false');
  if (at.name !== 'book') shown = held = null;
  if (place !== 'users') closeDialog('user');
  $('news').textContent = '';
  if (place !== 'invite') $('notice').textContent = ''; // there it says why one is no longer signed in
  if (moved) { closeDialog('account'); showLog(false); }
  setTitle();
  if (moved && !(from.name === at.name && from.id === at.id)) { // within a view, what has the focus keeps it
    scrollTo(0, scrolled.get(entryKey) ?? 0);
    const opener = from.name === 'book' && scrolled.has(entryKey) && section.querySelector(`[data-book="${from.id}"]`);
    (opener || section.querySelector('h2[tabindex]')).focus({ preventScroll: true });
  }
  await starting;
  if (turn !== routes || !allowed(view.who)) return;
  await view.open?.(at);
  if (turn === routes && scrolled.has(entryKey)) scrollTo(0, scrolled.get(entryKey));
}
addEventListener('pagehide', () => history.replaceState({ ...history.state, y: scrollY }, '')); // for a reload, and Back from another page
addEventListener('hashchange', () => route(true));
$('book-back').onclick = event => { if (history.state?.from) { event.preventDefault(); history.back(); } }; // to the list as it was
document.querySelector('.skip').onclick = event => { event.preventDefault(); $('main').focus(); }; // the view stays in the address
let refreshing = false, stale = false;
async function refreshAll() { // one at a time, at most once a second, and not all clients at the same moment
  stale = true;
  if (refreshing) return;
  for (refreshing = true; stale;) {
    await sleep(300 + Math.random() * 700);
    stale = false;
    if (allowed(VIEWS[at.name].who)) await Promise.resolve(VIEWS[at.name].refresh?.()).catch(() => {});
  }
  refreshing = false;
}
// --- live ----------------------------------------------------------------------------------------------------------
const TYPES = 'book.*,books.*,review.*,reviews.*,shelf.*,loan.*';
const ticker = document.querySelector('.ticker');
let lastId = null, connection = null, wake = () => {};
const TOLD = { // {book} is a link to it
  'book.created': 'New: {book} by {author}', 'book.updated': 'Changed: {book}', 'book.deleted': 'Gone: {title}',
  'book.stock': 'Copies of {book}: {available} of {copies} available', 'books.imported': 'Books that came in from a file: {count}',
  'books.updated': 'Books that changed: {count}', 'reviews.deleted': 'Reviews that are gone: {count}',
  'review.created': '{username} on {book} {stars}', 'review.updated': '{username} on {book} {stars}', 'review.deleted': 'A review of {book} is gone',
  'reviews.imported': 'Ratings and reviews that came in from a file: {count}',
  'shelf.created': 'You put {book} on {status}', 'shelf.updated': 'Your shelf: {book} is on {status}', 'shelf.deleted': 'You took {book} off your shelf',
  'shelf.imported': 'Books that went on your shelf: {count}', 'loan.created': 'You borrowed {book}, until {due}',
  'loan.renewed': 'You may keep {book} until {due}', 'loan.returned': 'You brought back {book}',
};
function sentence(type, { id, book_id = id, title, author, username = 'Somebody', rating, due_at, count, ...data }) {
  const parts = { ...data, username: bdi(username), title: bdi(title ?? ''), author: bdi(author ?? ''),
    book: linkTo(book_id, title ?? ''), stars: rating && stars(rating), due: due_at && day(due_at), count: count?.toLocaleString('en') };
  return TOLD[type].split(/\{(\w+)\}/).map((part, i) => i % 2 ? parts[part] : part);
}
function tell(type, data, at = new Date()) {
  if (!TOLD[type] || $('pause').checked) return;
  const before = ticker.firstChild, one = `${type} ${data.upload_id ?? data.user_id}`; // a file comes in many batches: one line
  if (data.count && before?.one === one) { data = { ...data, count: before.count + data.count }; before.remove(); }
  const today = at.toDateString() === new Date().toDateString();
  const time = () => el('time', { datetime: at.toISOString() }, today ? at.toLocaleTimeString('en', { timeStyle: 'short' })
    : at.toLocaleString('en', { day: 'numeric', month: 'short', hour: 'numeric', minute: '2-digit' }));
  ticker.prepend(Object.assign(el('li', {}, sentence(type, data), ' ', time()), { one, count: data.count }));
  $('latest').className = '';
  put($('latest'), sentence(type, data), ' ', time());
  if (ticker.children.length > 30) ticker.lastChild.remove();
}
function showLog(open) { $('log').hidden = !open; $('live-more').ariaExpanded = String(open); }
$('live-more').onclick = () => showLog($('log').hidden);
addEventListener('keydown', ({ key }) => { if (key === 'Escape') showLog(false); });
function heard(type, data) {
  if (type === 'book.deleted' && shown?.id === data.id) {
    show(bookView, problem({ detail: 'This book has just been deleted.' }));
    [shown, $('book-desk').hidden, mine.hidden] = [{}, true, true];
  }
  tell(type, data);
  refreshAll();
}
function watched(promise) { // a comment comes every 15 s: a connection that is silent for longer is dead, whatever the system says of it
  const watchdog = setTimeout(() => connection.abort(), 40000);
  return promise.finally(() => clearTimeout(watchdog));
}
async function* frames(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await watched(reader.read());
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) yield Object.fromEntries(block.split(/\r?\n/).map(line => line.match(/^([^:]*):? ?(.*)$/s).slice(1)));
  }
}
async function tellLately() { // so that the ticker does not begin empty: the latest changes, or books if the service has started since
  const { items } = await get(`events?limit=30&types=${TYPES}&after=${Math.max(0, lastId - 30)}`);
  for (const { id, type, data, at } of items) if (id <= lastId) tell(type, data, new Date(at)); // the stream has the rest
  if (ticker.children.length) return;
  const { items: books } = await get('books?sort=-created&limit=5');
  for (const book of books.reverse()) tell('book.created', book, new Date(book.created_at));
}
async function follow() {
  for (let tries = 0, pause = 2000; ;) {
    while (document.hidden || !allowed()) await new Promise(done => { wake = done; }); // browsers allow few connections: seen tabs need them
    const woken = new Promise(done => { wake = done; });
    connection = new AbortController();
    if (!ticker.children.length) await tellLately().catch(() => {});
    try {
      const answer = await watched(send(`stream?types=${TYPES},upload.*`, { signal: connection.signal, headers: lastId ? { 'Last-Event-ID': lastId } : {} }));
      for await (const { event, id, data, retry } of frames(answer)) {
        if (event === 'ready') { [tries, pause] = [0, Number(retry)]; online(true); }
        if (event === 'reset' || event && !lastId) { lastId = String(JSON.parse(data).head); refreshAll(); }
        else if (id) { lastId = id; heard(event, JSON.parse(data)); }
      }
    } catch (error) { if (!connection.signal.aborted && !error.errors && error.name !== 'TypeError') console.error(error); }
    if (connection.signal.reason === 'again') continue; // somebody signed in or out, or looks elsewhere
    online(false);
    await Promise.race([sleep(Math.min(pause * 2 ** tries++, 30000) * (0.5 + Math.random() / 2)), woken]);
  }
}
function online(on) { // only where it changes: else it is read aloud at each try
  $('live').classList.toggle('on', on);
  if ($('live').textContent !== (on ? 'connected' : 'reconnecting')) $('live').textContent = on ? 'connected' : 'reconnecting';
}
function reconnect() { connection?.abort('again'); wake(); }
document.addEventListener('visibilitychange', () => { if (document.hidden) connection?.abort('again'); else wake(); });
addEventListener('online', reconnect);
let lost = false; // whether something could not be read since the server was last there
function reachable(yes) {
  $('offline').hidden = yes;
  if (yes && lost) readAgain();
  lost = !yes;
}
function readAgain() { if (!me && localStorage.role) signedIn().catch(() => {}); else route(); }
$('retry').onclick = () => { reconnect(); readAgain(); };
// --- the start -----------------------------------------------------------------------------------------------------
$('hint').textContent = document.body.dataset.hint ?? '';
if (isPrivate) $('invite-why').textContent = 'This library shows its books to its members only.';
if (isPrivate) $('export').onclick = event => { event.preventDefault(); saveFile('books/export', 'books.csv'); };
const { book } = document.documentElement.dataset;
history.replaceState(history.state, '', book ? `#/book/${book}` : location.hash);
drawRole(localStorage.role);
const starting = localStorage.role ? signedIn().catch(error => { if (me) show($('main'), error); }) : null;
const opening = route();
if (sessionStorage.why) {
  $('notice').textContent = sessionStorage.why;
  $('main').focus();
  delete sessionStorage.why;
}
await Promise.all([opening, starting]);
follow();
