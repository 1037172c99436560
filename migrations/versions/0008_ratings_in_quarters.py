"""Ratings in quarters and on any shelf; indexes of the orders by `added_at` and by ascending year; hints of uploads."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

RATING = "rating BETWEEN 0.25 AND 5 AND rating * 4 = round(rating * 4)"
RATING_SUM = "rating_sum BETWEEN 0.25 * rating_count AND 5 * rating_count"
# Of revision 0001.
NO_OPINION = "(rating IS NULL AND review IS NULL) OR status IN ('completed', 'abandoned')"
SQLITE = {
    "shelf_entry": {
        "rating INTEGER": "rating NUMERIC",
        "CHECK (rating BETWEEN 1 AND 5)": f"CHECK ({RATING})",
        f"CONSTRAINT ck_shelf_entry_review CHECK ({NO_OPINION}),": "",
    },
    "book": {
        "rating_sum INTEGER": "rating_sum NUMERIC",
        "CHECK (rating_sum BETWEEN rating_count AND 5 * rating_count)": f"CHECK ({RATING_SUM})",
    },
}


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        change_definitions()
    else:
        op.drop_constraint(op.f("ck_shelf_entry_review"), "shelf_entry")
        for table, column, name, condition in (
            ("shelf_entry", "rating", "ck_shelf_entry_rating", RATING),
            ("book", "rating_sum", "ck_book_rating", RATING_SUM),
        ):
            op.drop_constraint(op.f(name), table)
            op.alter_column(table, column, type_=sa.Numeric())
            op.create_check_constraint(op.f(name), table, condition)
    op.drop_index("ix_shelf_entry_user_id", "shelf_entry")
    op.create_index("ix_shelf_entry_added_at", "shelf_entry", ["user_id", "added_at", "id"])
    year = "coalesce(publication_year, 32768)"
    year = year if op.get_bind().dialect.name == "sqlite" else f"({year})"
    op.create_index("ix_book_year_ascending", "book", [sa.text(year)])
    op.add_column("upload", sa.Column("hint", sa.String(), nullable=True))


def change_definitions() -> None:
    """Change constraints and types in the stored definitions, as https://www.sqlite.org/lang_altertable.html#otheralter
    describes it: whole numbers are stored the same in INTEGER and NUMERIC columns. Nothing is copied, so that triggers,
    indexes, rows that refer to these tables and `sqlite_sequence` stay as they are.
    """
    connection = op.get_bind()
    version = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
    connection.exec_driver_sql("PRAGMA writable_schema = ON")
    for table, changes in SQLITE.items():
        of_table = "FROM sqlite_master WHERE type = 'table' AND name = ?"
        sql = connection.exec_driver_sql(f"SELECT sql {of_table}", (table,)).scalar_one()
        for old, new in changes.items():
            if old not in sql:
                raise RuntimeError(f"{table} has no {old}")
            sql = sql.replace(old, new)
        connection.exec_driver_sql("UPDATE sqlite_master SET sql = ? WHERE type = 'table' AND name = ?", (sql, table))
    connection.exec_driver_sql(f"PRAGMA schema_version = {version + 1}")
    connection.exec_driver_sql("PRAGMA writable_schema = RESET")
