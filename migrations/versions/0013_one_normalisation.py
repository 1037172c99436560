"""Index and compare on both databases what `models` has normalized: words of search, genres and languages."""

import sqlalchemy as sa
from alembic import op

from models import AUTHOR_ORDER, TITLE_ORDER, facet_key, word_key

revision = "0013"
down_revision = "0012"

BATCH = 5000
sort_key = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    connection = op.get_bind()
    is_sqlite = connection.dialect.name == "sqlite"
    for statement in DROP_SQLITE if is_sqlite else DROP_POSTGRESQL:
        connection.exec_driver_sql(statement)
    for name in ("title_key", "author_key", "genre", "language"):
        op.drop_index(f"ix_book_{name}", "book")
    op.drop_table("facet")
    op.add_column("book", sa.Column("publisher_key", sa.String(), nullable=True))
    op.add_column("book", sa.Column("genre_key", sort_key, nullable=True))
    op.add_column("book", sa.Column("language_key", sort_key, nullable=True))
    _write_keys(connection)

    title, author = (text if is_sqlite else f"({text})" for text in (TITLE_ORDER, AUTHOR_ORDER))
    op.create_index("ix_book_title_key", "book", [sa.text(title), sa.text(author)])
    op.create_index("ix_book_author_key", "book", [sa.text(author)])
    # By the id, the order of pages; SQLite's indexes have it.
    op.create_index("ix_book_genre", "book", ["genre_key"] if is_sqlite else ["genre_key", "id"])
    op.create_index("ix_book_language", "book", ["language_key"])
    op.create_table(
        "facet",
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("key", sort_key, nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "key", name="pk_facet"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_facet_count", "facet", ["kind", sa.text("count DESC"), "key"])
    for kind in ("genre", "language"):
        counted = f"SELECT '{kind}', {kind}_key, count(*) FROM book WHERE {kind}_key IS NOT NULL GROUP BY 2"
        op.execute(f"INSERT INTO facet {counted}")
    for statement in SQLITE if is_sqlite else POSTGRESQL:
        connection.exec_driver_sql(statement)


def _write_keys(connection: sa.Connection) -> None:
    last = 0
    columns = "id, title, author, publisher, genre, language"
    books = sa.text(f"SELECT {columns} FROM book WHERE id > :last ORDER BY id LIMIT :n")
    update = sa.text(
        "UPDATE book SET title_key = :title_key, author_key = :author_key, publisher_key = :publisher_key,"
        " genre_key = :genre_key, language_key = :language_key WHERE id = :id"
    )
    while rows := connection.execute(books, {"last": last, "n": BATCH}).all():
        last = rows[-1].id
        keys = [
            {
                "id": row.id,
                "title_key": word_key(row.title),
                "author_key": word_key(row.author),
                "publisher_key": row.publisher and word_key(row.publisher),
                "genre_key": facet_key(row.genre),
                "language_key": facet_key(row.language),
            }
            for row in rows
        ]
        connection.execute(update, keys)


MORE = """INSERT INTO facet SELECT kind, key, 1 FROM
       (SELECT 'genre' AS kind, new.genre_key AS key UNION ALL SELECT 'language', new.language_key)
       WHERE key IS NOT NULL ON CONFLICT (kind, key) DO UPDATE SET count = count + 1;"""
# With `(kind, key) IN (VALUES ...)`, SQLite went through all genres: 70 ms for 300,000.
OLD = "(kind = 'genre' AND key = old.genre_key OR kind = 'language' AND key = old.language_key)"
LESS = f"""UPDATE facet SET count = count - 1 WHERE {OLD};
       DELETE FROM facet WHERE count = 0 AND {OLD};"""
DROP_SQLITE = (
    *(f"DROP TRIGGER {name}" for name in ("book_fts_update", "book_fts_delete")),
    *(f"DROP TRIGGER facet_{name}" for name in ("insert", "update", "delete")),
    "DROP TABLE book_fts",
)
# The keys are words with spaces between, and the tokenizer splits nothing else: both databases have the same words.
# Nothing reads the sizes of the columns, which the ranking by bm25() would.
SQLITE = (
    """CREATE VIRTUAL TABLE book_fts USING fts5(title_key, author_key, isbn, publisher_key,
       content='book', content_rowid='id', tokenize='ascii', columnsize=0)""",
    "INSERT INTO book_fts (book_fts) VALUES ('rebuild')",
    """CREATE TRIGGER book_fts_update AFTER UPDATE OF title_key, author_key, isbn, publisher_key ON book BEGIN
       INSERT INTO book_fts (book_fts, rowid, title_key, author_key, isbn, publisher_key)
         VALUES ('delete', old.id, old.title_key, old.author_key, old.isbn, old.publisher_key);
       INSERT INTO book_fts (rowid, title_key, author_key, isbn, publisher_key)
         VALUES (new.id, new.title_key, new.author_key, new.isbn, new.publisher_key);
       END""",
    """CREATE TRIGGER book_fts_delete AFTER DELETE ON book BEGIN
       INSERT INTO book_fts (book_fts, rowid, title_key, author_key, isbn, publisher_key)
         VALUES ('delete', old.id, old.title_key, old.author_key, old.isbn, old.publisher_key);
       END""",
    f"CREATE TRIGGER facet_insert AFTER INSERT ON book BEGIN {MORE} END",
    f"CREATE TRIGGER facet_delete AFTER DELETE ON book BEGIN {LESS} END",
    f"CREATE TRIGGER facet_update AFTER UPDATE OF genre_key, language_key ON book BEGIN {MORE} {LESS} END",
)
DROP_POSTGRESQL = (
    *(f"DROP TRIGGER facet_{name} ON book" for name in ("insert", "update", "delete")),
    "DROP FUNCTION count_facets()",
    "ALTER TABLE book DROP COLUMN words, DROP COLUMN title_words",
    "DROP FUNCTION book_words(text, text, text, text)",
    "DROP FUNCTION marked_tokens(text, text)",
    "DROP FUNCTION book_tokens(text)",
    "DROP FUNCTION book_text(text)",
)
POSTGRESQL = (
    """CREATE FUNCTION marked_tokens(mark text, words text) RETURNS text[] LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
       SELECT coalesce(array_agg(word), '{}') || coalesce(array_agg(mark || word), '{}')
         FROM unnest(string_to_array(words, ' ')) AS word
       $$""",
    """CREATE FUNCTION book_words(title text, author text, isbn text, publisher text) RETURNS tsvector
       LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
       SELECT array_to_tsvector(marked_tokens(':t', title) || marked_tokens(':a', author)
         || string_to_array(isbn, ' ') || marked_tokens(':p', publisher))
       $$""",
    """ALTER TABLE book ADD COLUMN words tsvector
       GENERATED ALWAYS AS (book_words(title_key, author_key, isbn, publisher_key)) STORED""",
    "CREATE INDEX ix_book_words ON book USING gin (words) WITH (gin_pending_list_limit = 512)",
    """CREATE FUNCTION count_facets() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
       IF TG_OP = 'UPDATE' THEN
         PERFORM genre_key, language_key FROM added EXCEPT ALL SELECT genre_key, language_key FROM removed;
         IF NOT FOUND THEN RETURN NULL; END IF;
       END IF;
       IF TG_OP <> 'DELETE' THEN
         INSERT INTO facet SELECT facets.kind, facets.key, count(*) FROM added
           CROSS JOIN LATERAL (VALUES ('genre', genre_key), ('language', language_key)) AS facets (kind, key)
           WHERE facets.key IS NOT NULL GROUP BY facets.kind, facets.key
           ON CONFLICT (kind, key) DO UPDATE SET count = facet.count + excluded.count;
       END IF;
       IF TG_OP <> 'INSERT' THEN
         UPDATE facet SET count = facet.count - gone.count FROM
           (SELECT facets.kind, facets.key, count(*) FROM removed
             CROSS JOIN LATERAL (VALUES ('genre', genre_key), ('language', language_key)) AS facets (kind, key)
             GROUP BY facets.kind, facets.key) AS gone
           WHERE facet.kind = gone.kind AND facet.key = gone.key;
         DELETE FROM facet WHERE kind IN ('genre', 'language') AND count = 0;
       END IF;
       RETURN NULL;
       END $$""",
    *(
        f"""CREATE TRIGGER facet_{operation} AFTER {operation} ON book REFERENCING {tables}
       FOR EACH STATEMENT EXECUTE FUNCTION count_facets()"""
        for operation, tables in (
            ("insert", "NEW TABLE AS added"),
            ("delete", "OLD TABLE AS removed"),
            ("update", "NEW TABLE AS added OLD TABLE AS removed"),
        )
    ),
)
