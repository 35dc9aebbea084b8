"""What an adapter should say: the base and PEFT, in fp32, one prompt at a time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Reply:
    """Greedy tokens as the server gave them, each with the logprobs it gave: id → logprob."""

    tokens: tuple[int, ...]
    logprobs: tuple[tuple[tuple[int, float], ...], ...]

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> "Reply":
        """One that a program wrote as JSON: `tokens` and `logprobs`."""
        logprobs = (tuple((token, logprob) for token, logprob in each) for each in said["logprobs"])
        return cls(tuple(said["tokens"]), tuple(logprobs))


class Reference:
    """The base with every adapter, from the same files that the server has."""

    def __init__(self, base: Path, adapters: dict[str, Path]) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        (first, folder), *rest = adapters.items()
        self._model = PeftModel.from_pretrained(model, folder, adapter_name=first)
        for name, folder in rest:
            self._model.load_adapter(folder, adapter_name=name)
        self._model.eval()

    @torch.inference_mode()
    def logprobs(self, name: str, prompt: list[int], tokens: tuple[int, ...]) -> torch.Tensor:
        """[tokens, vocabulary]: what each token of a reply was chosen from, given those before."""
        ids = torch.tensor([[*prompt, *tokens]])
        if name == "base":
            with self._model.disable_adapter():
                logits = self._model(ids).logits[0]
        else:
            if self._model.active_adapter != name:  # to set it takes as long as to ask it
                self._model.set_adapter(name)
            logits = self._model(ids).logits[0]
        return logits[len(prompt) - 1 : -1].log_softmax(-1)


# Nats. What bf16 costs by itself, measured with `transformers` in bf16 against fp32 on these
# adapters: 0.05 to 0.10 on average, up to 0.3 for a likely token, up to 0.6 for an unlikely one.
MEAN = 0.25  # over all logprobs that the server gave
LIKELY = 0.5  # for any token with at least 5 % of the probability
CHOICE = 0.25  # how much worse a chosen token may be than the best


def gap(reply: Reply, want: torch.Tensor) -> float:
    """How much of the tolerance a reply uses, held against reference logprobs for its very tokens.

    Above 1 the reply is wrong. Texts are not compared: a greedy text may flip where two tokens are
    nearly as good, since the server computes in bf16.
    """
    told = [
        (want[i, token].item(), logprob)
        for i, each in enumerate(reply.logprobs)
        for token, logprob in each
    ]
    off = [abs(wanted - logprob) for wanted, logprob in told]
    likely = [abs(wanted - logprob) for wanted, logprob in told if wanted > math.log(0.05)]
    chosen = want[torch.arange(len(reply.tokens)), torch.tensor(reply.tokens)]
    worse = (want.max(-1).values - chosen).max().item()
    return max(sum(off) / len(off) / MEAN, max(likely, default=0) / LIKELY, worse / CHOICE)
