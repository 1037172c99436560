"""Loans keep the title of a deleted book; books remember whether they ever had copies."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"

TITLE = "book_id IS NOT NULL OR title IS NOT NULL"
SQLITE = {
    "book_id INTEGER NOT NULL": "book_id INTEGER",
    "REFERENCES book (id) ON DELETE CASCADE": "REFERENCES book (id) ON DELETE SET NULL",
    "CONSTRAINT ck_loan_quantity": f"CONSTRAINT ck_loan_title CHECK ({TITLE}), CONSTRAINT ck_loan_quantity",
}


def upgrade() -> None:
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    op.add_column("loan", sa.Column("title", sa.String(), nullable=True))
    if is_sqlite:
        change_definition()
    else:
        op.alter_column("loan", "book_id", nullable=True)
        op.drop_constraint(op.f("fk_loan_book_id"), "loan")
        op.create_foreign_key(op.f("fk_loan_book_id"), "loan", "book", ["book_id"], ["id"], ondelete="SET NULL")
        op.create_check_constraint(op.f("ck_loan_title"), "loan", TITLE)
    op.add_column("book", sa.Column("had_copies", sa.Boolean(), server_default=sa.false(), nullable=False))
    stocked = "json_extract(data, '$.id')" if is_sqlite else "CAST(data ->> 'id' AS integer)"
    op.execute(
        "UPDATE book SET had_copies = TRUE WHERE copies > 0 OR id IN (SELECT book_id FROM loan)"
        f" OR id IN (SELECT {stocked} FROM event WHERE type = 'book.stock')"
    )


def change_definition() -> None:
    """Change the stored definition of the table; see revision 0008."""
    connection = op.get_bind()
    version = connection.exec_driver_sql("PRAGMA schema_version").scalar_one()
    connection.exec_driver_sql("PRAGMA writable_schema = ON")
    of_table = "WHERE type = 'table' AND name = 'loan'"
    sql = connection.exec_driver_sql(f"SELECT sql FROM sqlite_master {of_table}").scalar_one()
    for old, new in SQLITE.items():
        if sql.count(old) != 1:
            raise RuntimeError(f"loan has no {old}")
        sql = sql.replace(old, new)
    connection.exec_driver_sql(f"UPDATE sqlite_master SET sql = ? {of_table}", (sql,))
    connection.exec_driver_sql(f"PRAGMA schema_version = {version + 1}")
    connection.exec_driver_sql("PRAGMA writable_schema = RESET")
