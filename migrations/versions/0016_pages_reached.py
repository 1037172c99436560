"""The page that a reader has reached in a book on the shelf."""

from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    # Not `add_column`: SQLite would rebuild the table for the constraint.
    op.execute(
        "ALTER TABLE shelf_entry ADD COLUMN page INTEGER"
        " CONSTRAINT ck_shelf_entry_page CHECK (page BETWEEN 0 AND 100000)"
    )
