#!/usr/bin/env bash
# Builds the CPU LoRA op under AddressSanitizer, beside the normal one, and runs its tests with it.
# Python itself is not instrumented: the sanitizer's library comes first by LD_PRELOAD, and leaks,
# of which an interpreter has many by design, are not reported. -s: a report is not swallowed.
set -euo pipefail
cd "$(dirname "$0")/.."
export _LORAPLEX_CXXFLAGS="-fsanitize=address -fno-omit-frame-pointer -g"
library=$(.venv/bin/python -c 'from server.engine.cpu import build; print(build.build())')
trap 'rm -f "$library"' EXIT
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0 .venv/bin/python -m pytest -s tests/server/test_cpu_op.py "$@"
