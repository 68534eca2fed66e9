# `make train` runs the main job, `make test` the whole test suite; each sets up .venv by itself, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: train test test-gpu check bench clean

train: $(STAMP)
	$(BIN)/python train/run.py --env halfcheetah-medium-expert --resume

test: $(STAMP)
	$(BIN)/python -m pytest

# On a machine with a CUDA GPU: with the torch, triton and pytest that are there, findings in $OUT, eight minutes at most.
test-gpu: export OUT ?= benchmarks/results
test-gpu:
	timeout 420 $(PYTHON) -m pytest tests/kernels
	timeout 50 $(PYTHON) -m pytest benchmarks/test_penalty.py --benchmark-only -k "ours and not compiled" \
		--benchmark-json=$(OUT)/penalty.json

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks --benchmark-only

# torch goes first: a build of it that pip already has must not be replaced by a larger one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
