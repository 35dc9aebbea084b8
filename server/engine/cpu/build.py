"""Compiles the CPU LoRA op: `python -m server.engine.cpu.build`, once, at installation.

The library lies beside its sources, under a name that says what it was built from, so that one
built from other sources or for another torch is never loaded.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("kernels.h", "kernels.cpp", "op.cpp")
COMMON = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall"]
MORE = os.environ.get("_LORAPLEX_CXXFLAGS", "").split()  # for a build under a sanitizer
X86 = ("x86_64", "AMD64")
# Instruction sets that kernels.cpp is compiled for, and what has to be there at run time.
INSTRUCTION_SETS = {
    "avx512": (["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mfma"], "avx512bf16"),
    "avx2": (["-mavx2", "-mfma", "-mf16c"], "avx2"),
    "generic": ([], None),
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
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise BuildError("there is no C++ compiler (apt-get install g++)")
    target = library()
    with tempfile.TemporaryDirectory(dir=_writable(HERE), prefix=".build-") as scratch:
        objects = [
            _compile(compiler, Path(scratch), name, *flags_of(name))
            for name in INSTRUCTION_SETS
            if name == "generic" or platform.machine() in X86
        ]
        objects.append(_compile_op(compiler, Path(scratch)))
        linked = Path(scratch) / target.name
        _run(compiler, "-shared", *MORE, *objects, "-o", linked, *_torch_libraries(), "-fopenmp")
        for old in HERE.glob("libloraplex-*.so") if not MORE else ():
            old.unlink()
        linked.rename(target)
    return target


def flags_of(instruction_set: str) -> list[str]:
    """Compiler flags with which kernels.cpp becomes the kernels of `instruction_set`."""
    flags, needs = INSTRUCTION_SETS[instruction_set]
    available = f'__builtin_cpu_supports("{needs}")' if needs else "true"
    return [
        *flags,
        f"-DKERNELS=kernels_{instruction_set}",
        f'-DNAME="{instruction_set}"',
        f"-DAVAILABLE={available}",
    ]


def _compile(compiler: str, scratch: Path, name: str, *flags: str) -> Path:
    return _object(compiler, HERE / "kernels.cpp", scratch / f"{name}.o", *flags)


def _compile_op(compiler: str, scratch: Path) -> Path:
    import torch
    from torch.utils.cpp_extension import include_paths

    flags = [f"-isystem{path}" for path in include_paths()]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    if platform.machine() in X86:
        flags.append("-DX86")
    return _object(compiler, HERE / "op.cpp", scratch / "op.o", "-fopenmp", *flags)


def _object(compiler: str, source: Path, target: Path, *flags: str) -> Path:
    _run(compiler, *COMMON, *MORE, *flags, "-c", source, "-o", target)
    return target


def _torch_libraries() -> list[str]:
    import torch

    folder = Path(torch.__file__).parent / "lib"
    return [f"-L{folder}", "-ltorch", "-ltorch_cpu", "-lc10"]


def _writable(folder: Path) -> Path:
    if not os.access(folder, os.W_OK):
        raise BuildError(f"{folder} cannot be written to")
    return folder


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{Path(command[0]).name}: {first}")


def main() -> None:
    """Builds, and says what came of it. A failure is a warning: the server has a slower form."""
    try:
        print(f"compiled the CPU LoRA op: {build().name}")
    except BuildError as error:
        print(
            f"warning: the CPU LoRA op was not compiled: {error}. Adapters are exact without it, "
            "but slower; `python -m server.engine.cpu.build` tries again.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
