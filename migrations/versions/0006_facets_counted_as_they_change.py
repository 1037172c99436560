"""How many books each genre and language has, kept as they change; and the indexes of the lists that lacked one."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "facet",
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "name", name="pk_facet"),
    )
    op.create_index("ix_facet_name", "facet", ["kind", sa.text("lower(name)")])
    language = "lower(language)" if op.get_bind().dialect.name == "sqlite" else "(lower(language))"
    op.create_index("ix_book_language", "book", [sa.text(language)])
    some = sa.text("available > 0")
    op.create_index("ix_book_available", "book", ["id", "available"], sqlite_where=some, postgresql_where=some)
    op.create_index("ix_shelf_entry_user_id", "shelf_entry", ["user_id", "id"])
    for kind in ("genre", "language"):
        op.execute(f"INSERT INTO facet SELECT '{kind}', {kind}, count(*) FROM book WHERE {kind} IS NOT NULL GROUP BY 2")
    for statement in SQLITE if op.get_bind().dialect.name == "sqlite" else POSTGRESQL:
        op.get_bind().exec_driver_sql(statement)


MORE = """INSERT INTO facet SELECT kind, name, 1 FROM
       (SELECT 'genre' AS kind, new.genre AS name UNION ALL SELECT 'language', new.language) WHERE name IS NOT NULL
       ON CONFLICT (kind, name) DO UPDATE SET count = count + 1;"""
OLD = "(kind, name) IN (VALUES ('genre', old.genre), ('language', old.language))"
LESS = f"""UPDATE facet SET count = count - 1 WHERE {OLD};
       DELETE FROM facet WHERE count = 0 AND {OLD};"""
SQLITE = (
    f"CREATE TRIGGER facet_insert AFTER INSERT ON book BEGIN {MORE} END",
    f"CREATE TRIGGER facet_delete AFTER DELETE ON book BEGIN {LESS} END",
    f"CREATE TRIGGER facet_update AFTER UPDATE OF genre, language ON book BEGIN {MORE} {LESS} END",
)
# For all rows of a statement at once.
POSTGRESQL = (
    """CREATE FUNCTION count_facets() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
       IF TG_OP <> 'DELETE' THEN
         INSERT INTO facet SELECT kind, name, count(*) FROM added
           CROSS JOIN LATERAL (VALUES ('genre', genre), ('language', language)) AS told (kind, name)
           WHERE name IS NOT NULL GROUP BY kind, name
           ON CONFLICT (kind, name) DO UPDATE SET count = facet.count + excluded.count;
       END IF;
       IF TG_OP <> 'INSERT' THEN
         UPDATE facet SET count = facet.count - gone.count FROM
           (SELECT kind, name, count(*) FROM removed
             CROSS JOIN LATERAL (VALUES ('genre', genre), ('language', language)) AS told (kind, name)
             GROUP BY kind, name) AS gone
           WHERE facet.kind = gone.kind AND facet.name = gone.name;
         DELETE FROM facet WHERE count = 0;
       END IF;
       RETURN NULL;
       END $$""",
    """CREATE TRIGGER facet_insert AFTER INSERT ON book REFERENCING NEW TABLE AS added
       FOR EACH STATEMENT EXECUTE FUNCTION count_facets()""",
    """CREATE TRIGGER facet_delete AFTER DELETE ON book REFERENCING OLD TABLE AS removed
       FOR EACH STATEMENT EXECUTE FUNCTION count_facets()""",
    """CREATE TRIGGER facet_update AFTER UPDATE ON book REFERENCING NEW TABLE AS added OLD TABLE AS removed
       FOR EACH STATEMENT EXECUTE FUNCTION count_facets()""",
)
