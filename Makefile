# Needs Python 3.11 or newer, make and a package index; everything else is set up in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
RUNS ?= runs
# A file stays in one worker, which makes its fixtures once. Three workers keep two cores busy.
PYTEST_ARGS ?= -n 3 --dist loadfile
LOWEST := .venv-lowest
LOCK := launch/requirements-tpu.txt
QUICKSTART := $(RUNS)/quickstart

.PHONY: help setup quickstart test test-all test-lowest lint lock docs wheel clean

help:
	@echo 'make quickstart  train, evaluate and draw on the embedded data set (a few minutes)'
	@echo 'make setup       only create the environment, .venv'
	@echo 'make test        run the tests (some need the folder that PPN_SHARED names)'
	@echo 'make test-all    also run those that take minutes each'
	@echo 'make test-lowest run the tests with the lowest versions that requirements.txt allows'
	@echo 'make lint        check style and types'
	@echo 'make lock        choose the versions that TPU workers install, launch/requirements-tpu.txt'
	@echo 'make docs        build the documentation site into site/'
	@echo 'make wheel       build the wheel into dist/ and try it in an empty environment'
	@echo 'make clean       remove the environments and the site'

setup: $(VENV)/base

quickstart: $(VENV)/base
	$(VENV)/bin/ppn train --config=quickstart --workdir=$(QUICKSTART)
	$(VENV)/bin/ppn evaluate --workdir=$(QUICKSTART) --pictures=12

test: $(VENV)/dev
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# The proofs of minutes run what users run: their programs are optimised as always.
test-all: $(VENV)/dev
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)
	XLA_FLAGS="$$XLA_FLAGS" $(VENV)/bin/python -m pytest -m slow $(PYTEST_ARGS)

test-lowest: $(LOWEST)/dev
	$(LOWEST)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/shellcheck launch/*.sh .ci/*

lock: $(VENV)/dev
	@$(PIP) uv
	@echo '# Versions that TPU workers and the image install, written by `make lock`.' > $(LOCK)
	$(VENV)/bin/uv pip compile --quiet pyproject.toml --extra tpu --extra tfds --universal \
	  --python-version 3.11 --no-header --no-emit-index-url --no-annotate >> $(LOCK)

docs: $(VENV)/dev
	$(VENV)/bin/python docs/make_configs.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

wheel: $(VENV)/dev
	$(VENV)/bin/python -m pytest -m slow tests/test_wheel.py
	rm -rf build
	$(VENV)/bin/python -m pip wheel . --quiet --no-deps --no-build-isolation --wheel-dir dist

clean:
	rm -rf $(VENV) $(LOWEST) build dist site

$(VENV)/base: requirements.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ppn_jax needs Python 3.11 or newer; name one with make PYTHON=...")'
	@echo 'setting up $(VENV) (about a minute)'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -e .
	@touch $@

$(VENV)/dev: $(VENV)/base
	@$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/lint: $(VENV)/dev
	@$(PIP) -e '.[dev,lint]'
	@touch $@

$(LOWEST)/dev: requirements.txt pyproject.toml setup.py
	@$(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	@$(LOWEST)/bin/uv pip install --quiet --resolution lowest-direct --python $(LOWEST)/bin/python -e '.[dev]'
	@touch $@
