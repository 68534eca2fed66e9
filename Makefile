# `make train` runs the main job, `make test` the tests; each sets up .venv by itself, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: train test test-all fuzz check test-versions bench bench-compare gpu gpu-check gpu-tune gpu-bench gpu-train gpu-wheels clean

train: $(STAMP)
	$(BIN)/python train/run.py --env halfcheetah-medium-expert --resume

# The tests, then the kernels' own suite under Triton's interpreter, which has to be chosen before triton is imported.
# `make test` leaves out what is marked long and draws fewer random cases; `make test-all` is everything.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
test: QUICK := -m "not long" --hypothesis-profile quick
test test-all: $(STAMP)
	failed=0; $(PYTEST) $(QUICK) || failed=1; \
	TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= $(PYTEST) tests/kernels $(QUICK) || failed=1; exit $$failed

# Odd arguments to every public function for some minutes, other ones each time; `make test` has the same ones each time.
fuzz: $(STAMP)
	$(PYTEST) tests/fuzz --hypothesis-profile fuzz

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

# On a machine with a CUDA GPU, with the packages that are there: tests, tuning, benchmarks, training, in half an hour.
# `make gpu-check` and so on are its parts. WHEELS names a folder of packages that are not there and cannot be downloaded;
# `make gpu-wheels` fills it, by a Python of that machine's version, with what is seldom there.
GPU := $(PYTHON) benchmarks/gpu.py $(if $(WHEELS),--wheels $(WHEELS))
SELDOM := docstring-parser einops farama-notifications glfw gymnasium minari mujoco mujoco-core pyopengl typeguard tyro
gpu:
	$(GPU)
gpu-check gpu-tune gpu-bench gpu-train:
	$(GPU) $(@:gpu-%=%)
gpu-wheels:
	$(PYTHON) -m pip download --no-deps --only-binary=:all: --constraint constraints.txt -d $(or $(WHEELS),wheels) $(SELDOM)

# torch goes first: a build of it that pip already has must not be replaced by a larger one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
