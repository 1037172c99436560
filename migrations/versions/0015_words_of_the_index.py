"""List the words of the search index, in which `suggestions` are found: `word.term`.

SQLite reads them from the index itself. On PostgreSQL, which can't list what a GIN index holds, triggers add to a
table. Words that no book has any more stay: to look for other books with each word of an old title took 0.2 s at
100,000 books.
"""

from alembic import op

revision = "0015"
down_revision = "0014"

SQLITE = ("CREATE VIRTUAL TABLE word USING fts5vocab(book_fts, 'row')",)
# `book.words` also has words behind marks like `:t`.
POSTGRESQL = (
    'CREATE TABLE word (term text COLLATE "C" PRIMARY KEY)',
    """CREATE FUNCTION plain_words(words tsvector) RETURNS SETOF text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
       SELECT word FROM unnest(tsvector_to_array(words)) AS word WHERE NOT starts_with(word, ':')
       $$""",
    "INSERT INTO word SELECT DISTINCT plain_words(words) FROM book",
    """CREATE FUNCTION add_words() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
       INSERT INTO word SELECT DISTINCT plain_words(words) FROM added ON CONFLICT DO NOTHING;
       RETURN NULL;
       END $$""",
    """CREATE FUNCTION add_words_of_row() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
       INSERT INTO word SELECT plain_words(new.words) ON CONFLICT DO NOTHING;
       RETURN NULL;
       END $$""",
    """CREATE TRIGGER word_insert AFTER INSERT ON book REFERENCING NEW TABLE AS added
       FOR EACH STATEMENT EXECUTE FUNCTION add_words()""",
    """CREATE TRIGGER word_update AFTER UPDATE OF title_key, author_key, isbn, publisher_key ON book
       FOR EACH ROW WHEN (old.words IS DISTINCT FROM new.words) EXECUTE FUNCTION add_words_of_row()""",
)


def upgrade() -> None:
    connection = op.get_bind()
    for statement in SQLITE if connection.dialect.name == "sqlite" else POSTGRESQL:
        connection.exec_driver_sql(statement)
