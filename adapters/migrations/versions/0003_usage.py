"""What was used, by key and adapter, an hour each."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """From 0002."""
    op.create_table(
        "usage",
        sa.Column("hour", sa.DateTime, primary_key=True),
        sa.Column("key", sa.String(16), primary_key=True),
        sa.Column("adapter", sa.String(128), primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
    )
