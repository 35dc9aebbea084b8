"""Adapters, versions, aliases; takes over databases from before schemas were numbered."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")
# What the versions of the numberless schemas had not from the beginning.
_LATER: dict[str, Any] = {"reason": sa.Text, "pinned": sa.Boolean, "lasting": sa.Boolean}


def upgrade() -> None:
    """From nothing, or from what there was."""
    inspector = sa.inspect(op.get_bind())
    if not inspector.has_table("adapters"):
        _create()
        return
    there = {column["name"] for column in inspector.get_columns("versions")}
    for name, kind in _LATER.items():
        if name not in there:
            op.add_column("versions", sa.Column(name, kind))


def _create() -> None:
    op.create_table(
        "adapters",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("name", sa.String(128), nullable=False, unique=True),
        sa.Column("deleted", sa.Boolean, nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "versions",
        sa.Column("id", _ID, primary_key=True),
        sa.Column("adapter_id", _ID, sa.ForeignKey("adapters.id"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(71), nullable=False, index=True),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("alpha", sa.Double, nullable=False),
        sa.Column("rslora", sa.Boolean, nullable=False),
        sa.Column("target_modules", sa.JSON, nullable=False),
        sa.Column("dtype", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("parameters", sa.BigInteger, nullable=False),
        sa.Column("base_model", sa.Text),
        sa.Column("source", sa.Text, nullable=False, index=True),
        sa.Column("checks", sa.JSON, nullable=False),
        sa.Column("algebra", sa.JSON, nullable=False),
        *(sa.Column(name, kind) for name, kind in _LATER.items()),
        sa.UniqueConstraint("adapter_id", "number"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "aliases",
        sa.Column("adapter_id", _ID, sa.ForeignKey("adapters.id"), primary_key=True),
        sa.Column("alias", sa.String(128), primary_key=True),
        sa.Column("number", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id", "number"], ["versions.adapter_id", "versions.number"]
        ),
    )
