"""A batch server over transformers and PEFT: what a team without an engine would write.

Requests wait in a queue; up to `--batch` of them, in order of arrival, are one static batch of
`generate` with PEFT's `adapter_names`, whichever adapters they name (rows without one are
"__base__"). The batch ends with its longest reply; the next one begins then. Tokens are streamed as
`generate` makes them, in the form of `/v1/completions`, so that the same client measures it.
"""

import asyncio
import json
import os
import threading
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Annotated, Any

import torch
import typer
import uvicorn
from peft import PeftModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

BASE_ROW = "__base__"  # PEFT's word
GATHER_S = 0.005  # streams that begin together are one batch, although they arrive one by one


@dataclass
class _Job:
    """A request that waits or runs; its tokens, then None, go to `tokens` of the event loop."""

    adapter: str
    prompt: list[int]
    output: int
    tokens: asyncio.Queue[int | None]
    loop: asyncio.AbstractEventLoop
    sent: int = 0

    def put(self, token: int) -> None:
        if self.sent == self.output:  # others in the batch are longer
            return
        self.sent += 1
        self.loop.call_soon_threadsafe(self.tokens.put_nowait, token)
        if self.sent == self.output:
            self.loop.call_soon_threadsafe(self.tokens.put_nowait, None)


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Hands the tokens of every step to their requests; the first call is the prompts."""

    def __init__(self, jobs: list[_Job]) -> None:
        self._jobs = jobs
        self._began = False

    def put(self, value: torch.Tensor) -> None:
        if not self._began:
            self._began = True
            return
        for job, token in zip(self._jobs, value.tolist(), strict=True):
            job.put(token)

    def end(self) -> None:
        """Every request got its last token in `put`."""


class _Batcher:
    def __init__(self, model: Any, batch: int) -> None:
        self._model = model
        self._batch = batch
        self.waiting: SimpleQueue[_Job] = SimpleQueue()

    def work(self) -> None:
        """Runs batches for ever; a batch that fails ends the server, or its clients would wait."""
        try:
            while True:
                self._generate(self._next())
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _next(self) -> list[_Job]:
        jobs = [self.waiting.get()]
        while len(jobs) < self._batch:
            try:
                jobs.append(self.waiting.get(timeout=GATHER_S))
            except Empty:
                break
        return jobs

    def _generate(self, jobs: list[_Job]) -> None:
        longest = max(len(job.prompt) for job in jobs)
        padding = [longest - len(job.prompt) for job in jobs]
        ids = [[0] * pad + job.prompt for pad, job in zip(padding, jobs, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
        adapters = {}
        if isinstance(self._model, PeftModel):
            adapters = {"adapter_names": [job.adapter for job in jobs]}
        with torch.inference_mode():
            self._model.generate(
                input_ids=torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                max_new_tokens=max(job.output for job in jobs),
                do_sample=False,
                streamer=_Streamer(jobs),
                **adapters,
            )


def load(base: Path, adapters: dict[str, Path]) -> Any:
    """The base in bf16 with all adapters loaded, in bf16 as well."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for name, folder in adapters.items():
        more = {"adapter_name": name, "autocast_adapter_dtype": False}
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), **more)
        else:
            model = PeftModel.from_pretrained(model, str(folder), **more)
    model.eval()
    model.generation_config.eos_token_id = None  # replies have the length that was asked for
    model.generation_config.pad_token_id = 0
    return model


def _app(batcher: _Batcher, known: set[str]) -> Starlette:
    async def health(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    async def completions(request: Request) -> Any:
        body = await request.json()
        name = body.get("model", "base")
        if name != "base" and name not in known:
            return PlainTextResponse(f"no adapter {name}", 404)
        job = _Job(
            adapter=BASE_ROW if name == "base" else name,
            prompt=body["prompt"],
            output=body["max_tokens"],
            tokens=asyncio.Queue(),
            loop=asyncio.get_running_loop(),
        )
        batcher.waiting.put(job)
        return StreamingResponse(_events(job), media_type="text/event-stream")

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        threading.Thread(target=batcher.work, daemon=True).start()
        yield

    routes = [
        Route("/health", health),
        Route("/v1/completions", completions, methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


async def _events(job: _Job) -> AsyncIterator[str]:
    while (token := await job.tokens.get()) is not None:
        choice = {"index": 0, "text": "", "token_ids": [token]}
        yield f"data: {json.dumps({'choices': [choice]})}\n\n"
    yield "data: [DONE]\n\n"


def main(
    base: Annotated[Path, typer.Option()],
    port: Annotated[int, typer.Option()],
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER, repeatable")] = None,
    batch: Annotated[int, typer.Option(help="Most requests in a batch.")] = 8,
) -> None:
    """Serve on loopback until ended."""
    adapters = {
        name: Path(path) for name, _, path in (each.partition("=") for each in adapter or ())
    }
    batcher = _Batcher(load(base, adapters), batch)
    uvicorn.run(_app(batcher, set(adapters)), port=port, log_level="warning")


if __name__ == "__main__":
    typer.run(main)
