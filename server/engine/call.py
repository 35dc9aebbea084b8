"""One inference call: what it asked for, what it runs on, and what became of it."""

from contextvars import ContextVar
from dataclasses import dataclass, field

from vllm.lora.request import LoRARequest

from adapters.registry import Version
from server.keys import ANYBODY, Key

__all__ = ["Call", "LoRARequest", "current"]


@dataclass
class Call:
    """Made once a request, before vLLM's handlers see it; `version` and `lora` None for the base.

    `key` is who asks. `error` is what ended the call before or in the engine; `queue_ms` is how
    long it waited for its turn, `load_ms` how long of it its adapter was being loaded from disk.
    `prompt_tokens` went into the engine and `output_tokens` came out of it, so far. `first` is when
    the first of them came, `gaps` the seconds between those of a stream, `steps` what the call went
    through: name, begin and end. Times are of `time.monotonic`.
    """

    asked: str
    key: Key = ANYBODY
    version: Version | None = None
    lora: LoRARequest | None = None
    queue_ms: float = 0.0
    load_ms: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    steps: list[tuple[str, float, float]] = field(default_factory=list)
    error: Exception | None = None

    @property
    def adapter(self) -> str | None:
        """The name of the adapter that it runs on; None for the base."""
        return self.version.adapter if self.version else None


# vLLM's handlers look an adapter up by name, more than once, in tasks and objects of their own.
# What a name means is decided once a request, so it travels with the request.
current: ContextVar[Call] = ContextVar("current")
