"""Tokens: how many a request brings, may take, and has got so far."""

import time
from typing import Any

from vllm.sampling_params import RequestOutputKind

CHARACTERS = 3  # to a token, of a prompt that comes as text


def prompt_tokens(prompt: Any) -> int:
    """Tokens of a prompt as vLLM's handlers hand it on; an estimate where it is text."""
    if isinstance(prompt, str):
        return len(prompt) // CHARACTERS + 1
    if isinstance(prompt, dict):
        if (ids := prompt.get("prompt_token_ids")) is not None:
            return len(ids)
        if (embeds := prompt.get("prompt_embeds")) is not None:
            return len(embeds)
        return prompt_tokens(prompt.get("prompt") or "")
    return len(getattr(prompt, "prompt_token_ids", None) or ())


def most_tokens(params: Any, engine: Any, prompt: int) -> int:
    """The longest reply to a prompt of so many tokens."""
    left: int = max(1, engine.model_config.max_model_len - prompt)
    return left if params.max_tokens is None else min(params.max_tokens, left)


class Meter:
    """Counts the tokens of one request, of all its sequences, by what the engine gives."""

    def __init__(self, params: Any) -> None:
        self.streams = params.output_kind == RequestOutputKind.DELTA
        self._cumulative: dict[int, int] = {}
        self.tokens = 0

    def add(self, output: Any) -> int:
        """Tokens so far, with those of `output`."""
        for each in output.outputs:
            if self.streams:
                self.tokens += len(each.token_ids)
            else:
                self._cumulative[each.index] = len(each.token_ids)
        if not self.streams:
            self.tokens = sum(self._cumulative.values())
        return self.tokens


def first_token_age(output: Any) -> float:
    """Seconds since the first token of a request came; 0 where the engine keeps no statistics."""
    if (metrics := output.metrics) is None:
        return 0.0
    came: float = metrics.arrival_time + metrics.first_token_latency
    return max(0.0, time.time() - came)


def produced(engine: Any, request_id: str) -> int:
    """Tokens that the engine has for a request, whether it has handed them out or not.

    A request that is not streamed is handed out once, at its end.
    """
    processor = engine.output_processor
    states = (
        processor.request_states.get(each)
        for each in processor.external_req_ids.get(request_id, ())
    )
    return sum(
        state.detokenizer.num_output_tokens() for state in states if state and state.detokenizer
    )
