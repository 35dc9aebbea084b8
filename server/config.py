"""The settings of a server: one frozen object, from flags and the environment."""

import ipaddress
import math
import os
from argparse import Action, ArgumentParser
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    CliUnknownArgs,
    NoDecode,
    SettingsConfigDict,
)

from adapters.sources.address import Allowed

PREFIX = "LORAPLEX_"
CLIENTS = {"LORAPLEX_URL", "LORAPLEX_API_KEY"}  # which server commands ask, and with which key
DEFAULT_MODEL = "smollm2-135m-instruct"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def is_loopback(host: str | None) -> bool:
    """Whether only this machine can reach `host`, a name or an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


class ConfigError(Exception):
    """The settings cannot be used; the message names every problem, one a line."""


class UsageError(ConfigError):
    """They are not what settings are."""


class Settings(BaseSettings):
    """What an operator can set: `--port 80` or `LORAPLEX_PORT=80`. Any other flag goes to vLLM."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        extra="ignore",
        cli_kebab_case=True,
        cli_prog_name="loraplex serve",
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_ignore_unknown_args=True,
    )

    host: Annotated[str, Field(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535, description="Port to listen on.")] = 8000
    admin_key: Annotated[
        SecretStr | None,
        Field(
            min_length=16,
            description="An API key that may do everything, of at least 16 characters; better in "
            "the environment than as a flag, which others on the machine see.",
        ),
    ] = None
    insecure: Annotated[
        bool,
        Field(description="Without API keys, listen and answer to others than this machine."),
    ] = False
    metrics_without_key: Annotated[
        bool, Field(description="Answer /metrics, which names adapters, without an API key.")
    ] = False
    home: Annotated[
        Path, Field(description="Folder of all state: base models, adapter store, registry.")
    ] = Path("~/.local/share/loraplex")
    model: Annotated[
        str,
        Field(description="Base model: a local folder or a hub id; the default comes by package."),
    ] = DEFAULT_MODEL
    revision: Annotated[
        str | None, Field(description="Branch, tag or commit of a base model from the hub.")
    ] = None
    served_model_name: Annotated[
        str | None,
        Field(description="Name clients know the base by; `base` always works too."),
    ] = None
    max_loras: Annotated[
        int, Field(ge=1, description="Slots: how many different adapters one batch can use.")
    ] = 8
    max_cpu_loras: Annotated[
        int | None,
        Field(
            ge=1,
            description="Host cache: how many adapters the engine keeps loaded; 32, or as many "
            "as there are slots.",
        ),
    ] = None
    max_lora_rank: Annotated[
        int,
        Field(description=f"Highest rank an adapter may have: {', '.join(map(str, RANKS))}."),
    ] = 64
    max_model_len: Annotated[
        int | None,
        Field(ge=1, description="Longest prompt plus reply, in tokens; 2,048 without a GPU."),
    ] = None
    max_upload_mb: Annotated[
        int, Field(ge=1, description="Largest upload, in MB, unpacked bytes included.")
    ] = 2048
    import_from: Annotated[
        tuple[str, ...],
        NoDecode,
        Field(
            description="Where adapters may be imported from, several after commas: hf://org, "
            "hf://org/name, hf://* (any), s3://bucket/prefix, gs://…, az://…, file:///folder. "
            "Nowhere, if left out."
        ),
    ] = ()
    import_timeout: Annotated[
        int, Field(ge=1, description="Seconds that fetching one adapter may take.")
    ] = 3600
    watch: Annotated[
        Path | None,
        Field(
            description="Folder of PEFT folders: each is served under its own name for as long as "
            "it is there."
        ),
    ] = None
    allow_pickle: Annotated[
        bool,
        Field(
            description="Take adapter_model.bin too: it is read in a process of its own, with "
            "weights_only and limits of memory and time, and kept as safetensors."
        ),
    ] = False
    allow_noop: Annotated[
        bool, Field(description="Take adapters that leave what the base says as it is.")
    ] = False
    metrics_adapters: Annotated[
        int,
        Field(
            ge=1,
            description="How many adapters, the busiest, have series of their own at /metrics; "
            "the others share one.",
        ),
    ] = 50
    log_format: Annotated[
        Literal["text", "json"],
        Field(description="Log lines for people, or JSON with a line a request."),
    ] = "text"
    shutdown_grace: Annotated[
        float,
        Field(
            ge=0,
            description="Seconds that running requests have to end after SIGTERM or Ctrl-C; a "
            "second signal ends the server at once.",
        ),
    ] = 30
    demo_adapters: Annotated[
        bool, Field(description="Offer sql, code and poetry when the base is the default one.")
    ] = True
    weights: Annotated[
        dict[str, float],
        NoDecode,
        Field(
            description="Shares of adapters where they compete, like sql=3,base=2; 1 for those "
            "that are not named."
        ),
    ] = {}
    max_waiting: Annotated[
        int, Field(ge=1, description="Requests that may wait for their turn; more get a 429.")
    ] = 2048
    max_waiting_per_adapter: Annotated[
        int, Field(ge=1, description="The same, for one adapter or the base.")
    ] = 512
    max_waiting_per_key: Annotated[int, Field(ge=1, description="The same, with one API key.")] = (
        1024
    )
    queue_timeout: Annotated[
        float, Field(gt=0, description="Seconds that a request may wait for its turn.")
    ] = 600
    load_timeout: Annotated[
        float, Field(gt=0, description="Seconds that loading an adapter from disk may take.")
    ] = 60
    engine_timeout: Annotated[
        float,
        Field(
            gt=0,
            description="Seconds that the engine may be silent with work to do; then it is "
            "started anew.",
        ),
    ] = 120
    compile: Annotated[
        bool | None,
        Field(
            description="Run the model through torch.compile: about a minute at the first start, a "
            "few seconds at later ones. Without a GPU and where this is left out, only what an "
            "earlier start has compiled is used."
        ),
    ] = None
    cpu_lora_op: Annotated[
        bool,
        Field(
            description="Without a GPU, apply adapters by the op made for that; without it they "
            "are exact as well, but slow: for comparison."
        ),
    ] = True
    engine: Annotated[
        CliUnknownArgs,
        Field(
            description="Any other flag goes to vLLM by its name, e.g. --tensor-parallel-size 4."
        ),
    ]

    @field_validator("import_from", mode="before")
    @classmethod
    def _apart(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("import_from")
    @classmethod
    def _prefixes(cls, prefixes: tuple[str, ...]) -> tuple[str, ...]:
        Allowed(prefixes)
        return prefixes

    @field_validator("weights", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [part.rpartition("=") for part in value.split(",") if part.strip()]
        for name, sign, weight in pairs:
            if not sign or not name.strip():
                raise ValueError(f"write NAME=NUMBER, several after commas, not {name + weight}")
        return {name.strip(): weight for name, _, weight in pairs}

    @field_validator("weights")
    @classmethod
    def _shares(cls, weights: dict[str, float]) -> dict[str, float]:
        for name, weight in weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"the share of {name} must be above 0, not {weight}")
        return weights

    @field_validator("max_lora_rank")
    @classmethod
    def _rank_that_vllm_takes(cls, rank: int) -> int:
        if rank not in RANKS:
            raise ValueError(f"it can be {', '.join(map(str, RANKS))}, not {rank}")
        return rank

    @model_validator(mode="after")
    def _host_holds_slots(self) -> "Settings":
        if self.host_capacity < self.max_loras:
            raise ValueError(
                f"max_cpu_loras ({self.max_cpu_loras}) must be at least max_loras "
                f"({self.max_loras}): what is in a slot is in the host cache as well"
            )
        return self

    @classmethod
    def read(cls, arguments: list[str]) -> "Settings":
        """Settings from command line `arguments`, then the environment, then the defaults.

        `LORAPLEX_X` that is none of ours, nor in CLIENTS, is handed to vLLM as `--x`, as an unknown
        flag is; what vLLM does not know either is an error when the engine's arguments are parsed.

        Raises:
            UsageError: a value that is not what it must be, or what is no flag.
            SystemExit: `--help` was asked for (it has been printed).
        """
        source: CliSettingsSource[Any] = CliSettingsSource(
            cls, cli_parse_args=arguments, add_argument_method=_add_argument
        )
        try:
            settings = cls(_cli_settings_source=source)  # type: ignore[call-arg]
        except ValidationError as error:
            raise UsageError("\n".join(_explain(error))) from None
        if settings.engine and not settings.engine[0].startswith("-"):
            word = settings.engine[0]
            raise UsageError(f"{word} belongs to no flag; a base model is named by --model {word}")
        engine = [*_engine_flags_of_environment(cls), *settings.engine]
        return settings.model_copy(
            update={"engine": engine, "home": settings.home.expanduser().absolute()}
        )

    @property
    def host_capacity(self) -> int:
        """Adapters that the engine keeps loaded at once."""
        return max(32, self.max_loras) if self.max_cpu_loras is None else self.max_cpu_loras

    @property
    def admin_token(self) -> str | None:
        """The key that may do everything, if the operator has given one."""
        return self.admin_key.get_secret_value() if self.admin_key else None

    @property
    def max_upload_bytes(self) -> int:
        """The largest adapter that is taken in, from wherever it comes."""
        return self.max_upload_mb * 10**6

    @property
    def base_name(self) -> str:
        """The name the base model is served by."""
        if self.served_model_name:
            return self.served_model_name
        return Path(self.model).name if Path(self.model).expanduser().is_dir() else self.model


# What `--help` calls values: pydantic-settings has the names of Python's types.
_VALUES = {
    "str": "TEXT",
    "int": "N",
    "float": "N",
    "Path": "PATH",
    "SecretStr": "KEY",
    "tuple[str,...]": "TEXT,…",
    "dict[str,float]": "NAME=N,…",
}


def _add_argument(parser: ArgumentParser, *names: str, **about: Any) -> Action:
    if "metavar" in about:
        about["metavar"] = _VALUES.get(about["metavar"], about["metavar"])
    for nothing in ("None", "()", "{}"):
        about["help"] = about["help"].removesuffix(f" (default: {nothing})")
    return parser.add_argument(*names, **about)


def _engine_flags_of_environment(settings: type[Settings]) -> list[str]:
    flags: list[str] = []
    ours = CLIENTS | {PREFIX + name.upper() for name in settings.model_fields}
    for variable, value in sorted(os.environ.items()):
        if not variable.startswith(PREFIX) or variable in ours:
            continue
        name = variable.removeprefix(PREFIX).lower().replace("_", "-")
        if value.lower() in ("true", "false"):
            flags.append(f"--{name}" if value.lower() == "true" else f"--no-{name}")
        else:
            flags += [f"--{name}", value]
    return flags


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        name = str(problem["loc"][0]) if problem["loc"] else ""
        flag = f"--{name.replace('_', '-')} / {PREFIX}{name.upper()}: " if name else ""
        lines.append(flag + problem["msg"].removeprefix("Value error, "))
    return lines
