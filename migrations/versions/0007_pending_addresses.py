"""A new e-mail address waits for its confirmation. Links that undo a change are gone, and settings
that are not used any more."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("user", sa.Column("pending_email", sa.String(length=254), nullable=True))
    op.create_index("ix_user_pending_email", "user", ["pending_email"])
    op.execute(
        "DELETE FROM one_time_code WHERE purpose = 'verify_email' AND email IS NOT NULL"
        ' AND email <> (SELECT email FROM "user" WHERE "user".id = user_id)'
    )
    op.execute("DELETE FROM setting WHERE key IN ('open_hash', 'last_start', 'last_pruning', 'last_sweep')")
