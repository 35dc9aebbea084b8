"""Settings → vLLM's arguments → a running engine."""

import hashlib
import os
import platform
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from server.config import DEFAULT_MODEL, ConfigError, Settings, UsageError
from server.engine import plugin, progress
from server.lifeline import Processes

COMPILED = "_LORAPLEX_COMPILED"  # the file that remembers what this start compiles or loads
WORKER_EXTENSION = "server.engine.plugin.WorkerExtension"
CPU_CONTEXT = 2048  # tokens; prefill without a GPU takes seconds from here on
CPU_KV_CACHE_GIB = "1"  # vLLM zeroes it at start: 4 GiB, its default, takes 11 s on two cores

FEW_CORES = 4  # of more, vLLM may keep one free of computing, as it does of any number by itself

# Flags of vLLM's HTTP server that its handlers read, and that we hand on therefore. The others
# (--api-key, --ssl-keyfile…) would be silently without effect, so they are refused.
HANDLED = {
    "anthropic_disabled_thinking_effort",
    "chat_template",
    "chat_template_content_format",
    "default_chat_template_kwargs",
    "enable_auto_tool_choice",
    "enable_force_include_usage",
    "enable_log_deltas",
    "enable_log_outputs",
    "enable_per_request_metrics",
    "enable_prompt_tokens_details",
    "exclude_tools_when_tool_choice_none",
    "fingerprint_mode",
    "fingerprint_value",
    "log_error_stack",
    "max_log_len",
    "response_role",
    "return_tokens_as_token_ids",
    "tool_call_parser",
    "tool_server",
    "tool_strict_level",
    "trust_request_chat_template",
    "trust_request_mm_kwargs",
}
RESERVED = {
    "default_mm_loras",
    "enable_lora",
    "fully_sharded_loras",
    "lora_dtype",
    "lora_target_modules",
    "worker_extension_cls",
}

LORA = "--enable-lora"

# Set for vLLM where the operator has not: quiet, no telemetry, and a start method under which
# the engine's processes run our plugin from the beginning.
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_KVCACHE_SPACE": CPU_KV_CACHE_GIB,
    # oneDNN keeps a kernel for each product with each number of rows that it has met, up to 1024:
    # hundreds of MB, which a night fills. vLLM keeps the latest itself, and to make one again takes
    # a hundredth of the step that it is for.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCHDYNAMO_SUPPRESS_ERRORS": "1",  # where compiling fails, the engine goes on without
    "TORCH_LOGS": "-torch._library.triton",  # or each process says that there is none
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::UserWarning:multiprocessing.resource_tracker",
}


