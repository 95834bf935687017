# Each target sets itself up: a bare machine needs Python 3.11, 3.12 or 3.13, and make.
#   make train [RUNS=dir] [ARGS="--flag value"]    make test [ARGS="-k name"]    make lint    make smoke [RUNS=dir]
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: train test lint smoke

# A name on the PATH is not enough (version managers leave stubs for versions that are not active): it has to run.
PYTHON ?= $(shell for candidate in python3.11 python3.12 python3.13 python3; do \
	$$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& { echo $$candidate; break; }; done)
PACKAGES := pdtr envs rewards agents experiments
BIN := .venv/bin
RUNS ?=
ARGS ?=

# With libgomp's default, threads spin at every barrier: beside another busy process small operations take many times as
# long; without any spinning two threads lose a third of their speed. It has to be set before torch is imported.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 100000

train: .venv/.installed
	$(BIN)/pdtr train pdtr_scenes $(if $(RUNS),--output-dir "$(RUNS)/pdtr_scenes") $(ARGS)

smoke: .venv/.installed
	$(BIN)/pdtr train smoke $(if $(RUNS),--output-dir "$(RUNS)/smoke") $(ARGS)

test: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(PACKAGES)

.venv/.installed: pyproject.toml constraints.txt
	@[[ -n "$(PYTHON)" ]] || { echo "Python 3.11, 3.12 or 3.13 is needed and none was found; name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	[[ -x $(BIN)/pip ]] || $(PYTHON) -m venv --clear .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@
