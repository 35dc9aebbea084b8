"""The op in torch, for slots without a model."""

import pytest

from server.engine.cpu import op


@pytest.fixture
def form(monkeypatch: pytest.MonkeyPatch) -> op.Op:
    """In the place of whichever would be installed."""
    reference = op.Reference()
    monkeypatch.setattr(op, "install", lambda: reference)
    return reference
