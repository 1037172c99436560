"""Count the attempts at an upload that ended with their process."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.add_column("upload", sa.Column("failed_attempts", sa.Integer(), nullable=False, server_default="0"))
