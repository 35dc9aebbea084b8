"""Proof that an adapter does something: what an engine says with it, held against without it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from adapters.errors import Problem

Logprobs = Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Effect:
    """How far an adapter moves the most likely next tokens after some short prompts.

    `difference` is the largest move of a token's logprob, in nats, and `noise` how far the base
    moves by itself between two askings, since an engine's rounding depends on what else is in its
    batch. `finite` is False if a logprob was no number.
    """

    difference: float
    noise: float
    finite: bool

    @property
    def certain(self) -> bool:
        """Whether asking once more could tell nothing new."""
        return not self.finite or self.difference == 0 or self.difference > self.noise

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the keys are stable."""
        return asdict(self)

    def problems(self) -> list[Problem]:
        """What keeps the adapter from being served at all."""
        if self.finite:
            return []
        message = "The engine computes NaN with the adapter, though its numbers are finite."
        fix = "Its numbers are far too large: train again with a lower learning rate."
        return [Problem("nonfinite_output", "logprobs", message, fix)]

    def warnings(self) -> list[Problem]:
        """What to know about how sure the proof is."""
        if not 0 < self.difference <= self.noise:
            return []
        message = (
            f"The adapter moves logprobs by {self.difference:.3g}, no more than the busy engine's "
            f"own noise of {self.noise:.3g}."
        )
        fix = "Nothing, if the adapter is meant to change little."
        return [Problem("effect_within_noise", "logprobs", message, fix)]


def no_effect(where: str, message: str) -> Problem:
    """The refusal of an adapter that leaves the base as it is."""
    fix = "Save the adapter after training; to serve it all the same, start with --allow-noop."
    return Problem("no_effect", where, message, fix)


def distance(one: Logprobs, other: Logprobs) -> float:
    """The largest difference between two answers: each the logprobs of the likeliest tokens.

    A token that only one of them lists is held against the other's least likely one, which is the
    most it can be there. NaN if a logprob is.
    """
    lowest = {id(each): min(each.values()) for each in (one, other)}
    moves = [
        abs(one.get(token, lowest[id(one)]) - other.get(token, lowest[id(other)]))
        for token in {*one, *other}
    ]
    return math.nan if any(map(math.isnan, moves)) else max(moves)
