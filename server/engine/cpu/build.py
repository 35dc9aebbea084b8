"""Compiles the CPU LoRA op: `python -m server.engine.cpu.build`, once, at installation.

The library lies beside its sources, under a name that says what it was built from, so that one
built from other sources or for another torch is never loaded.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("kernels.h", "kernels.cpp", "op.cpp")
# Not contracted by the compiler's choice: a row's bits must not depend on how a loop was unrolled.
COMMON = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-ffp-contract=off"]
MORE = os.environ.get("_LORAPLEX_CXXFLAGS", "").split()  # for a build under a sanitizer
X86 = ("x86_64", "AMD64")
# Instruction sets that kernels.cpp is compiled for, and what has to be there at run time.
INSTRUCTION_SETS = {
    "avx512": (["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mfma"], ("avx512bf16",)),
    "avx2": (["-mavx2", "-mfma", "-mf16c"], ("avx2", "fma")),
    "generic": ([], ()),
}


class BuildError(Exception):
    """The op cannot be compiled here; the message says why."""


def library() -> Path:
    """Where the library built from these sources for this torch is, or would be."""
    import torch

    key = hashlib.sha256(f"{torch.__version__} {platform.machine()}".encode())
    key.update(" ".join(MORE).encode())
    for name in (*SOURCES, Path(__file__).name):
        key.update((HERE / name).read_bytes())
    return HERE / f"libloraplex-{key.hexdigest()[:16]}.so"


def build() -> Path:
    """Compiles and links; returns the library.

    Raises:
        BuildError: no compiler, or it failed; the message has its first error.
    """
    named = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    compiler = shlex.split(named or "")
    if not compiler:
        raise BuildError("there is no C++ compiler (apt-get install g++)")
    target = library()
    with _scratch() as scratch:
        objects = [
            _compile(compiler, Path(scratch), name, *flags_of(name))
            for name in INSTRUCTION_SETS
            if name == "generic" or platform.machine() in X86
        ]
        objects.append(_compile_op(compiler, Path(scratch)))
        linked = Path(scratch) / target.name
        _run(*compiler, "-shared", *MORE, *objects, "-o", linked, *_torch_libraries(), "-fopenmp")
        linked.replace(target)
    return target


def flags_of(instruction_set: str) -> list[str]:
    """Compiler flags with which kernels.cpp becomes the kernels of `instruction_set`."""
    flags, needs = INSTRUCTION_SETS[instruction_set]
    available = " && ".join(["true", *(f'__builtin_cpu_supports("{need}")' for need in needs)])
    return [
        *flags,
        f"-DKERNELS=kernels_{instruction_set}",
        f'-DNAME="{instruction_set}"',
        f"-DAVAILABLE={available}",
    ]


def _compile(compiler: list[str], scratch: Path, name: str, *flags: str) -> Path:
    return _object(compiler, HERE / "kernels.cpp", scratch / f"{name}.o", *flags)


def _compile_op(compiler: list[str], scratch: Path) -> Path:
    import torch
    from torch.utils.cpp_extension import include_paths

    flags = [f"-isystem{path}" for path in include_paths()]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    if platform.machine() in X86:
        flags.append("-DLORAPLEX_X86")
    return _object(compiler, HERE / "op.cpp", scratch / "op.o", "-fopenmp", *flags)


def _object(compiler: list[str], source: Path, target: Path, *flags: str) -> Path:
    _run(*compiler, *COMMON, *MORE, *flags, "-c", source, "-o", target)
    return target


def _torch_libraries() -> list[str]:
    import torch

    folder = Path(torch.__file__).parent / "lib"
    return [f"-L{folder}", "-ltorch", "-ltorch_cpu", "-lc10"]


def _scratch() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(dir=HERE, prefix=".build-")
    except OSError as error:
        raise BuildError(f"{HERE} cannot be written to: {error.strerror}") from None


def _run(*command: str | Path) -> None:
    try:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)  # noqa: S603
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{Path(command[0]).name}: {first}")


def main() -> None:
    """Builds, and says what came of it. A failure is a warning: the server has a slower form."""
    try:
        print(f"compiled the CPU LoRA op: {build().name}")
    except (BuildError, OSError) as error:
        print(
            f"warning: the CPU LoRA op was not compiled: {error}. Adapters are exact without it, "
            "but slower; `python -m server.engine.cpu.build` tries again.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
