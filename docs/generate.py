"""Writes docs/reference from what the server is: `python -m docs.generate`.

Calls come from the OpenAPI document, settings from `server.config.Settings`, series from what
/metrics yields. A test fails where a page is not what this writes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, cast, get_args, get_origin

from prometheus_client import REGISTRY
from prometheus_client.core import Metric

from server import app
from server.admission import Admission, Limits
from server.config import PREFIX, Settings
from server.engine import launch
from server.gateway import Gateway
from server.metrics import Collector
from server.residency import Residency
from server.routes.access import ACCESS
from server.routes.openapi import MEANINGS
from server.traffic import Traffic

Json = dict[str, Any]

REFERENCE = Path(__file__).parent / "reference"
MADE = "<!-- Written by `python -m docs.generate`; change what it is made from. -->\n"
# Whose bodies are vLLM's: what they are in full is said by those who made the protocol.
PROTOCOLS = {
    "ChatRequest": "OpenAI's [chat completions](https://platform.openai.com/docs/api-reference/chat)",
    "TextRequest": "OpenAI's [completions](https://platform.openai.com/docs/api-reference/completions)",
    "ResponsesRequest": "OpenAI's [responses](https://platform.openai.com/docs/api-reference/responses)",
    "MessagesRequest": "Anthropic's [messages](https://docs.anthropic.com/en/api/messages)",
    "CountTokensRequest": "Anthropic's "
    "[token counting](https://docs.anthropic.com/en/api/messages-count-tokens)",
    "TokenizeTextRequest": "vLLM's `/tokenize` with a `prompt`",
    "TokenizeMessagesRequest": "vLLM's `/tokenize` with `messages`",
    "DetokenizeRequest": "vLLM's `/detokenize`",
}
VLLM_FLAGS = "https://docs.vllm.ai/en/latest/configuration/engine_args.html"
ADAPTED = "ChatRequest"  # any of those: what is ours in them is the same
TAGS = {
    "inference": "Inference",
    "adapters": "Adapters",
    "keys": "Keys",
    "operations": "Operations",
}
# The smallest model that vLLM makes a configuration for: the series do not depend on which.
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 256,
    "dtype": "bfloat16",
}


def pages() -> dict[str, str]:
    """All pages of the reference, by file name."""
    return {"api.md": api(), "settings.md": settings(), "metrics.md": metrics()}


# -- calls --------------------------------------------------------------------------------------


def api() -> str:
    """Every call: what it takes, what it answers, and the scope that a key needs for it."""
    nothing: Any = None  # the document is the same whatever is served
    document = app.create_app(nothing, nothing, nothing).openapi()
    scopes = {
        (method, path.replace(":path", "")): scope for (method, path), scope in ACCESS.items()
    }
    lines = [
        "# API",
        "",
        MADE,
        "A running server has the same at `/openapi.json`, and `/docs` to try all of it.",
        "",
        "With API keys, send one as `Authorization: Bearer KEY` (or as `x-api-key`); it must have "
        "the scope of the call. Without any, everybody on this machine may call everything.",
        "",
        "## Errors",
        "",
        *_errors(document),
    ]
    calls = [
        (path, method.upper(), call)
        for path, methods in document["paths"].items()
        for method, call in methods.items()
    ]
    for tag, title in TAGS.items():
        lines += ["", f"## {title}"]
        if tag == "inference":
            lines += ["", *_which_adapter(document)]
        for path, method, call in calls:
            if call["tags"] == [tag]:
                lines += _call(document, method, path, call, scopes[method, path])
    missed = {call["tags"][0] for _, _, call in calls} - TAGS.keys()
    if missed:
        raise ValueError(f"calls with tags that have no title: {missed}")
    return "\n".join(lines) + "\n"


def _errors(document: Json) -> Iterator[str]:
    fields = document["components"]["schemas"]["Error"]["properties"]["error"]["properties"]
    problem = fields["problems"]["items"]["properties"]
    yield (
        f'`{{"error": {{{", ".join(fields)}}}}}`, where `problems`, if there, is a list of '
        f"`{{{', '.join(problem)}}}`. Anthropic's calls answer as Anthropic's do: "
        '`{"type": "error", "error": {type, message}}`. After a stream has begun, an error is an '
        "event of it."
    )
    yield ""
    yield from _rows(("status", "it means"), ((str(s), m) for s, m in MEANINGS.items()))


def _call(document: Json, method: str, path: str, call: Json, scope: str | None) -> Iterator[str]:
    yield from ("", f"### `{method} {path}`", "")
    text, _, _ = call.get("description", "").partition("\n\nScope:")
    yield " ".join(text.split())
    yield ""
    yield f"Scope: `{scope}`." if scope else "Scope: none, everybody may."
    if parameters := call.get("parameters"):
        yield ""
        yield from _rows(
            ("parameter", "in", "type", "default", ""),
            (
                (
                    f"`{each['name']}`" + (", required" if each.get("required") else ""),
                    each["in"],
                    _type(document, each["schema"]),
                    _default(each["schema"]),
                    each.get("description") or each["schema"].get("description", ""),
                )
                for each in parameters
            ),
        )
    for kind, content in call.get("requestBody", {}).get("content", {}).items():
        for schema in content["schema"].get("anyOf", [content["schema"]]):
            yield from _body(document, kind, schema)
    yield ""
    yield "Answers: " + "; ".join(_answers(call["responses"]))


def _which_adapter(document: Json) -> Iterator[str]:
    """What every body of an inference call can say."""
    fields = document["components"]["schemas"][ADAPTED]["properties"]
    yield "In every body of these calls:"
    yield ""
    said = {"model": "Any reference too, or the base's name: the protocols' own field for it."}
    yield from _rows(
        ("field", "type", ""),
        (
            (f"`{name}`", _type(document, fields[name]), fields[name].get("description") or text)
            for name, text in {"adapter": "", **said}.items()
        ),
    )
    yield ""
    yield (
        "The answer's headers say what answered: `x-loraplex-adapter`, `x-loraplex-version`, "
        "`x-loraplex-digest`, and what it waited for, `x-loraplex-queue-ms` and "
        "`x-loraplex-load-ms`; the base has none of them."
    )


def _body(document: Json, kind: str, schema: Json) -> Iterator[str]:
    name = schema.get("$ref", "").rpartition("/")[2]
    schema = _resolved(document, schema)
    required = schema.get("required", [])
    yield ""
    if name in PROTOCOLS:
        needed = ", ".join(f"`{each}`" for each in required) or "nothing"
        yield f"Body, `{kind}`: {PROTOCOLS[name]}. Required: {needed}."
        return
    yield f"Body, `{kind}`:"
    yield ""
    yield from _rows(
        ("field", "type", "default", ""),
        (
            (
                f"`{field}`" + (", required" if field in required else ""),
                _type(document, each),
                _default(each),
                each.get("description", ""),
            )
            for field, each in schema.get("properties", {}).items()
        ),
    )


def _answers(responses: Json) -> Iterator[str]:
    for status, response in responses.items():
        if status.startswith("2"):
            kinds = " or ".join(f"`{kind}`" for kind in response.get("content", {}))
            told = response["description"].rstrip(".")
            yield f"{status}, {kinds}" + ("" if told == "Successful Response" else f" ({told})")
    yield (
        "errors " + ", ".join(sorted(each for each in responses if not each.startswith("2"))) + "."
    )


def _resolved(document: Json, schema: Json) -> Json:
    while reference := schema.get("$ref"):
        schema = document["components"]["schemas"][reference.rpartition("/")[2]]
    return schema


def _type(document: Json, schema: Json) -> str:
    schema = _resolved(document, schema)
    if "enum" in schema:
        return " or ".join(f"`{each}`" for each in schema["enum"])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            kinds = [_type(document, each) for each in schema[several]]
            return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "null"))
    if schema.get("type") == "array":
        return f"list of {_type(document, schema.get('items', {}))}"
    if schema.get("format") == "binary":
        return "file"
    bounds = [
        f"{sign} {schema[key]:,.0f}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if key in schema and abs(schema[key]) < 2**53
    ]
    return " ".join([str(schema.get("type", "any")), ", ".join(bounds)]).strip()


def _default(schema: Json) -> str:
    default = schema.get("default")
    return "" if default in (None, "") else f"`{json.dumps(default, ensure_ascii=False)}`"


# -- settings -----------------------------------------------------------------------------------


def settings() -> str:
    """Every setting: its flag, its variable, what it can be and what it is by itself."""
    fields = Settings.model_fields
    rows = [
        (
            _flag(name, field.annotation),
            f"`{PREFIX}{name.upper()}`",
            _shown(field),
            field.description,
        )
        for name, field in fields.items()
        if name != "engine"
    ]
    lines = [
        "# Settings",
        "",
        MADE,
        "Flags of `loraplex serve` (of `make serve ARGS='…'` too), or variables of its "
        "environment; a flag goes before a variable. `loraplex serve --help` lists them as well.",
        "",
        *_rows(("flag", "variable", "default", ""), rows),
        "",
        "A flag without a value is turned off by `--no-…`, or by a variable that is `false`.",
        "",
        f"{fields['engine'].description} As a variable it is `{PREFIX}TENSOR_PARALLEL_SIZE=4`. "
        f"[vLLM's own reference]({VLLM_FLAGS}) has them. A name that neither knows ends the start "
        "with an error, as does a setting of vLLM's that would do nothing here.",
    ]
    return "\n".join(lines) + "\n"


def _flag(name: str, annotation: Any) -> str:
    flag = f"--{name.replace('_', '-')}"
    kinds = [each for each in get_args(annotation) or (annotation,) if each is not type(None)]
    if kinds == [bool]:
        return f"`{flag}`"
    if get_origin(annotation) is Literal:
        return f"`{flag} {'|'.join(get_args(annotation))}`"
    return f"`{flag} …`"


def _shown(field: Any) -> str:
    value = field.default
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value in ((), {}):
        return ""
    return f"`{value}`"


# -- series -------------------------------------------------------------------------------------


def metrics() -> str:
    """Every series at /metrics, those of a server that has answered."""
    ours, routers, engines, process = _families()
    lines = [
        "# Metrics",
        "",
        MADE,
        "`GET /metrics`, for Prometheus, with a key of scope `adapters:read` or "
        "`--metrics-without-key`. A counter's name ends in `_total`; a histogram has `_bucket`, "
        "`_sum` and `_count` behind its name. Times are in seconds.",
        "",
        "`adapter` is an adapter's name, the base's, or `_other`: only the `--metrics-adapters` "
        "busiest have series of their own.",
        "",
        "## Loraplex",
        "",
        *_listed(ours),
        "",
        "## For routers in front of several servers",
        "",
        "These have vLLM's names, which such routers look for, but are ours: adapters are in them "
        "by the names that clients write.",
        "",
        *_listed(routers),
        "",
        "## vLLM",
        "",
        "vLLM's own, of its engine; the descriptions are vLLM's. Adapters are not told apart in "
        "them: `model_name` is the base.",
        "",
        *_listed(engines),
        "",
        "## The server's process",
        "",
        "Of the Prometheus client library.",
        "",
        *_listed(process),
    ]
    return "\n".join(lines) + "\n"


class Series(NamedTuple):
    """One name at /metrics."""

    name: str
    kind: str
    text: str
    labels: tuple[str, ...]


def _families() -> tuple[list[Series], list[Series], list[Series], list[Series]]:
    """Ours, ours under vLLM's names, vLLM's, and those of the process."""
    process = _series_of(REGISTRY.collect())
    known = {each.name for each in process}
    ours = [each for each in asyncio.run(_collected()) if each.name not in known]
    known |= {each.name for each in ours}
    _register_vllm()
    engines = [each for each in _series_of(REGISTRY.collect()) if each.name not in known]
    plain = [each for each in ours if not each.name.startswith("vllm:")]
    return plain, [each for each in ours if each not in plain], engines, process


async def _collected() -> list[Series]:
    """What the server's collector yields, over the parts of a gateway that it reads."""
    residency = Residency(places=1, slots=1)
    gateway = SimpleNamespace(
        residency=residency,
        admission=Admission(Limits(slots=1, requests=1, prefill=1), residency.standing),
        under_way=lambda: 0,
        drift=[],
        refused=0,
    )
    nothing: Any = None  # the registry is asked by `look`, which is not called
    collector = Collector(lambda: cast(Gateway, gateway), lambda: 0, Traffic(1), nothing)
    return _series_of(collector.collect())


