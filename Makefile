# Two commands: `make serve` and `make test`. Everything else is a part of one of them.
PYTHON ?= python3
WORKLOADS ?= bars peers punica slora
OP := $(wildcard server/engine/cpu/*.cpp server/engine/cpu/*.h) server/engine/cpu/build.py

.DEFAULT_GOAL := help
.PHONY: help serve test install lint bench asan scores lock clean

help: ## what there is
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile

serve: .venv/.runtime .venv/.op ## install what is needed, prepare the base and the demo adapters, serve on 127.0.0.1:8000
	@exec .venv/bin/loraplex serve $(ARGS)

test: lint ## install what is needed, run the checks and the whole test suite
ifdef ARGS
	.venv/bin/python -m pytest $(ARGS)
else
	.venv/bin/python -m pytest --ignore tests/real --numprocesses 2 --dist loadfile
	.venv/bin/python -m pytest tests/real --numprocesses 2 --no-loadscope-reorder
endif

lint: .venv/.dev .venv/.op
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: .venv/.dev .venv/.op ## the bars, then the peers: loraplex beside stock vLLM, PEFT and llama.cpp (an hour; WORKLOADS="…")
	@[ -x .cache/llama/build/bin/llama-server ] || benchmarks/build-llama.sh
	@for each in $(WORKLOADS); do .venv/bin/python -m benchmarks run benchmarks/workloads/$$each.toml $(ARGS) || exit 1; done

asan: .venv/.dev .venv/.op ## the tests of the CPU LoRA op under AddressSanitizer
	@deploy/asan.sh

scores: .venv/.dev .venv/.op ## start a server, score the demo adapters and the bare base through it, print the table
	@deploy/with-server.sh .venv/bin/python -m adapters.demo.score --json benchmarks/demo-scores.json

install: .venv/.runtime .venv/.op

.venv/.op: .venv/.runtime $(OP)
	@.venv/bin/python -m server.engine.cpu.build
	@touch $@

.venv/.runtime: pyproject.toml deploy/install.sh locks/torch-cpu.txt locks/cpu.txt
	@PYTHON=$(PYTHON) deploy/install.sh
	@touch $@

.venv/.dev: .venv/.runtime locks/dev.txt
	@PYTHON=$(PYTHON) deploy/install.sh dev
	@touch $@

lock: .venv/.dev ## write locks/ anew from what is installed
	.venv/bin/python locks/relock.py

clean: ## remove the environment and caches (not the state folder)
	rm -rf server/engine/cpu/*.so .venv .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
