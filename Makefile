# make install | pretrain | test | test-quick | check | accept [ONLY=name] | gpu-day: each prepares .venv first, from nothing.
# make docs: the documentation site, in build/docs; make constraints: new versions; make drift: what breaks with them
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# without compiling every module of every package ahead: most are never imported
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
# exactly the files that were resolved; what is built from source is built by the setuptools of build.txt
LOCKED := --require-hashes --no-deps --no-build-isolation
DRIFT := build/drift
UV_VERSION := 0.13.9
ONLY ?=
export TOKENIZERS_PARALLELISM := false
# where it is set, each of a run's dozen processes compiles torch and transformers anew: 18 s instead of 7
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install pretrain test test-quick check docs accept gpu-day benchmark constraints drift

install: $(VENV)/.ready

pretrain: $(VENV)/.ready
	$(BIN)/python jobs/pretrain.py

# two processes; a file's tests stay together, for they share a run, a cluster or a server
SUITE := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore=tests/acceptance --ignore=tests/benchmarks --durations=30

test: $(VENV)/.ready-test
	$(SUITE) -m "not gpu" -rs

# no Ray, no S3 server, no ranks
test-quick: $(VENV)/.ready-test
	$(SUITE) -m "not gpu and not ray and not s3 and not distributed and not cluster"

check: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) docs

# a warning fails: a link that leads nowhere, a page that no table of contents names
docs: $(VENV)/.ready-test
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs

# each test's figures go to .cache/acceptance/; `python -m tests.acceptance` prints them as rows of the table
accept: $(VENV)/.ready-test
	$(BIN)/python -m pytest --capture=tee-sys $(if $(ONLY),tests/acceptance/test_$(ONLY).py,tests/acceptance)

# runs wherever torch and transformers are: PYTHON=... names the interpreter that has them
gpu-day:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tests.gpu_day $(ARGS)

benchmark: $(VENV)/.ready-test
	$(BIN)/python -m tests.benchmarks

constraints: build/uv/bin/uv
	$(PYTHON) constraints/resolve.py build/uv/bin/uv

build/uv/bin/uv: Makefile
	$(PYTHON) -m venv build/uv
	build/uv/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	touch $@

# by hand, takes as long as test-quick and some minutes more
drift:
	$(PYTHON) constraints/drift.py $(DRIFT)

# the last line installs torch alone, by the range of pyproject.toml: its build, CPU or CUDA, is the machine's own
$(VENV)/.ready: pyproject.toml constraints/build.txt constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(LOCKED) -r constraints/build.txt
	$(PIP_INSTALL) $(LOCKED) -r constraints/cpu.txt
	$(PIP_INSTALL) --no-build-isolation -e '.[cpu]'
	$(BIN)/python -m cmcgns.train.build_ops
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready constraints/gcp.txt constraints/test.txt
	$(PIP_INSTALL) $(LOCKED) -r constraints/gcp.txt -r constraints/test.txt
	touch $@
