"""Asks the engine what an adapter does: the likeliest next tokens with it and without it."""

import asyncio
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams

from adapters.effect import Effect, Logprobs, distance

# Short, so that asking costs a step of a busy engine a few rows more and nobody a wait.
PROMPTS = ("The answer to the question is", "SELECT name FROM users WHERE")
TOP = 20
TRIES = 3  # while the engine's own noise could hide the answer
PAUSE_S = 0.5


class Prover:
    """Measures adapters on one engine; what the base says is asked anew each time."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._asked = 0
        self._first: dict[str, Logprobs] = {}  # what the base said the first time, by prompt

    async def measure(self, lora: LoRARequest) -> Effect:
        """What `lora`, which is loaded, changes; twice the base and once the adapter a prompt."""
        for _ in range(TRIES):
            each = [await self._once(lora, prompt) for prompt in PROMPTS]
            effect = Effect(
                difference=max((e.difference for e in each if e.finite), default=0.0),
                noise=max((e.noise for e in each if e.finite), default=0.0),
                finite=all(e.finite for e in each),
            )
            if effect.certain:
                break
            await asyncio.sleep(PAUSE_S)
        return effect

    async def _once(self, lora: LoRARequest, prompt: str) -> Effect:
        # All at once: in one batch the engine rounds for all of them alike.
        base, adapted, again = await asyncio.gather(
            self._ask(prompt, None), self._ask(prompt, lora), self._ask(prompt, None)
        )
        first = self._first.setdefault(prompt, base)
        difference = distance(adapted, base)
        noise = max(distance(base, again), distance(base, first))
        finite = difference == difference and noise == noise  # NaN equals nothing
        return Effect(difference if finite else 0.0, noise if finite else 0.0, finite)

    async def _ask(self, prompt: str, lora: LoRARequest | None) -> Logprobs:
        self._asked += 1
        most = self._engine.model_config.max_logprobs
        params = SamplingParams(
            max_tokens=1,
            temperature=0,
            logprobs=TOP if most < 0 else min(TOP, most),
            detokenize=False,
        )
        stream = self._engine.generate(
            {"prompt": prompt}, params, f"proof-{self._asked}", lora_request=lora
        )
        (output,) = [output async for output in stream]
        (top,) = output.outputs[0].logprobs
        return {token: each.logprob for token, each in top.items()}
