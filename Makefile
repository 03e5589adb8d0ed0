# The front door. Every target makes what it needs, from a bare machine with Python 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Further arguments of pip, for example the index of PyTorch's CPU builds where the default index has CUDA builds only.
PIP_ARGS ?=
DEVICE ?= cpu
# How many tests run at once.
WORKERS ?= 2
# What `make bench` measures; the index of a million products, webshop_search, takes long.
BENCHMARKS ?= alfworld webshop env_servers advantages learner system

# Without compiled modules every process of a run would compile torch, vLLM and DeepSpeed anew.
unexport PYTHONDONTWRITEBYTECODE
export OMP_WAIT_POLICY ?= PASSIVE
export OMP_NUM_THREADS ?= 1

.PHONY: setup tools demo test test-all lint format bench chaos elastic secrets compose-test clean

# What a run needs.
setup: $(VENV)/.installed-$(DEVICE)

# What tests and benchmarks need beyond that; TextWorld, the reference engine, is built here and takes a C++ compiler.
tools: $(VENV)/.installed-tools

$(VENV)/.installed-cpu: requirements/common.txt requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
		|| { echo "Python 3.11 is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --no-compile $(PIP_ARGS) -r requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "torch does not load: its wheel is a CUDA build." \
		"Give pip the index of PyTorch's CPU builds: make setup PIP_ARGS='--extra-index-url …'" >&2; exit 1; }
	@touch $@

$(VENV)/.installed-gpu: requirements/common.txt requirements/gpu.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile $(PIP_ARGS) -r requirements/gpu.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-tools: $(VENV)/.installed-$(DEVICE) requirements/dev.txt requirements/textworld.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-compile $(PIP_ARGS) -r requirements/dev.txt -r requirements/textworld.txt
	@touch $@

demo: setup
	$(BIN)/anchorage demo

# The suite without its longer tier; TESTS may name files. Two workers: what waits does so beside what computes.
test: tools
	TEST_TIER=short $(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

# All of it, what `make test` leaves out too.
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

# TRL, which the learner is measured beside.
$(VENV)/.installed-trl: $(VENV)/.installed-tools requirements/bench-trl.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-compile $(PIP_ARGS) -r requirements/bench-trl.txt
	@touch $@

bench: $(VENV)/.installed-trl
	@mkdir -p runs/bench
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name --json runs/bench/$$name.json; done

chaos: tools
	$(BIN)/python -m tests.chaos.run

elastic: tools
	$(BIN)/python -m tests.chaos.elastic

secrets:
	deploy/secrets.sh

# Skipped, with the reason, where no Docker engine answers.
compose-test:
	$(PYTHON) -m deploy.compose_test

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
