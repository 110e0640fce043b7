# make demo, make test, make bench: each does its own set-up, in .venv, the first time.
export KINETO_LOG_LEVEL := 99
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Files in the order of their names: the slow ones come first, so that no processor is idle at the end.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
RESULTS := runs/bench
OUT := runs/gpu.md
SOURCES := setup.py $(wildcard csrc/*)

.PHONY: demo test test-fast lint format build bench gpu-check clean

demo: $(VENV)/.with-demo
	rm -rf runs/demo
	$(BIN)/python -m benchmarks.paper.demo --out runs/demo

test: $(VENV)/.with-test
	$(PYTEST)

# What a change of a Python file needs.
test-fast: $(VENV)/.with-test
	$(PYTEST) -m 'not slow'

# Some twelve minutes on two cores, more where cells are measured anew; leave the machine alone meanwhile. It fails,
# after all three, if one was disturbed all the same.
bench: $(VENV)/.with-bench
	failed=0; for what in step training scaling; do \
	  $(BIN)/python -m benchmarks.speed.$$what --out $(RESULTS) || failed=1; \
	done; exit $$failed

# On a machine with a GPU. Its report, to be committed: make gpu-check OUT=results/gpu/h100.md
gpu-check: $(VENV)/.with-test
	$(BIN)/python -m tests.cuda.gpu.toolkit
	$(BIN)/python -m tests.cuda.gpu_check --out $(OUT)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy sam_fused train.py
	$(BIN)/clang-format --dry-run --Werror csrc/* tests/cuda/*/*.cpp tests/cuda/*/*.h tests/cpu/*.h

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/* tests/cuda/*/*.cpp tests/cuda/*/*.h tests/cpu/*.h

build: $(VENV)/.built

# torch and torchvision together, so that pip picks a pair that fits; then the extension, against this very torch.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install torch torchvision 'setuptools>=77' wheel ninja
	touch $@

$(VENV)/.built: $(VENV)/.torch pyproject.toml $(SOURCES)
	$(BIN)/pip install --no-build-isolation -e .
	touch $@

# One extra of sam_fused, which is there by now and is not built again.
$(VENV)/.with-%: $(VENV)/.built
	$(BIN)/pip install 'sam_fused[$*]'
	touch $@

$(VENV)/.lint: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install 'ruff==0.17.*' 'clang-format==23.*' 'mypy==2.4.*'
	touch $@

clean:
	rm -rf $(VENV) build sam_fused.egg-info sam_fused/*.so runs/demo
