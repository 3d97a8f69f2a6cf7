# Two commands do all set-up: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TORCH  := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
NAME   ?=

.DEFAULT_GOAL := help
.PHONY: help install demo demo-release test soak conformance-vllm check bench lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv and install everything, pinned

# torch first and pinned, deepspeed last: its set-up imports torch.
$(STAMP): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; use make PYTHON=/path/to/python3.11"; exit 2; }
	@command -v c++ >/dev/null || \
	  { echo "error: no C++ compiler (c++) found, DeepSpeed needs one; install it, e.g. apt-get install g++"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "error: cannot create $(VENV); install the venv module, e.g. apt-get install python3-venv"; exit 2; }
	@echo "installing into $(VENV) (about two minutes, 2.5 GB)"
	@$(PIP) setuptools wheel $(TORCH)
	@$(PIP) --no-build-isolation --editable '.[test,check]'
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed ninja
	@touch $@

demo: install  ## train, package, sign, deploy and call two models on this machine
	@$(BIN)/heliostat demo

demo-release: install  ## under load, release a good version and roll a bad one back
	@$(BIN)/heliostat demo --release

test: install  ## every test that needs no GPU
	@$(BIN)/python -m pytest tests -m 'not soak' --durations=30 --durations-min=5

soak: install  ## the long versions of the fault and fuzz tests
	@$(BIN)/python -m pytest tests -m soak

conformance-vllm: install  ## the engines' tests on vLLM's unofficial CPU build, in an environment of its own
	@$(BIN)/python -m benchmarks.llm_peers.vllm_server $(VENV)/vllm

check: install  ## formatting, lint, types, architecture
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_architecture.py

bench: install  ## measure against named peers (NAME=gateway for one)
	@$(BIN)/python -m benchmarks.run $(NAME)

lock: install  ## write the installed versions to constraints.txt
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > $(VENV)/lock
	@mv $(VENV)/lock constraints.txt

clean:  ## stop the local cluster, delete its state and the virtual environment
	@if [ -x $(BIN)/heliostat ]; then $(BIN)/heliostat down; fi
	rm -rf .heliostat $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
