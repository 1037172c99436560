"""What an upload is asked to do, what was found in it, and refused rows as they came."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    for column in (
        sa.Column("shelve", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("on_duplicate", sa.String(length=10), nullable=False, server_default="skip"),
        sa.Column("dry_run", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("format", sa.String(length=20), nullable=True),
        sa.Column("encoding", sa.String(length=20), nullable=True),
        sa.Column("delimiter", sa.String(length=1), nullable=True),
        sa.Column("header", sa.JSON(), nullable=True),
        sa.Column("worker", sa.String(length=20), nullable=True),
    ):
        op.add_column("upload", column)
    op.add_column("upload_error", sa.Column("cells", sa.JSON(), nullable=True))
