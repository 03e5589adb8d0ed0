# Every target installs what it needs, on a bare machine with Python 3.11 or 3.12 (PYTHON=python3.12).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# More arguments for pip, for example the index of PyTorch's CPU builds if the default index has CUDA builds only.
PIP_ARGS ?=
DEVICE ?= cpu
# Number of tests that run in parallel.
WORKERS ?= 2
ENV_TESTS := tests/env_servers tests/services/config tests/services/test_packaged.py tests/services/test_redis_server.py
# What `make bench` measures. Left out because they take long: webshop_search, a million products; scale, 1,000 actors.
BENCHMARKS ?= alfworld webshop env_servers advantages learner system

# Without compiled modules every process of a run would compile the modules of torch, vLLM and DeepSpeed again.
unexport PYTHONDONTWRITEBYTECODE
export OMP_WAIT_POLICY ?= PASSIVE
export OMP_NUM_THREADS ?= 1

.PHONY: setup setup-env tools lock demo test test-env test-all lint format bench gpu-check chaos elastic secrets
.PHONY: compose-test clean

INSTALL = $(PYTHON) requirements/install.py --pip="$(PIP_ARGS)" $(VENV)

# Everything that a run needs.
setup: $(VENV)/.installed-$(DEVICE)

# Everything that tests and benchmarks need besides. Builds TextWorld, the reference engine, if there is a C++ compiler.
tools: $(VENV)/.installed-tools

# Environments, their servers, the command line and the Python API, without training. Also for Python 3.13.
setup-env: $(VENV)/.installed-base

$(VENV)/.installed-%: requirements/%.txt requirements/torch.txt requirements/install.py pyproject.toml
	@$(INSTALL) $*
	@touch $@

$(VENV)/.installed-tools: $(VENV)/.installed-$(DEVICE) requirements/dev.txt requirements/textworld.txt
	@$(INSTALL) dev textworld
	@touch $@

$(VENV)/.installed-env-tools: $(VENV)/.installed-base requirements/dev.txt
	@$(INSTALL) dev
	@touch $@

demo: setup
	$(BIN)/anchorage demo

# The suite without its longer tier; TESTS may name files. With two workers, waiting tests overlap with computing ones.
test: tools
	TEST_TIER=short $(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

# The tests that run without torch, Ray and vLLM.
test-env: $(VENV)/.installed-env-tools
	$(BIN)/python -m pytest -n $(WORKERS) $(or $(TESTS),$(ENV_TESTS))

# The whole suite, including the longer tier.
test-all: tools
	$(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

lint: tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: tools
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# TRL, which the benchmark compares the learner with.
$(VENV)/.installed-trl: $(VENV)/.installed-tools requirements/bench-trl.txt
	@$(INSTALL) bench-trl
	@touch $@

# Update pins and hashes from the ranges of pyproject.toml and requirements/*.in. UPGRADE=1: the newest versions that fit.
lock: tools
	requirements/lock.sh $(BIN)/uv

bench: $(VENV)/.installed-trl
	@mkdir -p runs/bench
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name --json runs/bench/$$name.json; done

# What only a machine with GPUs can show: a table, runs/gpu-check.json, exit code 1 if something failed. ARGS: its options.
gpu-check:
	@if [ -e $(VENV)/.installed-cpu ]; then \
	  echo "gpu-check: this checkout has the packages for CPUs; use another checkout" >&2; exit 1; fi
	@$(MAKE) --no-print-directory setup DEVICE=gpu
	@mkdir -p runs
	$(BIN)/python -m benchmarks.gpu_check --json runs/gpu-check.json $(ARGS)

chaos: tools
	$(BIN)/python -m tests.chaos.run

elastic: tools
	$(BIN)/python -m tests.chaos.elastic

secrets:
	deploy/secrets.sh

# Skipped, with the reason, if there is no Docker engine.
compose-test:
	$(PYTHON) -m deploy.compose_test

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
