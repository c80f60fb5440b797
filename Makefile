# make pretrain | test | test-quick | check | accept [ONLY=name] | accept-gpu: each prepares .venv first, from nothing.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# without compiling every module of every package ahead: most are never imported
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
ONLY ?=
export TOKENIZERS_PARALLELISM := false
# where it is set, each of a run's dozen processes compiles torch and transformers anew: 18 s instead of 7
export PYTHONDONTWRITEBYTECODE :=

.PHONY: pretrain test test-quick check accept accept-gpu benchmark

pretrain: $(VENV)/.ready
	$(BIN)/python jobs/pretrain.py

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m "not gpu" --ignore=tests/acceptance --ignore=tests/benchmarks -rs

# no Ray, no S3 server, one process
test-quick: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m "not gpu and not ray and not s3 and not distributed and not cluster" \
		--ignore=tests/acceptance --ignore=tests/benchmarks

check: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# each test's figures go to .cache/acceptance/; `python -m tests.acceptance` prints them as rows of the table
accept: $(VENV)/.ready-test
	$(BIN)/python -m pytest --capture=tee-sys $(if $(ONLY),tests/acceptance/test_$(ONLY).py,tests/acceptance)

# runs wherever torch and transformers are: PYTHON=... names the interpreter that has them
accept-gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tests.benchmarks.gpu_step

benchmark: $(VENV)/.ready-test
	$(BIN)/python -m tests.benchmarks

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e '.[cpu]'
	$(BIN)/python -m cmcgns.train.build_ops
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(PIP_INSTALL) -e '.[test]'
	touch $@
