#!/usr/bin/env bash
# Runs a command against a server of its own: `deploy/with-server.sh COMMAND… ` gets `--url URL`
# appended. The server listens on LORAPLEX_PORT (default 8123) and ends with the command.
set -euo pipefail
cd "$(dirname "$0")/.."
port=${LORAPLEX_PORT:-8123}
log=.cache/with-server.log
mkdir -p .cache
.venv/bin/loraplex serve --port "$port" >"$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true' EXIT
echo "starting a server on port $port (log: $log)"
ready() { .venv/bin/python -c "import httpx; httpx.get('http://127.0.0.1:$port/ready').raise_for_status()" 2>/dev/null; }
until ready; do
  kill -0 "$server" 2>/dev/null || { tail -n 5 "$log" >&2; exit 1; }
  sleep 1
done
"$@" --url "http://127.0.0.1:$port"
