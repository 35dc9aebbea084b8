"""What an adapter should say: the base and PEFT, in fp32, one prompt at a time."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


@dataclass(frozen=True)
class Reply:
    """Greedy tokens as the server gave them, each with the logprobs it gave: id → logprob."""

    tokens: tuple[int, ...]
    logprobs: tuple[tuple[tuple[int, float], ...], ...]


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
            self._model.set_adapter(name)
            logits = self._model(ids).logits[0]
        return logits[len(prompt) - 1 : -1].log_softmax(-1)


ATOL, RTOL = 0.25, 0.05  # nats, and share of the logprob


def gap(reply: Reply, want: torch.Tensor) -> float:
    """How much of the tolerance a reply uses, held against reference logprobs for its very tokens.

    Above 1 the reply is wrong: a logprob it gave is off by more than ATOL + RTOL·|logprob|, or a
    token it chose was more than ATOL worse than the best. Texts are not compared: a greedy text may
    flip where two tokens are nearly as good, since the server computes in bf16.
    """
    told = [
        abs(want[i, token].item() - logprob) / (ATOL + RTOL * abs(logprob))
        for i, each in enumerate(reply.logprobs)
        for token, logprob in each
    ]
    chosen = want[torch.arange(len(reply.tokens)), torch.tensor(reply.tokens)]
    return max(*told, (want.max(-1).values - chosen).max().item() / ATOL)