def prepare_environment(home: Path, cpu_lora_op: bool = True) -> None:
    """Sets what vLLM and our plugin read from the environment, before anything imports them.

    What vLLM compiles and caches then lives under `home`, apart for each kind of CPU: it is code
    for one, and would give wrong numbers on another.
    """
    wanted = ENVIRONMENT | {"VLLM_CACHE_ROOT": str(home / "engine" / _cpu())}
    if not cpu_lora_op:
        wanted[plugin.FORM] = "off"
    if len(os.sched_getaffinity(0)) <= FEW_CORES:
        wanted["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "loraplex" not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = f"{allowed},loraplex".lstrip(",")


def _cpu() -> str:
    """A short name of what this CPU can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:12]


def parse(settings: Settings, folder: Path, linears: list[str]) -> Namespace:
    """vLLM's parsed arguments for `settings`, a base in `folder` and adapters on `linears`.

    `linears` are last components of module names (`q_proj`). Naming them keeps vLLM from wrapping
    embeddings and logits, which no adapter here may target, and which cost memory and time.

    Raises:
        UsageError: a flag that neither we nor vLLM know, or a value vLLM does not take.
        ConfigError: what cannot be done here, or with this model.
    """
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args
    from vllm.platforms import current_platform

    parser = check_flags(settings.engine)
    arguments = [
        *("--model", str(folder.resolve())),  # what is compiled is kept by this path
        *("--served-model-name", settings.base_name, "base"),
        LORA,
        *("--max-loras", str(settings.max_loras)),
        *("--max-cpu-loras", str(settings.host_capacity)),
        *("--max-lora-rank", str(settings.max_lora_rank)),
        *("--lora-target-modules", *linears),
        *("--worker-extension-cls", WORKER_EXTENSION),
        "--no-use-tqdm-on-load",
    ]
    if settings.model == DEFAULT_MODEL:
        # A model this small calls tools in form only where its tokens are held to their schema.
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
        arguments += ["--tool-strict-level", "parameter"]
    compiles = can_compile()
    if settings.compile and not compiles:
        raise ConfigError("--compile: there is no C++ compiler here (apt-get install g++)")
    if settings.compile is False or not compiles:
        arguments.append("--enforce-eager")
    length = settings.max_model_len
    if length is None and current_platform.is_cpu():
        length = min(CPU_CONTEXT, _context(folder))
    if length is not None:
        arguments += ["--max-model-len", str(length)]
    args: Namespace = parser.parse_args([*arguments, *settings.engine])
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM: {_reason(error)}") from None
    if args.dtype == "auto" and slow_in_bf16() and not _quantized(args, folder):
        args.dtype = "float32"
    return args


def check_flags(engine: list[str]) -> ArgumentParser:
    """vLLM's parser, if it takes the flags in `engine`, and none of them is ours to choose.

    Needs no model, but imports vLLM, which takes seconds. Raises UsageError.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise UsageError(f"vLLM: {message}")

    try:
        parser: ArgumentParser = make_arg_parser(Parser())
    except plugin.UnexpectedVllmError as error:
        raise ConfigError(str(error)) from None
    args, unknown = parser.parse_known_args([LORA, *engine])
    if unknown:
        raise UsageError(
            f"neither loraplex nor vLLM has the setting {' '.join(unknown)} (as a flag, or in the "
            "environment, where --max-loras is LORAPLEX_MAX_LORAS)"
        )
    if args.model_tag is not None:
        raise UsageError(f"{args.model_tag} belongs to no flag")
    _refuse_unused(args, parser.parse_args([LORA]))
    return parser


def dtype(args: Namespace, folder: Path) -> str:
    """The type that the engine computes with, and therefore loads adapters in: BF16, F16 or F32.

    A model in float32 is served in bfloat16 unless the arguments say otherwise, as vLLM does where
    the hardware has it; `parse` says otherwise for a CPU that has not.
    """
    wanted = args.dtype
    if wanted == "auto":
        stored = _config(folder).get_text_config().dtype
        wanted = {"torch.float16": "half"}.get(str(stored), "bfloat16")
    return {"half": "F16", "float16": "F16", "float": "F32", "float32": "F32"}.get(wanted, "BF16")


def _refuse_unused(args: Namespace, ours: Namespace) -> None:
    """Raises UsageError for settings of vLLM's HTTP server, or ones that only we may choose."""
    from vllm.entrypoints.launchers.cli_args import FrontendArgs

    unused = {field.name for field in fields(FrontendArgs)} - HANDLED | RESERVED
    for name in sorted(unused & vars(ours).keys()):
        if getattr(args, name) != getattr(ours, name):
            raise UsageError(
                f"--{name.replace('_', '-')} is a setting of vLLM's own server or of its LoRA "
                "loading, which Loraplex has its own way of; it would do nothing here"
            )


def _context(folder: Path) -> int:
    text = _config(folder).get_text_config()
    return int(getattr(text, "max_position_embeddings", CPU_CONTEXT))


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def _quantized(args: Namespace, folder: Path) -> bool:
    return bool(args.quantization or getattr(_config(folder), "quantization_config", None))


def slow_in_bf16() -> bool:
    """Whether the engine is on a CPU for which oneDNN has no bf16 kernels: products of more than a
    few rows then take several times as long as in float32."""
    import torch
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu() and torch.backends.cpu.get_cpu_capability() == "AVX2")


