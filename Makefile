# `make train` runs the main job, `make test` the tests; either sets up .venv first if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: train test test-all tools-test fuzz check docs test-versions dist bench bench-compare gpu gpu-check gpu-tune gpu-bench gpu-train gpu-wheels clean

train: $(STAMP)
	$(BIN)/python train/run.py --env halfcheetah-medium-expert --resume

# The tests, then the kernels' own suite under Triton's interpreter, which must be chosen before triton is imported.
# `make test` leaves out tests marked long and draws fewer random cases; `make test-all` runs everything.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
test: QUICK := -m "not long" --hypothesis-profile quick
test test-all: $(STAMP)
	failed=0; $(PYTEST) $(QUICK) || failed=1; \
	TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= $(PYTEST) tests/kernels $(QUICK) || failed=1; exit $$failed

# The checks of the kernels without a GPU (tools/README.md): a part of `make test-all`.
tools-test: $(STAMP)
	$(PYTEST) tests/tools

# Odd arguments to every public function for some minutes, different ones each time; `make test` has the same ones each time.
fuzz: $(STAMP)
	$(PYTEST) tests/fuzz --hypothesis-profile fuzz

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation site. Strict: a broken link, anchor or reference ends the build. The tests build it too.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "built site/index.html; it opens without a server"

# Before a release: the library's tests under each supported PyTorch and Triton; writes docs/versions.md.
test-versions:
	$(PYTHON) tests/versions.py $(VERSIONS)

# The wheel and the source distribution in dist/. tests/test_dist.py, which `make test-all` runs, tries them.
dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

# RESULTS is the file of results. A file under benchmarks/results belongs to its device and is refused on others.
RESULTS ?= runs/bench.json
BENCH := -m pytest --benchmark-only --benchmark-columns=median,iqr,min,rounds

# Under ten minutes on two CPU cores; lists what it did not measure. `pip install -e .[peers]` adds JAX and others.
bench: $(STAMP)
	$(BIN)/python $(BENCH) benchmarks --results=$(RESULTS)
	$(BIN)/python benchmarks/report.py $(RESULTS)

# Shows what a change did: make bench-compare BASE=saved.json
bench-compare: $(STAMP)
	@test -n "$(BASE)" || { echo "which saved run? make bench-compare BASE=saved.json"; exit 2; }
	$(BIN)/python $(BENCH) benchmarks -k ours --results=runs/bench-now.json
	$(BIN)/python benchmarks/compare.py $(BASE) runs/bench-now.json

# On a machine with a CUDA GPU: tests, tuning, benchmarks and training in half an hour, with the installed packages.
# `make gpu-check` and so on run its parts. WHEELS names a folder of wheels of packages that are missing and cannot be
# downloaded there. `make gpu-wheels` fills it with the usual ones, for the version of Python in GPU_PYTHON on x86-64.
GPU := $(PYTHON) benchmarks/gpu.py $(if $(WHEELS),--wheels $(WHEELS))
SELDOM := docstring-parser einops farama-notifications glfw gymnasium minari mujoco mujoco-core pyopengl typeguard tyro
gpu:
	$(GPU)
gpu-check gpu-tune gpu-bench gpu-train:
	$(GPU) $(@:gpu-%=%)
GPU_PYTHON ?= 3.12
PLATFORMS := $(foreach glibc,2_28 2_27 2_17,--platform manylinux_$(glibc)_x86_64) --platform manylinux2014_x86_64
gpu-wheels:
	$(PYTHON) -m pip download --no-deps --only-binary=:all: --constraint constraints.txt -d $(or $(WHEELS),wheels) \
	--python-version $(GPU_PYTHON) --implementation cp $(PLATFORMS) $(SELDOM)

# torch goes first, so that an existing build is not replaced by a larger one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train,ogbench,d4rl,sweep,onnx,examples,docs,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
