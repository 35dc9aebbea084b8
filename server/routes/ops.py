"""Operations: is the process alive, can the engine answer, what are its numbers."""

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from server.routes import Json, Served

router = APIRouter(tags=["operations"])


@router.get("/health")
def health() -> Json:
    """200 while the process answers, whatever the engine does."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(serving: Served) -> Json:
    """200 once the engine can answer, 503 before that and when it, or the server, is ending."""
    gateway, _ = serving.ready()
    gateway.check()
    return {"status": "ready", "base": serving.settings.base_name}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(serving: Served) -> Response:
    """Our series and vLLM's, for Prometheus."""
    await serving.metrics.look()
    return Response(generate_latest(serving.metrics), media_type=CONTENT_TYPE_LATEST)
