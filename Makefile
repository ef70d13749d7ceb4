PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test check tune-check assurance gpu

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## run examples/demo.py
	$(BIN)/python examples/demo.py

test: $(INSTALLED)  ## run the tests; ARGS="-k name" passes options to pytest
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

check: $(INSTALLED)  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(wildcard tilelink tests bench)

tune-check: $(INSTALLED)  ## every tuned schedule: proven, compiled, predicted; ARGS="TABLE.json" checks one
	$(BIN)/python -m tilelink tune --check $(ARGS)

assurance: $(INSTALLED)  ## all evidence that needs no GPU; ARGS="bad_input" runs one case
	$(BIN)/python -m tests.assurance $(ARGS)

gpu: $(INSTALLED)  ## all evidence that needs two to eight GPUs; ARGS="--seconds 900 grid" bounds it
	$(BIN)/python -m tests.gpu.evidence --out gpu-evidence $(ARGS)

# The pinned setuptools builds the package itself: an isolated build would fetch an unpinned one.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--no-build-isolation --editable '.[dev]'
	touch $@
