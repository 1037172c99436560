"""The refresh token before the one that is good, for clients that try again; the address that a code went to."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("login_session", sa.Column("previous_hash", sa.String(length=64), nullable=True))
    op.add_column("one_time_code", sa.Column("email", sa.String(length=254), nullable=True))