def can_compile() -> bool:
    """Whether torch.compile can work here: on a CPU it needs a C++ compiler."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu() or bool(shutil.which(os.environ.get("CXX", "g++")))


def start(args: Namespace, compile: bool | None = None, say: Callable[[str], None] = print) -> Any:
    """A running vLLM engine (AsyncLLM); returns when it can answer. Blocks: call it in a thread.

    `compile` is the setting; what takes long is announced by `say`.

    Raises:
        ConfigError: vLLM cannot run this model with these arguments.
    """
    from vllm.config import CompilationMode
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    if not can_compile():
        # vLLM compiles some of its sampling whatever it is told, and would end at the first try.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    engine_args = AsyncEngineArgs.from_cli_args(args)

    def configure() -> Any:
        try:
            return engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
        except (ValueError, OSError, NotImplementedError) as error:
            raise ConfigError(f"vLLM cannot serve {args.model}: {_reason(error)}") from None

    config = configure()
    if args.dtype == "float32" and slow_in_bf16():
        say("this CPU is slow in bfloat16, so it is float32 (--dtype bfloat16: half the memory)")
    os.environ.pop(COMPILED, None)
    if current_platform.is_cpu() and config.compilation_config.mode != CompilationMode.NONE:
        compiled = _compiled(config)
        if compiled.exists() or compile:
            os.environ[COMPILED] = str(compiled)
        if compile and not compiled.exists():
            say("compiling the model: about a minute, once; later starts load the result")
        elif not compiled.exists():
            say("the model runs uncompiled: --compile compiles it once, for this and later starts")
            engine_args.enforce_eager = True
            config = configure()
    progress.passed("imports", "starting the engine's process")
    loggers = None if args.disable_log_stats else [_statistics()]
    return AsyncLLM.from_vllm_config(
        config,
        stat_loggers=loggers,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=args.enable_log_requests,
        disable_log_stats=args.disable_log_stats,
    )


def _statistics() -> Any:
    """vLLM's Prometheus series, but for the one that names adapters.

    In the engine they go by their digests, which mean nothing to who reads it, and it keeps a
    series for every set of adapters that there has ever been. /metrics has one in its place.
    """
    from prometheus_client import REGISTRY
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class Statistics(PrometheusStatLogger):  # type: ignore[misc]
        gauge_lora_info: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.gauge_lora_info is not None:
                REGISTRY.unregister(self.gauge_lora_info)
                self.gauge_lora_info = None

    return Statistics


def _compiled(config: Any) -> Path:
    """A file that is there when a start with this configuration has compiled the model."""
    from vllm import envs
    from vllm.compilation.caching import aot_compile_hash_factors

    traced = Path(__file__).with_name("cpu") / "punica.py"
    key = hashlib.sha256(str(aot_compile_hash_factors(config)).encode())
    key.update(platform.python_version().encode() + traced.read_bytes())
    return Path(envs.VLLM_CACHE_ROOT, "loraplex-compiled", key.hexdigest()[:16])


def _reason(error: Exception) -> str:
    said = [each["msg"] for each in error.errors()] if isinstance(error, ValidationError) else []
    return " ".join("; ".join(said or [str(error)]).split())


def limits(engine: Any) -> tuple[int, int]:
    """Sequences that the engine runs at once, and tokens that one step takes."""
    scheduler = engine.vllm_config.scheduler_config
    return scheduler.max_num_seqs, scheduler.max_num_batched_tokens


def processes(engine: Any) -> Processes:
    """The engine's processes."""
    manager = getattr(engine.engine_core.resources, "engine_manager", None)
    return Processes([each.pid for each in manager.processes] if manager else [])


def end(engine: Any, processes: Processes) -> None:
    """Ends an engine that is dead or hangs; whoever waits for it gets vLLM's EngineDeadError.

    Blocks for seconds: call it in a thread.
    """
    processes.kill()
    engine.engine_core.resources.engine_dead = True
    engine.shutdown(timeout=0)


def release(engine: Any) -> None:
    """Ends every request of an engine that will give no more; on the event loop."""
    from vllm.v1.engine.exceptions import EngineDeadError

    engine.output_processor.propagate_error(EngineDeadError())


async def verify(engine: Any) -> list[str]:
    """Makes sure that every worker applies adapters by the op it should.

    Returns what an operator should know about how this engine runs, a sentence each.

    Raises:
        RuntimeError: a worker uses another op; base rows in its batches would come back wrong.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    states = await engine.collective_rpc("loraplex_state")
    for state in states:
        if state["wrapper"] != plugin.wrapper() or not state["replaced"]:
            raise RuntimeError(
                f"a worker applies adapters by {state['wrapper']}, not {plugin.wrapper()}: is the "
                f"loraplex package installed in {sys.prefix}?"
            )
    if COMPILED in os.environ and all(state["compiled"] for state in states):
        _remember(Path(os.environ[COMPILED]))
    return _remarks(states[0])


def _remember(compiled: Path) -> None:
    compiled.parent.mkdir(parents=True, exist_ok=True)
    compiled.touch()


def _remarks(worker: dict[str, Any]) -> list[str]:
    remarks = []
    if worker["stages"]:
        took = progress.summary(worker["stages"], "the rest")
        remarks.append(f"the start took, in seconds: {took}")
    if worker["form"] == "off":
        remarks.append("adapters are applied the slow way: --no-cpu-lora-op")
    elif worker["form"] == "torch":
        remarks.append(
            f"the CPU LoRA op is not the compiled one ({worker['why']}): adapters are exact, but "
            "slower (python -m server.engine.cpu.build compiles it, or says why it cannot)"
        )
    return remarks
