"""Scores the demo adapters and the bare base on held-out items, greedy, and prints one table.

Through the running server: `python -m adapters.demo.score --url http://127.0.0.1:8000`.
Without a server: `python -m adapters.demo.score --local DIR`, DIR being the base as a folder.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adapters.demo import TASKS, WEIGHTS
from adapters.demo.task import SPLITS, Item, Task, TooFewItems

Tick = Callable[[int], object]
# Replies to `items` from a model (`base` or an adapter's name), `tick` being told how many came.
Answerer = Callable[[str, list[Item], int, Tick], Awaitable[list[str]]]


@dataclass(frozen=True)
class Score:
    """What one model reached on one task's items; `distinct` counts different replies."""

    task: str
    model: str
    split: str
    seed: int
    items: int
    solved: int
    distinct: int
    seconds: float
    by_kind: dict[str, str]
    replies: list[dict[str, Any]]

    @property
    def share(self) -> float:
        """The part of the items solved, 0 to 1."""
        return self.solved / self.items


def server_answers(url: str, api_key: str, concurrency: int) -> Answerer:
    """Asks a running server, `concurrency` requests at a time; raises openai.OpenAIError."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=url.rstrip("/") + "/v1", api_key=api_key, timeout=600)

    async def answers(model: str, items: list[Item], max_tokens: int, tick: Tick) -> list[str]:
        places = asyncio.Semaphore(concurrency)

        async def one(item: Item) -> str:
            async with places:
                completion = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": item.prompt}],
                    temperature=0,
                    max_tokens=max_tokens,
                )
            tick(1)
            return completion.choices[0].message.content or ""

        return list(await asyncio.gather(*(one(item) for item in items)))

    return answers


def local_answers(base: Path, weights: Path, batch: int = 25, dtype: str = "bfloat16") -> Answerer:
    """Asks transformers and PEFT in this process, `batch` prompts of similar length at a time.

    `dtype` is what is computed in, by torch's name.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")

    async def answers(model: str, items: list[Item], max_tokens: int, tick: Tick) -> list[str]:
        network: Any = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        if model != "base":
            network = PeftModel.from_pretrained(
                network, weights / model, autocast_adapter_dtype=False
            ).to(network.dtype)
        network.to(device).eval()
        order = sorted(range(len(items)), key=lambda i: len(items[i].prompt))
        replies = [""] * len(items)
        for start in range(0, len(items), batch):
            chosen = order[start : start + batch]
            chats = [[{"role": "user", "content": items[i].prompt}] for i in chosen]
            inputs = tokenizer.apply_chat_template(
                chats,
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            ).to(device)
            with torch.inference_mode():
                output = network.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
            new = output[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(
                chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
            ):
                replies[i] = text
            tick(len(chosen))
        return replies

    return answers


def scored(
    task: Task,
    model: str,
    split: str,
    seed: int,
    items: list[Item],
    replies: list[str],
    seconds: float,
) -> Score:
    """Checks every reply; the checks run two at a time, as some wait for a subprocess."""
    with ThreadPoolExecutor(2) as pool:
        passed = list(pool.map(task.check, items, replies))
    kinds: dict[str, list[bool]] = {}
    for item, ok in zip(items, passed, strict=True):
        kinds.setdefault(item.kind, []).append(ok)
    return Score(
        task=task.name,
        model=model,
        split=split,
        seed=seed,
        items=len(items),
        solved=sum(passed),
        distinct=len({task.without_topic(i, r) for i, r in zip(items, replies, strict=True)}),
        seconds=round(seconds, 1),
        by_kind={kind: f"{sum(oks)}/{len(oks)}" for kind, oks in sorted(kinds.items())},
        replies=[
            {"prompt": item.prompt, "reply": reply, "answer": item.answer, "solved": ok}
            for item, reply, ok in zip(items, replies, passed, strict=True)
        ],
    )


async def run(
    answers: Answerer, tasks: Sequence[Task], models: str, split: Any, n: int, seed: int
) -> list[Score]:
    """Scores the adapter and the base (`models` may be `adapter` or `base` alone) on each task."""
    scores = []
    with Progress(console=Console(stderr=True)) as progress:
        for task in tasks:
            items = task.items(split, n, seed)
            for model in ("base", task.name):
                if models not in ("both", "base" if model == "base" else "adapter"):
                    continue
                line = progress.add_task(f"{task.name}: {model}", total=n)
                began = time.monotonic()
                tick = partial(progress.advance, line)
                replies = await answers(model, items, task.max_tokens, tick)
                seconds = time.monotonic() - began
                scores.append(scored(task, model, split, seed, items, replies, seconds))
    return scores


def table_of(scores: Sequence[Score]) -> Table:
    """One line a task: what is checked, and what base and adapter reached."""
    table = Table("task", "a reply is right by", "items", "base", "adapter", "distinct replies")
    for task in dict.fromkeys(score.task for score in scores):
        mine = {score.model: score for score in scores if score.task == task}
        base, adapter = mine.get("base"), mine.get(task)
        shown = adapter or next(iter(mine.values()))
        table.add_row(
            task,
            TASKS[task].checked_by,
            str(shown.items),
            f"{base.share:.1%}" if base else "-",
            f"{adapter.share:.1%}" if adapter else "-",
            str(shown.distinct),
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m adapters.demo.score", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="the server, without /v1")
    where.add_argument("--local", type=Path, metavar="DIR", help="the base as a folder")
    parser.add_argument("--task", action="append", choices=sorted(TASKS), help="default: all")
    parser.add_argument("--models", choices=("both", "adapter", "base"), default="both")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time, --url only")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="adapters, --local only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every reply and verdict")
    args = parser.parse_args(argv)
    if args.local and not (args.local / "config.json").is_file():
        parser.error(f"--local {args.local}: no config.json there, so no model")
    if args.items < 1 or args.concurrency < 1:
        parser.error("--items and --concurrency must be at least 1")

    if args.url:
        answers = server_answers(args.url, args.api_key, args.concurrency)
    else:
        answers = local_answers(args.local, args.weights)
    tasks = [TASKS[name] for name in args.task or TASKS]
    try:
        scores = asyncio.run(run(answers, tasks, args.models, args.split, args.items, args.seed))
    except (TooFewItems, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        # The SDK's errors share a base class, which is only there when a server is asked.
        if type(error).__module__.split(".")[0] != "openai":
            raise
        print(f"error: {args.url}: {error}", file=sys.stderr)
        return 1
    Console().print(table_of(scores))
    if args.json:
        args.json.write_text(json.dumps([asdict(score) for score in scores], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
