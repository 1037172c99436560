"""The first tables, the search index and what keeps it true."""

import time

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


sort_key = sa.String().with_variant(sa.String(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "setting",
        sa.Column("key", sa.String(length=50), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_setting")),
    )
    op.create_table(
        "user",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("username", sa.String(length=50), nullable=False),
        sa.Column("email", sa.String(length=254), nullable=False),
        sa.Column("password_hash", sa.String(length=255), nullable=False),
        sa.Column("full_name", sa.String(length=100), nullable=True),
        sa.Column("role", sa.String(length=20), nullable=False),
        sa.Column("is_active", sa.Boolean(), nullable=False),
        sa.Column("email_verified_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("role IN ('reader', 'librarian', 'admin')", name=op.f("ck_user_role")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_user")),
        sa.UniqueConstraint("email", name=op.f("uq_user_email")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "book",
        sa.Column("title", sa.String(), nullable=False),
        sa.Column("author", sa.String(), nullable=False),
        sa.Column("genre", sa.String(), nullable=True),
        sa.Column("description", sa.String(), nullable=True),
        sa.Column("publisher", sa.String(), nullable=True),
        sa.Column("language", sa.String(), nullable=True),
        sa.Column("pages", sa.Integer(), nullable=True),
        sa.Column("price", sa.Integer(), nullable=True),
        sa.Column("cover_url", sa.String(), nullable=True),
        sa.Column("published_date", sa.Date(), nullable=True),
        sa.Column("publication_year", sa.Integer(), nullable=True),
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("isbn", sa.String(), nullable=True),
        sa.Column("title_key", sort_key, nullable=False),
        sa.Column("author_key", sort_key, nullable=False),
        sa.Column("copies", sa.Integer(), nullable=False),
        sa.Column("available", sa.Integer(), nullable=False),
        sa.Column("rating_count", sa.Integer(), nullable=False),
        sa.Column("rating_sum", sa.Integer(), nullable=False),
        sa.Column("added_by", sa.Integer(), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("available BETWEEN 0 AND copies", name=op.f("ck_book_available")),
        sa.CheckConstraint("copies >= 0", name=op.f("ck_book_copies")),
        sa.CheckConstraint("length(author) > 0", name=op.f("ck_book_author")),
        sa.CheckConstraint("length(isbn) = 13", name=op.f("ck_book_isbn")),
        sa.CheckConstraint("length(title) > 0", name=op.f("ck_book_title")),
        sa.CheckConstraint("pages > 0", name=op.f("ck_book_pages")),
        sa.CheckConstraint("price >= 0", name=op.f("ck_book_price")),
        sa.CheckConstraint("publication_year BETWEEN -5000 AND 9999", name=op.f("ck_book_publication_year")),
        sa.CheckConstraint("rating_sum BETWEEN rating_count AND 5 * rating_count", name=op.f("ck_book_rating")),
        sa.ForeignKeyConstraint(["added_by"], ["user.id"], name=op.f("fk_book_added_by"), ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_book")),
        sa.UniqueConstraint("isbn", name=op.f("uq_book_isbn")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_book_added_by"), "book", ["added_by"])
    op.create_index("ix_book_author_key", "book", ["author_key"])
    op.create_index("ix_book_title_key", "book", ["title_key", "author_key"])

    op.create_table(
        "event",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("type", sa.String(length=50), nullable=False),
        sa.Column("private", sa.Boolean(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=True),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["user.id"], name=op.f("fk_event_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_event")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_event_user_id"), "event", ["user_id"])

    op.create_table(
        "login_session",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("refresh_hash", sa.String(length=64), nullable=False),
        sa.Column("user_agent", sa.String(length=200), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["user.id"], name=op.f("fk_login_session_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_login_session")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_login_session_user_id"), "login_session", ["user_id"])

    op.create_table(
        "one_time_code",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("purpose", sa.String(length=20), nullable=False),
        sa.Column("code_hash", sa.String(length=64), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("purpose IN ('verify_email', 'reset_password')", name=op.f("ck_one_time_code_purpose")),
        sa.CheckConstraint("attempts >= 0", name=op.f("ck_one_time_code_attempts")),
        sa.ForeignKeyConstraint(["user_id"], ["user.id"], name=op.f("fk_one_time_code_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_one_time_code")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_one_time_code_code_hash"), "one_time_code", ["code_hash"])
    op.create_index(op.f("ix_one_time_code_user_id"), "one_time_code", ["user_id"])

    op.create_table(
        "upload",
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("inserted", sa.Integer(), nullable=False),
        sa.Column("updated", sa.Integer(), nullable=False),
        sa.Column("skipped", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("warnings", sa.Integer(), nullable=False),
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("filename", sa.String(length=255), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("progress", sa.Float(), nullable=False),
        sa.Column("ignored_columns", sa.JSON(), nullable=False),
        sa.Column("error", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "status IN ('queued', 'processing', 'completed', 'failed', 'cancelled')", name=op.f("ck_upload_status")
        ),
        sa.CheckConstraint("progress BETWEEN 0 AND 1", name=op.f("ck_upload_progress")),
        sa.CheckConstraint("rows = inserted + updated + skipped + failed", name=op.f("ck_upload_rows")),
        sa.ForeignKeyConstraint(["user_id"], ["user.id"], name=op.f("fk_upload_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_upload")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_upload_status"), "upload", ["status"])
    op.create_index(op.f("ix_upload_user_id"), "upload", ["user_id"])

    op.create_table(
        "shelf_entry",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("book_id", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("rating", sa.Integer(), nullable=True),
        sa.Column("review", sa.String(), nullable=True),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("added_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "(rating IS NULL AND review IS NULL) OR status IN ('completed', 'abandoned')",
            name=op.f("ck_shelf_entry_review"),
        ),
        sa.CheckConstraint(
            "status IN ('wishlist', 'reading', 'completed', 'abandoned')", name=op.f("ck_shelf_entry_status")
        ),
        sa.CheckConstraint("rating BETWEEN 1 AND 5", name=op.f("ck_shelf_entry_rating")),
        sa.ForeignKeyConstraint(["book_id"], ["book.id"], name=op.f("fk_shelf_entry_book_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["user_id"], ["user.id"], name=op.f("fk_shelf_entry_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_shelf_entry")),
        sa.UniqueConstraint("user_id", "book_id", name="uq_shelf_entry_book_id"),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_shelf_entry_book_id"), "shelf_entry", ["book_id"])

    op.create_table(
        "upload_chunk",
        sa.Column("upload_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["upload_id"], ["upload.id"], name=op.f("fk_upload_chunk_upload_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("upload_id", "number", name=op.f("pk_upload_chunk")),
    )
    op.create_table(
        "upload_error",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("upload_id", sa.Integer(), nullable=False),
        sa.Column("row", sa.Integer(), nullable=False),
        sa.Column("severity", sa.String(length=10), nullable=False),
        sa.Column("field", sa.String(length=100), nullable=True),
        sa.Column("value", sa.String(), nullable=True),
        sa.Column("message", sa.String(), nullable=False),
        sa.CheckConstraint("severity IN ('error', 'warning')", name=op.f("ck_upload_error_severity")),
        sa.ForeignKeyConstraint(
            ["upload_id"], ["upload.id"], name=op.f("fk_upload_error_upload_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_upload_error")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_upload_error_upload_id"), "upload_error", ["upload_id"])

    for name, table, expression in (
        ("uq_user_username", "user", "lower(username)"),
        ("ix_book_year", "book", "coalesce(publication_year, -32768)"),
        (
            "ix_book_score",
            "book",
            "CASE WHEN rating_count = 0 THEN 0.0 ELSE (rating_sum + 30.0) / (rating_count + 10) END",
        ),
        ("ix_book_genre", "book", "lower(genre)"),
    ):
        text = f"({expression})" if op.get_bind().dialect.name == "postgresql" else expression
        op.create_index(name, table, [sa.text(text)], unique=name.startswith("uq_"))

    # Event ids start at this moment in milliseconds: ids from a database that was wiped lie before the new log.
    start = int(time.time() * 1000)
    op.execute(f"INSERT INTO setting (key, value) VALUES ('event_floor', '{start}'), ('book_count', '0')")
    if op.get_bind().dialect.name == "sqlite":
        op.execute(f"INSERT INTO sqlite_sequence (name, seq) VALUES ('event', {start})")
    else:
        op.execute(f"ALTER SEQUENCE event_id_seq RESTART WITH {start + 1}")
    for statement in SQLITE if op.get_bind().dialect.name == "sqlite" else POSTGRESQL:
        op.get_bind().exec_driver_sql(statement)


# The index reads its text from `book`, and stores only the words. Rows are added to it by search.index_books, many at
# once, which is three times as fast as a trigger for each.
SQLITE = (
    """CREATE VIRTUAL TABLE book_fts USING fts5(title, author, isbn, publisher, content='book', content_rowid='id',
       tokenize='unicode61 remove_diacritics 2')""",
    """CREATE TRIGGER book_fts_update AFTER UPDATE OF title, author, isbn, publisher ON book BEGIN
       INSERT INTO book_fts (book_fts, rowid, title, author, isbn, publisher)
         VALUES ('delete', old.id, old.title, old.author, old.isbn, old.publisher);
       INSERT INTO book_fts (rowid, title, author, isbn, publisher)
         VALUES (new.id, new.title, new.author, new.isbn, new.publisher);
       END""",
    """CREATE TRIGGER book_fts_delete AFTER DELETE ON book BEGIN
       INSERT INTO book_fts (book_fts, rowid, title, author, isbn, publisher)
         VALUES ('delete', old.id, old.title, old.author, old.isbn, old.publisher);
       END""",
    # The total of all books, so that no page has to count them.
    """CREATE TRIGGER book_count_insert AFTER INSERT ON book BEGIN
       UPDATE setting SET value = value + 1 WHERE key = 'book_count';
       END""",
    """CREATE TRIGGER book_count_delete AFTER DELETE ON book BEGIN
       UPDATE setting SET value = value - 1 WHERE key = 'book_count';
       END""",
)

# A word is a run of letters and digits without case and accents, as the index of SQLite has it; those of title, author
# and publisher stand there once more with a mark. PostgreSQL's own parser would take `a.b` for a host and `-1` for a
# number.
POSTGRESQL = (
    r"""CREATE FUNCTION book_text(told text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
       SELECT trim(regexp_replace(lower(regexp_replace(
         normalize(coalesce(told, ''), NFKD), U&'[\0300-\036F]', '', 'g') COLLATE "und-x-icu"),
         '[^[:alnum:]]+', ' ', 'g'))
       $$""",
    """CREATE FUNCTION book_tokens(told text) RETURNS text[] LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
       SELECT array_remove(string_to_array(book_text(told), ' '), '')
       $$""",
    """CREATE FUNCTION marked_tokens(mark text, told text) RETURNS text[] LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
       SELECT coalesce(array_agg(word), '{}') || coalesce(array_agg(mark || word), '{}')
         FROM unnest(book_tokens(told)) AS word
       $$""",
    """CREATE FUNCTION book_words(title text, author text, isbn text, publisher text) RETURNS tsvector
       LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
       SELECT array_to_tsvector(marked_tokens('t:', title) || marked_tokens('a:', author) || book_tokens(isbn)
         || marked_tokens('p:', publisher))
       $$""",
    """ALTER TABLE book ADD COLUMN words tsvector
       GENERATED ALWAYS AS (book_words(title, author, isbn, publisher)) STORED""",
    """ALTER TABLE book ADD COLUMN title_words text COLLATE "C"
       GENERATED ALWAYS AS (book_text(title)) STORED""",
    "CREATE INDEX ix_book_words ON book USING gin (words)",
    "CREATE INDEX ix_book_title_words ON book (title_words)",
    """CREATE FUNCTION count_books() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
       UPDATE setting SET value = value::bigint + CASE TG_OP WHEN 'INSERT' THEN 1 ELSE -1 END
         * (SELECT count(*) FROM changed) WHERE key = 'book_count';
       RETURN NULL;
       END $$""",
    """CREATE TRIGGER book_count_insert AFTER INSERT ON book REFERENCING NEW TABLE AS changed
       FOR EACH STATEMENT EXECUTE FUNCTION count_books()""",
    """CREATE TRIGGER book_count_delete AFTER DELETE ON book REFERENCING OLD TABLE AS changed
       FOR EACH STATEMENT EXECUTE FUNCTION count_books()""",
)