def _register_vllm() -> None:
    """Has vLLM register its series, as it does when an engine starts."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        args = launch.parse(Settings.read([]), Path(folder), ["q_proj"])
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    PrometheusStatLogger(config, [0]).log_engine_initialized()


def _series_of(metrics: Iterable[Metric]) -> list[Series]:
    found = set()
    for metric in metrics:
        # A family that has no sample yet knows its labels all the same.
        labels = list(getattr(metric, "_labelnames", ()))
        labels += [label for sample in metric.samples for label in sample.labels]
        named = tuple(label for label in dict.fromkeys(labels) if label != "le")
        name = metric.name + ("_total" if metric.type == "counter" else "")
        found.add(Series(name, metric.type, metric.documentation, named))
    return sorted(found)


def _listed(series: Iterable[Series]) -> Iterator[str]:
    return _rows(
        ("name", "type", "labels", ""),
        (
            (
                f"`{each.name}`",
                each.kind,
                ", ".join(f"`{label}`" for label in each.labels),
                each.text,
            )
            for each in series
        ),
    )


# -- Markdown -----------------------------------------------------------------------------------


def _rows(head: Sequence[str], rows: Iterable[Sequence[str | None]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        cells = (" ".join((cell or "").split()).replace("|", "\\|") for cell in row)
        yield f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m docs.generate", description=__doc__)
    parser.add_argument("--out", type=Path, default=REFERENCE, help="folder of the pages")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (args.out / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
