# Every command of the project. `make help` lists them.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
export OLORA_HOME ?= $(CURDIR)/.olora
# Threads of torch sleep while they wait for each other, instead of spinning: much faster where cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE

# Where torch comes from, when not from the registry that pip is set to: for example the CPU builds' own index.
TORCH_INDEX_URL ?=
TORCH := $(shell grep '^torch==' constraints.txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Tests are small: a thread each, and as many files at a time as there are JOBS.
JOBS ?= 2
# Compiled modules are kept, for many tests start an interpreter.
PYTEST := env -u OLORA_HOME -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 \
  $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
SOURCES := api worker cli store olora_core migrations examples bench tests

.DEFAULT_GOAL := help
.PHONY: help install quickstart quickstart-real serve test test-all test-fast test-families test-programs test-real check \
  fix bench gpu clean

help:  ## List the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

# One stamp for what a run needs, one for what the developers need on top: each target installs only what it lacks.
$(VENV)/.run: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed: install it, or say make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is another: say make PYTHON=/path/to/python"; exit 1; }
	@echo "Installing into $(VENV) (once; torch is the large part) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL))
	@$(PIP) -e '.[api,worker,postgres,client]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "Installing the developers' tools ..."
	@$(PIP) -e '.[dev]'
	@touch $@

install: $(VENV)/.run  ## Make .venv with the pinned packages

quickstart: $(VENV)/.run  ## Train an OLoRA adapter on the shipped model through the API, and load it in PEFT
	@$(BIN)/python -m examples.quickstart

quickstart-real: $(VENV)/.run  ## The same on a real model of 135 million parameters (3.5 minutes on 2 quiet cores, 93 MB to download)
	@$(BIN)/python -m examples.quickstart_real

serve: $(VENV)/.run  ## Start the API and a worker, and keep them up (PORT=8001 for another port)
	@exec $(BIN)/olora serve $(if $(PORT),--port $(PORT))

test: $(VENV)/.dev  ## Run the tests, of the longest files another third every day (ARGS='tests/api -k upload' for a part)
	@$(if $(ARGS),,OLORA_TEST_SHARE=today) $(PYTEST) $(ARGS)

test-all: $(VENV)/.dev  ## Run the whole test suite
	@$(PYTEST)

test-fast: $(VENV)/.dev  ## Run the tests without the slow ones
	@$(PYTEST) -m 'not slow' $(ARGS)

test-families: $(VENV)/.dev  ## Train a tiny model of every causal family of transformers (ARGS='-k qwen' for a part)
	@OLORA_TEST_FAMILIES=all $(PYTEST) --dist load tests/families $(ARGS)

test-programs: $(VENV)/.dev  ## Run all clients and programs of tests/conformance, each in an environment of its own (ARGS='-k wandb')
	@OLORA_TEST_PROGRAMS=all $(PYTEST) tests/conformance $(ARGS)

test-real: $(VENV)/.dev  ## See what is promised hold on a real model, in fp32 and bf16 (93 MB to download)
	@OLORA_TEST_REAL_MODEL="$$($(BIN)/python -m examples.smollm2)" && export OLORA_TEST_REAL_MODEL \
	  && env -u OLORA_HOME $(BIN)/python -m pytest -v --capture=no tests/real $(ARGS)

check: $(VENV)/.dev  ## Check format, lint, types and who may import whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(VENV)/.dev  ## Format, and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev  ## Measure against named peers; each benchmark prints one table
	@set -e; for name in olora_init start train; do echo "== bench/$$name.py"; $(BIN)/python -m bench.$$name; done

gpu: $(VENV)/.dev  ## Prove everything on a GPU, in eight minutes (ARGS='--tiny --device cpu' for a smoke test)
	@$(BIN)/python -m bench.gpu $(ARGS)

clean:  ## Remove .venv and caches; your jobs and files in .olora stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
