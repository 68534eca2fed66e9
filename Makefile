# `make train` runs the main job, `make test` the tests; each sets up .venv by itself, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: train test test-all test-gpu test-gpu-operators test-gpu-flow test-gpu-gemm check test-versions bench bench-compare bench-gpu clean

train: $(STAMP)
	$(BIN)/python train/run.py --env halfcheetah-medium-expert --resume

# The tests, then the kernels' own suite under Triton's interpreter, which has to be chosen before triton is imported.
# `make test` leaves out what is marked long and draws fewer random cases; `make test-all` is everything.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
test: QUICK := -m "not long" --hypothesis-profile quick
test test-all: $(STAMP)
	failed=0; $(PYTEST) $(QUICK) || failed=1; \
	TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= $(PYTEST) tests/kernels $(QUICK) || failed=1; exit $$failed

# On a machine with a CUDA GPU: with the torch, triton and pytest that are there, findings in $OUT. Each of the three
# parts takes eight minutes at most; the flow's kernels take seconds each to compile.
test-gpu: test-gpu-operators test-gpu-flow test-gpu-gemm
test-gpu-operators test-gpu-flow test-gpu-gemm: export OUT ?= runs
test-gpu-operators:
	timeout 470 $(PYTHON) -m pytest tests/kernels --ignore tests/kernels/test_flow.py
test-gpu-flow:
	timeout 470 $(PYTHON) -m pytest tests/kernels/test_flow.py -k "not gemm"
test-gpu-gemm:
	timeout 470 $(PYTHON) -m pytest tests/kernels/test_flow.py -k gemm

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Before a release: the library's tests under each PyTorch and Triton that is supported; writes docs/versions.md.
test-versions:
	$(PYTHON) tests/versions.py $(VERSIONS)

# Results go where RESULTS says. A file under benchmarks/results belongs to its device and is refused on another one.
RESULTS ?= runs/bench.json
BENCH := -m pytest --benchmark-only --benchmark-columns=median,iqr,min,rounds

# Under ten minutes on two CPU cores; ends with what it did not measure. `pip install -e .[peers]` adds JAX and others.
bench: $(STAMP)
	$(BIN)/python $(BENCH) benchmarks --results=$(RESULTS)
	$(BIN)/python benchmarks/report.py $(RESULTS)

# What a change did: make bench-compare BASE=saved.json
bench-compare: $(STAMP)
	@test -n "$(BASE)" || { echo "which saved run? make bench-compare BASE=saved.json"; exit 2; }
	$(BIN)/python $(BENCH) benchmarks -k ours --results=runs/bench-now.json
	$(BIN)/python benchmarks/compare.py $(BASE) runs/bench-now.json

# On a machine with a CUDA GPU, with the packages that are there; each part takes eight minutes at most and writes its
# results row by row, into $OUT. `python benchmarks/results.py --into benchmarks/results/NAME.json $OUT/bench-*.json`
# puts them together. Where there is no git, BENCH_COMMIT names the commit.
GPU_PARTS := penalty score flow decorator acting sampling update seeds
bench-gpu: $(GPU_PARTS:%=bench-gpu-%)
bench-gpu-%: export OUT ?= runs
bench-gpu-%:
	timeout 470 $(PYTHON) $(BENCH) benchmarks/test_$*.py --seconds 0.5 --results=$(OUT)/bench-$*.json

# torch goes first: a build of it that pip already has must not be replaced by a larger one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
