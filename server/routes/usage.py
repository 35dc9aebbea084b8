"""What was used: requests and tokens by API key and adapter, an hour each."""

import time
from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse

from server.routes import Served
from server.routes.keys import LAST
from server.usage import as_csv

router = APIRouter(prefix="/v1/usage", tags=["operations"])

DAY_S = 86400
Moment = Annotated[int | None, Query(ge=0, le=LAST, description="Seconds since the epoch.")]


@router.get("", responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}})
def used(
    serving: Served,
    since: Moment = None,
    until: Moment = None,
    format: Annotated[Literal["json", "csv"], Query(description="What to answer.")] = "json",
) -> Response:
    """Requests and tokens by key and adapter, in the hours that begin from `since` (a day ago) to
    `until` (now)."""
    serving.usage.flush()
    end = int(time.time()) + 1 if until is None else until
    begin = max(0, end - DAY_S) if since is None else since
    rows = serving.usage.read(datetime.fromtimestamp(begin, UTC), datetime.fromtimestamp(end, UTC))
    if format == "csv":
        return StreamingResponse(as_csv(rows), media_type="text/csv")
    return JSONResponse({"object": "list", "data": [row.as_dict() for row in rows]})
