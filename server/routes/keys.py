"""API keys: create, list, show, rotate, revoke."""

from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Body
from pydantic import BaseModel, ConfigDict, Field

from adapters.names import ANY
from server.keys import Limits
from server.routes import Json, Served

router = APIRouter(prefix="/v1/keys", tags=["keys"])

LAST = 253402300799  # of the year 9999, the last that a datetime has
Limit = Annotated[int | None, Field(ge=1, le=2**63 - 1)]


class KeyRequest(BaseModel):
    """Body of POST /v1/keys."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="For people: who or what it is for.", max_length=128)
    scopes: list[Literal["infer", "adapters:read", "adapters:write", "admin"]] = Field(
        min_length=1, description="What it may do; admin is all of it, on every adapter."
    )
    adapters: list[str] = Field(
        default=[ANY],
        min_length=1,
        max_length=100,
        description="Names that it may use; * stands for any text, `base` for the base model.",
        examples=[["base", "team-a.*"]],
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Its share against other keys that call the same adapter.",
    )
    requests_per_minute: Limit = Field(
        default=None, description="Calls that only read (GET) count for no limit."
    )
    tokens_per_minute: Limit = Field(default=None, description="Of prompts and replies.")
    concurrent_requests: Limit = None
    stored_bytes: Limit = Field(default=None, description="Of all versions that it uploads.")
    expires: int | None = Field(
        default=None, ge=0, le=LAST, description="Seconds since the epoch; null: never."
    )


@router.post("", status_code=201)
def create(asked: KeyRequest, serving: Served) -> Json:
    """A new key; `key` is what to send with requests, and is shown this once."""
    limits = Limits(
        asked.requests_per_minute,
        asked.tokens_per_minute,
        asked.concurrent_requests,
        asked.stored_bytes,
    )
    key, token = serving.keys.create(
        asked.name,
        tuple(asked.scopes),
        tuple(asked.adapters),
        asked.weight,
        limits,
        _moment(asked.expires),
    )
    return key.as_dict() | {"key": token}


@router.get("")
def every(serving: Served) -> Json:
    """All keys, oldest first, with those that hold no more."""
    return {"object": "list", "data": [key.as_dict() for key in serving.keys.list()]}


@router.get("/{id}")
def show(id: str, serving: Served) -> Json:
    """One key."""
    return serving.keys.get(id).as_dict()


@router.delete("/{id}")
def revoke(id: str, serving: Served) -> Json:
    """Revokes a key: requests with it are refused from now on, and those that run go on."""
    return serving.keys.revoke(id).as_dict()


@router.post("/{id}/rotate")
def rotate(
    id: str,
    serving: Served,
    grace_s: Annotated[
        float,
        Body(embed=True, ge=0, le=30 * 86400, description="Seconds that the old one holds yet."),
    ] = 0.0,
) -> Json:
    """Another `key` for the same id."""
    key, token = serving.keys.rotate(id, grace_s)
    return key.as_dict() | {"key": token}


def _moment(seconds: int | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
