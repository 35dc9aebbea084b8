"""A workload file: which servers, which work, which ratios; and the requests that it means.

Everything random comes from the workload's seed, the case's name and the round, never from the
target: in one round every target gets the same prompts, lengths, adapters and arrival times.
"""

import hashlib
import math
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

FIRST_TOKEN = 256  # below are special tokens and single bytes

Kind = Literal["loraplex", "vllm", "peft", "llama"]
Pattern = Literal["none", "round-robin", "distinct", "uniform", "skewed", "identical"]


class WorkloadError(Exception):
    """A workload that cannot be run; the message says why in one line."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AdapterSet(_Part):
    """`count` random adapters of one rank on all seven linear layers."""

    count: int = Field(ge=1)
    rank: int = Field(ge=1)


class Target(_Part):
    """A server to measure. Without `adapters` it serves the base only, LoRA off."""

    kind: Kind
    adapters: tuple[str, ...] = ()  # names of adapter sets
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = {}


class Closed(_Part):
    """`streams` clients, each of which sends its next request when its last has ended."""

    kind: Literal["closed"] = "closed"
    streams: int = Field(ge=1)
    requests: int = Field(1, ge=1, description="of each stream")
    prompt: int = Field(ge=1, description="tokens")
    output: int = Field(ge=1, description="tokens")
    pattern: Pattern = "none"
    adapters: str | None = Field(None, description="the adapter set that the pattern draws from")
    use: int | None = Field(None, ge=1, description="only so many adapters of the set")


class Open(_Part):
    """Requests that arrive when they do, however busy the server is (S-LoRA's synthetic load).

    Intervals are gamma distributed with the mean 1/rate and the coefficient of variation cv; the
    i-th of n adapters is drawn by numpy's power distribution: P(adapter < x·n) = x^alpha.
    """

    kind: Literal["open"] = "open"
    rate: float = Field(gt=0, description="requests a second")
    seconds: float = Field(gt=0)
    cv: float = Field(1.0, gt=0)
    alpha: float = Field(1.0, gt=0)
    prompt: tuple[int, int] = Field(description="tokens: lowest, and one above the highest")
    output: tuple[int, int] = Field(description="tokens: lowest, and one above the highest")
    adapters: str


class Start(_Part):
    """From the command to ready; the warm-up is the first start, what is counted later ones."""

    kind: Literal["start"] = "start"


class Case(_Part):
    """One piece of work, done by some of the targets."""

    name: str
    targets: tuple[str, ...] = Field(min_length=1)
    load: Annotated[Closed | Open | Start, Field(discriminator="kind")]


class Ratio(_Part):
    """`target` over `against` in one metric of one case, and the bar it has to clear, if any."""

    case: str
    target: str
    against: str
    metric: str = "decode_tokens_s"
    at_least: float | None = None
    at_most: float | None = None


class Workload(_Part):
    """A whole workload file."""

    name: str
    about: str
    seed: int = 42
    vocabulary: int = Field(49152, gt=FIRST_TOKEN, description="tokens of the base")
    environment: dict[str, str] = Field({}, description="of every target")
    adapters: dict[str, AdapterSet] = {}
    targets: dict[str, Target]
    groups: tuple[tuple[str, ...], ...] = Field(
        (), description="targets that run side by side; all of them when not given"
    )
    cases: tuple[Case, ...] = Field(min_length=1)
    ratios: tuple[Ratio, ...] = ()

    @model_validator(mode="after")
    def _hangs_together(self) -> "Workload":
        for problem in _problems(self):
            raise ValueError(problem)
        return self

    @property
    def side_by_side(self) -> tuple[tuple[str, ...], ...]:
        """The groups of targets that run at the same time."""
        return self.groups or (tuple(self.targets),)

    def only(self, cases: list[str], targets: list[str]) -> "Workload":
        """The part of it that is named; an empty list means all.

        Raises:
            WorkloadError: nothing is left, or a name is unknown.
        """
        for name in set(cases) - {case.name for case in self.cases}:
            raise WorkloadError(f"no case {name!r}: {', '.join(c.name for c in self.cases)}")
        for name in set(targets) - self.targets.keys():
            raise WorkloadError(f"no target {name!r}: {', '.join(self.targets)}")
        kept = {name: t for name, t in self.targets.items() if not targets or name in targets}
        some = [
            case.model_copy(update={"targets": tuple(t for t in case.targets if t in kept)})
            for case in self.cases
            if not cases or case.name in cases
        ]
        some = [case for case in some if case.targets]
        if not some:
            raise WorkloadError("nothing to run: none of the targets does one of the cases")
        used = {name for case in some for name in case.targets}
        left = {
            "targets": {name: target for name, target in kept.items() if name in used},
            "groups": tuple(
                group
                for group in (tuple(t for t in g if t in used) for g in self.side_by_side)
                if group
            ),
            "cases": tuple(some),
            "ratios": tuple(
                ratio
                for ratio in self.ratios
                if any(
                    case.name == ratio.case and {ratio.target, ratio.against} <= {*case.targets}
                    for case in some
                )
            ),
        }
        return self.model_copy(update=left)


def _problems(workload: Workload) -> list[str]:
    found = []
    cases = {case.name: case for case in workload.cases}
    if len(cases) < len(workload.cases):
        found.append("two cases have one name")
    for name, target in workload.targets.items():
        for missing in set(target.adapters) - workload.adapters.keys():
            found.append(f"target {name}: no adapter set {missing!r}")
    for group in workload.side_by_side:
        for missing in set(group) - workload.targets.keys():
            found.append(f"groups: no target {missing!r}")
    for case in workload.cases:
        for missing in set(case.targets) - workload.targets.keys():
            found.append(f"case {case.name}: no target {missing!r}")
        found += [f"case {case.name}: {problem}" for problem in _of_load(workload, case.load)]
    for ratio in workload.ratios:
        if ratio.case not in cases:
            found.append(f"ratio: no case {ratio.case!r}")
            continue
        pair = {ratio.target, ratio.against}
        for missing in pair - set(cases[ratio.case].targets):
            found.append(f"ratio: case {ratio.case} does not run target {missing!r}")
        if not any(pair <= set(group) for group in workload.side_by_side):
            found.append(f"ratio: {' and '.join(sorted(pair))} are in no group together")
    return found


def _of_load(workload: Workload, load: Closed | Open | Start) -> list[str]:
    if isinstance(load, Start):
        return []
    if isinstance(load, Open):
        if load.adapters not in workload.adapters:
            return [f"no adapter set {load.adapters!r}"]
        if not (0 < load.prompt[0] < load.prompt[1] and 0 < load.output[0] < load.output[1]):
            return ["a length range is empty"]
        return []
    if load.pattern == "none":
        return []
    if load.adapters not in workload.adapters:
        return [f"no adapter set {load.adapters!r}"]
    count = workload.adapters[load.adapters].count
    if (load.use or 1) > count:
        return [f"uses {load.use} of {count} adapters"]
    needed = len(popularity(load.pattern, load.streams * load.requests))
    if load.pattern != "round-robin" and needed > (load.use or count):
        return [
            f"the pattern {load.pattern} needs {needed} adapters, {load.use or count} are there"
        ]
    return []


def read(path: Path) -> Workload:
    """The workload in a TOML file.

    Raises:
        WorkloadError: it cannot be read or is no workload.
    """
    try:
        return Workload.model_validate(tomllib.loads(path.read_text()))
    except OSError as error:
        raise WorkloadError(f"{path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise WorkloadError(f"{path}: not TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        raise WorkloadError(f"{path}: {where}: {said}" if where else f"{path}: {said}") from None


class Request(_Part):
    """One request: `stream` sends it, `due_s` seconds after the beginning (open load only)."""

    stream: int
    adapter: str | None
    prompt: tuple[int, ...]
    output: int
    due_s: float | None = None


def requests(workload: Workload, case: Case, round_: int) -> list[Request]:
    """What `case` sends in a round; -1 is the warm-up, whose prompts no other round has."""
    load = case.load
    random = np.random.default_rng(_seed(workload.seed, case.name, round_))
    if isinstance(load, Closed):
        return _closed(workload, load, random)
    if isinstance(load, Open):
        return _open(workload, load, random)
    return []


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8])


def _prompt(workload: Workload, length: int, random: np.random.Generator) -> tuple[int, ...]:
    return tuple(random.integers(FIRST_TOKEN, workload.vocabulary, length).tolist())


def _closed(workload: Workload, load: Closed, random: np.random.Generator) -> list[Request]:
    total = load.streams * load.requests
    chosen: list[str | None] = [None] * total
    if load.adapters is not None and load.pattern != "none":
        names = adapter_names(load.adapters, load.use or workload.adapters[load.adapters].count)
        if load.pattern == "round-robin":
            chosen = [names[i % load.streams % len(names)] for i in range(total)]
        else:
            sizes = popularity(load.pattern, total)
            drawn = [name for name, size in zip(names, sizes, strict=False) for _ in range(size)]
            chosen = [drawn[i] for i in random.permutation(total)]
    return [
        Request(
            stream=i % load.streams,
            adapter=adapter,
            prompt=_prompt(workload, load.prompt, random),
            output=load.output,
        )
        for i, adapter in enumerate(chosen)
    ]


def _open(workload: Workload, load: Open, random: np.random.Generator) -> list[Request]:
    total = max(1, int(load.rate * load.seconds))
    names = adapter_names(load.adapters, workload.adapters[load.adapters].count)
    chosen = (random.power(load.alpha, total) * len(names)).astype(int)
    prompts = random.integers(*load.prompt, total).tolist()
    outputs = random.integers(*load.output, total).tolist()
    shape = load.cv**-2
    due = np.cumsum(random.gamma(shape, 1 / (load.rate * shape), total)).tolist()
    return [
        Request(
            stream=i,
            adapter=names[chosen[i]],
            prompt=_prompt(workload, prompts[i], random),
            output=outputs[i],
            due_s=due[i],
        )
        for i in range(total)
    ]


def adapter_names(of_set: str, count: int) -> list[str]:
    """What the adapters of a set are called, on every target."""
    return [f"{of_set}-{i}" for i in range(count)]


def popularity(pattern: Pattern, total: int) -> list[int]:
    """How many of `total` requests each adapter gets, the most popular first.

    As in Punica's evaluation: distinct (one each), uniform (⌈√total⌉ adapters, evenly), skewed
    (each adapter 1.5 times as often as the next one), identical (all on one).
    """
    if pattern == "distinct":
        return [1] * total
    if pattern == "uniform":
        adapters = math.ceil(math.sqrt(total))
        return [len(range(i, total, adapters)) for i in range(adapters)]
    if pattern == "skewed":
        sizes: list[int] = []
        while sum(sizes) < total:
            sizes.append(min(math.ceil(1.5 ** len(sizes)), total - sum(sizes)))
        return sorted(sizes, reverse=True)
    return [total]
