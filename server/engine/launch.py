"""Settings → vLLM's arguments → a running engine."""

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NoReturn

from server.config import ConfigError, Settings
from server.engine.plugin import OUR_WRAPPER

WORKER_EXTENSION = "server.engine.plugin.WorkerExtension"
CPU_CONTEXT = 2048  # tokens; prefill without a GPU takes seconds from here on
CPU_KV_CACHE_GIB = "1"  # vLLM zeroes it at start: 4 GiB, its default, takes 11 s on two cores

# Set for vLLM where the operator has not: quiet, no telemetry, and a start method under which
# the engine's processes run our plugin from the beginning.
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_KVCACHE_SPACE": CPU_KV_CACHE_GIB,
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::UserWarning:multiprocessing.resource_tracker",
}


def prepare_environment() -> None:
    """Sets what vLLM reads from the environment; to be called before anything imports it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "loraplex" not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = f"{allowed},loraplex".lstrip(",")


def parse(settings: Settings, folder: Path, linears: list[str]) -> Namespace:
    """vLLM's parsed arguments for `settings`, a base in `folder` and adapters on `linears`.

    `linears` are last components of module names (`q_proj`). Naming them keeps vLLM from wrapping
    embeddings and logits, which no adapter here may target, and which cost memory and time.

    Raises:
        ConfigError: a flag that neither we nor vLLM know, or a value vLLM does not take.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ConfigError(f"{message} (a flag goes to vLLM when it is none of loraplex's own)")

    arguments = [
        *("--model", str(folder)),
        *("--served-model-name", settings.base_name, "base"),
        "--enable-lora",
        *("--max-loras", str(settings.max_loras)),
        *("--max-cpu-loras", str(settings.host_capacity)),
        *("--max-lora-rank", str(settings.max_lora_rank)),
        *("--lora-target-modules", *linears),
        *("--worker-extension-cls", WORKER_EXTENSION),
    ]
    length = settings.max_model_len
    if length is None and current_platform.is_cpu():
        length = min(CPU_CONTEXT, _context(folder))
    if length is not None:
        arguments += ["--max-model-len", str(length)]
    try:
        # vLLM calls sys.exit for some values; here every bad value is an error of the settings.
        args = make_arg_parser(Parser()).parse_args([*arguments, *settings.engine])
        validate_parsed_serve_args(args)
    except (SystemExit, TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses its arguments: {error}") from None
    return args  # type: ignore[no-any-return]


def _context(folder: Path) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    return int(getattr(config, "max_position_embeddings", CPU_CONTEXT))


def start(args: Namespace) -> Any:
    """A running vLLM engine (AsyncLLM); returns when it can answer. Blocks: call it in a thread.

    Raises:
        ConfigError: vLLM cannot run this model with these arguments.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    engine_args = AsyncEngineArgs.from_cli_args(args)
    try:
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    except (ValueError, OSError, NotImplementedError) as error:
        raise ConfigError(f"vLLM cannot serve {args.model}: {_first_reason(error)}") from None
    return AsyncLLM.from_vllm_config(
        config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=args.enable_log_requests,
        disable_log_stats=args.disable_log_stats,
    )


def _first_reason(error: Exception) -> str:
    # pydantic puts a count and the class first, the reason on the third line
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if "error" in line.lower() and " for " not in line), lines[0]
    )


async def verify(engine: Any) -> None:
    """Makes sure that every worker applies adapters by the op it should.

    Raises:
        RuntimeError: one does not; base rows in its batches would come back wrong.
    """
    from vllm.platforms import current_platform

    for found in await engine.collective_rpc("loraplex_lora_op"):
        if current_platform.is_cpu() and found != OUR_WRAPPER:
            raise RuntimeError(
                f"a worker applies adapters by {found}, not {OUR_WRAPPER}: is the loraplex package "
                f"installed in {sys.prefix}?"
            )
