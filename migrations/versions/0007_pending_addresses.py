"""Add pending e-mail addresses. Remove links that undo a change of address, and settings that are no longer used."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("user", sa.Column("pending_email", sa.String(length=254), nullable=True))
    op.create_index("ix_user_pending_email", "user", ["pending_email"])
    op.execute(
        "DELETE FROM one_time_code WHERE purpose = 'verify_email'"
        ' AND email <> (SELECT email FROM "user" WHERE "user".id = user_id)'
    )
    # Links from before revision 0002 have no address: it was the user's.
    op.execute(
        'UPDATE one_time_code SET email = (SELECT email FROM "user" WHERE "user".id = user_id) WHERE email IS NULL'
    )
    op.execute("DELETE FROM setting WHERE key IN ('open_hash', 'last_start', 'last_pruning', 'last_sweep')")
