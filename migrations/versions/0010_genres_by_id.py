"""PostgreSQL: index genres with the id, the order of their pages, which it sorted. SQLite's indexes have the id."""

from alembic import op
from sqlalchemy import text

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.drop_index("ix_book_genre", "book")
        op.create_index("ix_book_genre", "book", [text("lower(genre)"), "id"])
