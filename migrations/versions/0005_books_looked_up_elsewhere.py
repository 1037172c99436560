"""Whether an upload is filled in from another catalogue."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("upload", sa.Column("enrich", sa.Boolean(), nullable=False, server_default=sa.false()))
