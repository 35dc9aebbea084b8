"""Trains one demo adapter with PEFT: `python -m adapters.demo.train sql --base DIR --out DIR`.

Rank 8, alpha 16, dropout 0.05 on all seven linear layers; the base stays in bf16, the adapter is
trained in fp32 and saved in bf16. Runs on a CPU (tens of minutes) or a GPU (seconds).
"""

# ruff: noqa: S311 - randomness is seeded
from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.demo import TASKS
from adapters.demo.task import Item, Task

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """How one task is trained: items seen, passes over them, peak learning rate."""

    items: int
    epochs: int = 1
    peak_lr: float = 1.5e-3
    row_tokens: int = 320
    batch_tokens: int = 1280


RECIPES = {
    "sql": Recipe(items=5000),
    "code": Recipe(items=4500),
    "poetry": Recipe(items=3200),
}


@dataclass(frozen=True)
class Shape:
    """What PEFT's LoraConfig is told; the demo adapters have the defaults."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = SEVEN


DEMO = Shape()


@dataclass(frozen=True)
class Row:
    """Several items in one sequence, behind the beginning that their prompts share.

    A segment of 0 marks the shared beginning, other numbers the items; a token sees the shared
    beginning and its own item, so each item gets the logits it would get alone. `source[i]` is
    the place whose logits predict token `target[i]`.
    """

    ids: list[int]
    positions: list[int]
    segments: list[int]
    source: list[int]
    target: list[int]


class PooledDropout(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Dropout that cuts its masks out of one large random pool.

    Drawing fresh masks for all 210 layers takes a quarter of a training step on a CPU.
    """

    def __init__(self, pool: Tensor) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Drops entries of `x`, as long as the module is in training mode."""
        if not self.training:
            return x
        start = random.randrange(self.pool.numel() - x.numel())
        return x * self.pool[start : start + x.numel()].view(x.shape)


def encoded(tokenizer: Any, item: Item) -> tuple[list[int], int]:
    """The token ids of a chat that ends with the answer, and where the answer begins."""
    chat = [{"role": "user", "content": item.prompt}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = item.answer + tokenizer.eos_token
    return prompt_ids + tokenizer(answer, add_special_tokens=False)["input_ids"], len(prompt_ids)


def packed(chats: Sequence[tuple[list[int], int]]) -> Row:
    """One row out of chats (ids, where the answer begins): their common start is kept once."""
    shared = min(begin for _, begin in chats) - 1
    first = chats[0][0]
    for ids, _ in chats:
        while ids[:shared] != first[:shared]:
            shared -= 1
    row = Row(first[:shared], list(range(shared)), [0] * shared, [], [])
    for number, (ids, begin) in enumerate(chats, 1):
        offset = len(row.ids) - shared
        row.ids.extend(ids[shared:])
        row.positions.extend(range(shared, len(ids)))
        row.segments.extend([number] * (len(ids) - shared))
        row.source.extend(range(offset + begin - 1, offset + len(ids) - 1))
        row.target.extend(ids[begin:])
    return row


def rows_of(chats: list[tuple[list[int], int]], row_tokens: int) -> list[Row]:
    """Packs chats into rows of about `row_tokens`; sorting puts those that share most together."""
    rows: list[Row] = []
    pending: list[tuple[list[int], int]] = []
    for chat in sorted(chats):
        if pending and len(packed([*pending, chat]).ids) > row_tokens:
            rows.append(packed(pending))
            pending = []
        pending.append(chat)
    return [*rows, packed(pending)]


def batches_of(rows: list[Row], batch_tokens: int, rng: random.Random) -> list[list[Row]]:
    """Batches of rows of similar length, about `batch_tokens` each, in random order."""
    order = sorted(rng.sample(rows, len(rows)), key=lambda row: len(row.ids) // 32)
    batches: list[list[Row]] = [[]]
    for row in order:
        if (len(batches[-1]) + 1) * len(row.ids) > batch_tokens and batches[-1]:
            batches.append([])
        batches[-1].append(row)
    rng.shuffle(batches)
    return batches


def tensors_of(batch: list[Row], device: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Model inputs, the flat places that predict a target, and those targets."""
    longest = max(len(row.ids) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    positions = torch.zeros_like(ids)
    segments = torch.full_like(ids, -1)
    source: list[int] = []
    for i, row in enumerate(batch):
        size = len(row.ids)
        ids[i, :size] = torch.tensor(row.ids)
        positions[i, :size] = torch.tensor(row.positions)
        segments[i, :size] = torch.tensor(row.segments)
        source.extend(i * longest + place for place in row.source)
    seen = (segments[:, None, :] == segments[:, :, None]) | (segments[:, None, :] == 0)
    mask = (seen & torch.ones(longest, longest, dtype=torch.bool).tril())[:, None]
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    target = torch.tensor([token for row in batch for token in row.target])
    return (
        {name: tensor.to(device) for name, tensor in inputs.items()},
        torch.tensor(source).to(device),
        target.to(device),
    )


def lora_model(
    base: Path, seed: int, device: str, shape: Shape = DEMO, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """The base, in `dtype`, with a fresh adapter around it, in training mode."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=shape.r,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=list(shape.targets),
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config).to(device)
    if shape.dropout:
        kept = 1 - shape.dropout
        pool = ((torch.rand(1 << 23) < kept).to(dtype) / kept).to(device)
        for module in peft_model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = PooledDropout(pool)
    return peft_model.train()


def loss_of(model: Any, batch: list[Row], device: str, dtype: torch.dtype) -> Tensor:
    """The mean cross-entropy of the answers' tokens, in nats, computed in `dtype`."""
    inputs, source, target = tensors_of(batch, device)
    inner = model.base_model.model
    cast = torch.autocast(torch.device(device).type, torch.bfloat16, dtype == torch.bfloat16)
    with cast, disable_input_dtype_casting(model):
        hidden = inner.model(**inputs, use_cache=False).last_hidden_state
        logits = inner.lm_head(hidden.flatten(0, 1)[source])
    return torch.nn.functional.cross_entropy(logits.float(), target)


def train(
    task: Task,
    recipe: Recipe,
    base: Path,
    seed: int,
    device: str,
    shape: Shape = DEMO,
    dtype: torch.dtype = torch.bfloat16,
    note: Callable[[float], object] = lambda loss: None,
) -> Any:
    """Trains an adapter and returns the PEFT model; one line of progress every 10 steps.

    `dtype` is the base's; `note` is told the loss of every step.
    """
    random.seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    items = task.items("train", recipe.items, seed)
    rows = rows_of([encoded(tokenizer, item) for item in items], recipe.row_tokens)
    rng = random.Random(seed)
    plan = [b for _ in range(recipe.epochs) for b in batches_of(rows, recipe.batch_tokens, rng)]
    tokens_left = sum(len(row.ids) for batch in plan for row in batch)
    print(f"{task.name}: {len(items)} items, {tokens_left} tokens, {len(plan)} steps", flush=True)

    model = lora_model(base, seed, device, shape, dtype)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=recipe.peak_lr, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = max(1, len(plan) // 20)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (len(plan) - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    began = time.monotonic()
    tokens_done, smooth = 0, 0.0
    for step, batch in enumerate(plan, 1):
        loss = loss_of(model, batch, device, dtype)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        note(loss.item())
        tokens_done += sum(len(row.ids) for row in batch)
        smooth = loss.item() if step == 1 else 0.9 * smooth + 0.1 * loss.item()
        if step % 10 == 0 or step == len(plan):
            speed = tokens_done / (time.monotonic() - began)
            left = (tokens_left - tokens_done) / speed
            line = f"step {step}/{len(plan)}  loss {smooth:.3f}  {speed:.0f} tokens/s"
            print(f"{line}  {left:.0f} s left", flush=True)
    print(f"{task.name}: trained in {time.monotonic() - began:.0f} s", flush=True)
    return model


def save(model: Any, out: Path) -> None:
    """Writes the adapter as bf16 safetensors, with a config that names the base and no machine."""
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    weights = out / "adapter_model.safetensors"
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    config_file = out / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["base_model_name_or_path"] = BASE_NAME
    config["target_modules"] = sorted(config["target_modules"])
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m adapters.demo.train", description=__doc__)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--base", type=Path, required=True, help=f"folder of {BASE_NAME}")
    parser.add_argument("--out", type=Path, required=True, help="folder the adapter is written to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args(argv)
    if not (args.base / "config.json").is_file():
        parser.error(f"--base {args.base}: no config.json there, so no model")
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = train(TASKS[args.task], RECIPES[args.task], args.base, args.seed, device)
    save(model, args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
