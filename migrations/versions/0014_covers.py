"""Pictures of covers by ISBN, fetched from another host."""

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    big = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "cover",
        sa.Column("position", big, autoincrement=False, nullable=False),
        sa.Column("isbn", sa.String(length=13), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.Column("fetched_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("position", name="pk_cover"),
        sa.UniqueConstraint("isbn", name="uq_cover_isbn"),
    )
