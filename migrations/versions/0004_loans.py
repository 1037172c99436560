"""Copies of books that people have taken home."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "loan",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("user_id", sa.Integer(), nullable=False),
        sa.Column("book_id", sa.Integer(), nullable=False),
        sa.Column("quantity", sa.Integer(), nullable=False),
        sa.Column("borrowed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("returned_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("renewals", sa.Integer(), nullable=False),
        sa.CheckConstraint("quantity > 0", name=op.f("ck_loan_quantity")),
        sa.CheckConstraint("due_at > borrowed_at", name=op.f("ck_loan_due_at")),
        sa.CheckConstraint("renewals BETWEEN 0 AND 2", name=op.f("ck_loan_renewals")),
        sa.ForeignKeyConstraint(["book_id"], ["book.id"], name=op.f("fk_loan_book_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["user_id"], ["user.id"], name=op.f("fk_loan_user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_loan")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_loan_book_id"), "loan", ["book_id"])
    op.create_index(op.f("ix_loan_user_id"), "loan", ["user_id"])
