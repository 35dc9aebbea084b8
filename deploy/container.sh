#!/usr/bin/env bash
# Builds the CPU image and tries it, where no container engine runs: buildah, with a Debian base of its
# own. Uploads an adapter to the running container, asks it, and ends it.
# As root: `deploy/container.sh [WORK_FOLDER]`; about 10 GB are needed there.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-.cache/container}
port=$(python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
die() { printf 'container: %s\n' "$*" >&2; exit 1; }

mkdir -p "$work"
work=$(cd "$work" && pwd)
if ! command -v buildah >/dev/null || ! command -v debootstrap >/dev/null; then
  say "installing buildah and debootstrap"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends --yes buildah debootstrap >/dev/null
fi
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
buildah() { command buildah --root "$work/storage" --runroot "$work/run" "$@"; }

if [ ! -e "$work/base.tar" ]; then
  say "a Debian base with Python"
  rm -rf "$work/root"
  debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$work/root" >"$work/base.log" ||
    die "debootstrap failed: $work/base.log"
  tar -C "$work/root" -cf "$work/base.tar" . && rm -rf "$work/root"
fi
container=$(buildah from scratch)
buildah add "$container" "$work/base.tar" / >/dev/null
buildah commit --quiet --rm "$container" loraplex-base >/dev/null

# What is installed is fetched out here, by a pip that knows this machine's mirrors and certificates.
if [ ! -e "$work/wheels/all" ]; then
  say "fetching what goes into it"
  python3 -m pip -qq wheel --no-deps --wheel-dir "$work/wheels" -r locks/torch-cpu.txt -r locks/cpu.txt
  touch "$work/wheels/all"
fi
printf '[global]\nno-index = true\nfind-links = /wheels\n' >"$work/pip.conf"

say "building the image"
buildah build --volume "$work/pip.conf:/etc/pip.conf:ro" --volume "$work/wheels:/wheels:ro" \
  --target cpu --build-arg PYTHON_IMAGE=localhost/loraplex-base \
  --tag loraplex . >"$work/build.log" 2>&1 || { tail -n 30 "$work/build.log" >&2; die "the build failed"; }
buildah images --filter reference=loraplex --format '{{.Name}}: {{.Size}}'

say "starting it"
container=$(buildah from loraplex)
mount=$(buildah mount "$container")
for tool in g++ gcc cc make ld; do
  [ ! -e "$mount/usr/bin/$tool" ] || die "the image has $tool in it"
done
rm -rf "$work/state" && install --directory --owner=10001 --group=10001 "$work/state"
touch "$work/started"
key=$(head -c 24 /dev/urandom | base64 | tr -d '+/=')
run() {
  buildah run --env "LORAPLEX_ADMIN_KEY=$key" --env LORAPLEX_HOST=127.0.0.1 --env "LORAPLEX_PORT=$port" \
    --volume "$work/state:/var/lib/loraplex" "$container" -- "$@"
}
run loraplex serve >"$work/server.log" 2>&1 &
server=$!
end() { # the server itself: what runs it does not hand signals on
  [ ! -s "$work/state/lock" ] || kill -TERM "$(cat "$work/state/lock")"
}
trap '! kill -0 "$server" 2>/dev/null || { end; wait "$server" || true; }; buildah rm "$container" >/dev/null' EXIT
url=http://127.0.0.1:$port
call() { curl --silent --show-error --fail-with-body --header "Authorization: Bearer $key" "$@"; }
for _ in $(seq 300); do
  kill -0 "$server" 2>/dev/null || { tail -n 20 "$work/server.log" >&2; die "the server has ended"; }
  ! curl --silent --fail "$url/ready" >/dev/null || break
  sleep 1
done
curl --silent --fail "$url/ready" || die "the server is not ready: $work/server.log"

say "an upload, and a chat with it"
weights=adapters/demo/weights/sql
call "$url/v1/adapters" --form name=mine --form "files=@$weights/adapter_config.json" \
  --form "files=@$weights/adapter_model.safetensors" | cut --characters=-300
echo
call "$url/v1/chat/completions" --header 'content-type: application/json' --data \
  '{"adapter": "mine", "max_tokens": 16, "messages": [{"role": "user", "content": "How many readers live in Oslo?"}]}'
echo
[ "$(curl --silent --output /dev/null --write-out '%{http_code}' "$url/v1/models")" = 401 ] ||
  die "it answers without a key"
token=$(run loraplex keys create test --scope infer 2>/dev/null)
curl --silent --fail --header "Authorization: Bearer $token" "$url/v1/models" >/dev/null ||
  die "a key that was made in the container does not hold"
# shellcheck disable=SC2016
run python3 -c "$(sed -n 's/.*"-c", "\(import os, urllib.*\)"\]$/\1/p' Dockerfile | head -n 1 | sed 's/\\"/"/g')" ||
  die "the HEALTHCHECK fails"

say "what it wrote outside of its volume and /tmp"
written=$(find "$mount" -xdev -newer "$work/started" -user 10001 \
  -not -path "$mount/var/lib/loraplex*" -not -path "$mount/tmp*" -not -path "$mount/dev/*" | head)
[ -z "$written" ] || die "it wrote $written"
echo nothing

say "ending it"
end
wait "$server" || die "it ended with status $?"
grep -q '"message": "request"' "$work/server.log" || die "its log has no requests: $work/server.log"
! grep --invert-match --max-count=3 '^{.*}$' "$work/server.log" || die "that is no JSON, but in its log"
say "the image works"
