"""Inference: the OpenAI and Anthropic protocols, answered by vLLM's handlers."""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from adapters.errors import AdapterError
from server.engine.call import Call
from server.engine.handlers import ErrorResponse, Handlers, explain, with_cancellation
from server.engine.requests import (
    Adapted,
    ChatRequest,
    CountTokensRequest,
    DetokenizeRequest,
    MessagesRequest,
    ResponsesRequest,
    TextRequest,
    TokenizeRequest,
)
from server.errors import ServerError, describe
from server.routes import Served, Serving
from server.routes.failure import failure

router = APIRouter(tags=["inference"])


@router.post("/v1/chat/completions")
async def chat(body: ChatRequest, request: Request, serving: Served) -> Response:
    """OpenAI's chat completions; `adapter` (or `model`) names the adapter that answers."""
    return await _answer(
        serving, request, body, lambda to: to.chat.create_chat_completion(body, request)
    )


@router.post("/v1/completions")
async def completions(body: TextRequest, request: Request, serving: Served) -> Response:
    """OpenAI's completions: a prompt without a chat template."""
    return await _answer(
        serving, request, body, lambda to: to.completions.create_completion(body, request)
    )


@router.post("/v1/responses")
async def responses(body: ResponsesRequest, request: Request, serving: Served) -> Response:
    """OpenAI's responses; nothing is stored between calls."""
    return await _answer(
        serving,
        request,
        body,
        lambda to: to.responses.create_responses(body, request),
        mode="json",
        by_alias=True,
    )


@router.post("/v1/messages")
async def messages(body: MessagesRequest, request: Request, serving: Served) -> Response:
    """Anthropic's messages."""
    return await _answer(
        serving,
        request,
        body,
        lambda to: to.messages.create_messages(body, request),
        exclude_none=True,
    )


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountTokensRequest, request: Request, serving: Served) -> Response:
    """Anthropic's count of the tokens of a message."""
    return await _answer(
        serving,
        request,
        body,
        lambda to: to.messages.count_tokens(body, request),
        exclude_none=True,
    )


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request, serving: Served) -> Response:
    """The token ids of a prompt or of messages."""
    return await _answer(
        serving, request, body, lambda to: to.tokenization.create_tokenize(body, request)
    )


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request, serving: Served) -> Response:
    """The text of token ids."""
    return await _answer(
        serving, request, body, lambda to: to.tokenization.create_detokenize(body, request)
    )


async def _answer(
    serving: Serving,
    request: Request,
    body: Adapted,
    ask: Callable[[Handlers], Awaitable[Any]],
    **dump: Any,
) -> Response:
    """Opens the call, asks a handler, and makes its result a response with our headers."""
    gateway, handlers = serving.ready()
    call = await gateway.open(body.adapter, body.model, request.state.key)
    request.state.call = call
    body.model = call.asked
    result = await _begin(ask(handlers), request, call)
    if result is None:  # the client is gone; nobody reads this
        return Response(status_code=499)
    if isinstance(result, ErrorResponse):
        error = result.error
        return failure(request, error.code, error.message, param=error.param)
    if isinstance(result, AsyncGenerator):
        return StreamingResponse(result, headers=_headers(call), media_type="text/event-stream")
    return JSONResponse(result.model_dump(**dump), headers=_headers(call))


@with_cancellation  # type: ignore[untyped-decorator]
async def _begin(asked: Awaitable[Any], request: Request, call: Call) -> Any:
    """A handler's result; of a stream, its first event is there, so that what fails before it
    still has a status of its own. Ends at once when the client does.
    """
    try:
        result = await asked
        if isinstance(result, AsyncGenerator):
            events = _events(result)
            first = await anext(events, "")
            result = _told(first, events, call)
    except Exception as error:
        result = explain(error)
    # Handlers make anything an error of their own; this one has a status and a code of ours.
    if isinstance(call.error, AdapterError | ServerError):
        raise call.error
    return result


async def _events(stream: AsyncGenerator[Any, None]) -> AsyncGenerator[str, None]:
    """Server-sent events: handlers give them as text, but for /v1/responses, as objects."""
    async with aclosing(stream):
        async for event in stream:
            if isinstance(event, str):
                yield event
            else:
                yield f"event: {event.type}\ndata: {event.model_dump_json(by_alias=True)}\n\n"


async def _told(
    first: str, rest: AsyncGenerator[str, None], call: Call
) -> AsyncGenerator[str, None]:
    """All events; where handlers tell of an error of ours as one of theirs, as what it is."""
    async with aclosing(rest):
        yield first
        async for event in rest:
            if call.error is not None and event.startswith('data: {"error"'):
                event = _error_event(event, call.error)
            yield event


def _error_event(event: str, error: Exception) -> str:
    if not isinstance(error, AdapterError | ServerError):
        return event
    return f"data: {json.dumps(describe(error)[1])}\n\n"


def _headers(call: Call) -> dict[str, str]:
    if call.version is None:
        return {}
    return {
        "x-loraplex-adapter": call.version.adapter,
        "x-loraplex-version": str(call.version.number),
        "x-loraplex-digest": call.version.digest,
        "x-loraplex-queue-ms": f"{call.queue_ms:.0f}",
        "x-loraplex-load-ms": f"{call.load_ms:.0f}",
    }
