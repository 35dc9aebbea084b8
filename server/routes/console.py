"""The console at /: static files, which use the public API with the user's own key."""

from pathlib import Path

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parent.parent / "console"
# It shows what strangers uploaded: nothing but its own files may run or be asked for anything.
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # asked again, by its etag: an upgrade is seen at once
}
_FILES = {path.name: path for path in FOLDER.iterdir()}


@router.get("/")
def page() -> FileResponse:
    """The page."""
    return FileResponse(_FILES["index.html"], headers=HEADERS)


@router.get("/console/{file}")
def part(file: str) -> FileResponse:
    """What it is made of."""
    if file not in _FILES:
        raise HTTPException(404)
    return FileResponse(_FILES[file], headers=HEADERS)
