# make demo: set up and extract the demo store.  make test: set up and run all tests.  Both work on a fresh clone.
.PHONY: setup demo test bench lint types format clean
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
PACKAGES := $(shell find store datamodules lit_modules callbacks scripts -type d ! -name __pycache__)

# Installed once, and again when dependencies change or a file is added to a package (its folder is then newer). A strict
# editable install, since mypy cannot follow the default one.
.venv/.installed: setup.cfg pyproject.toml constraints.txt $(PACKAGES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "exactivations needs Python 3.11 or later; pass PYTHON=python3.11")'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]' --config-settings editable_mode=strict
	touch $@

setup: .venv/.installed

demo: setup
	$(BIN)/exactivations extract demo --dataset demo --num-samples 2000 --sample-seed 0 --max-length 1024 --layers 1 3 --pooling tokens mean last --out runs/demo

test: setup
	$(BIN)/pytest -n 2

# Speed side by side with other tools (about two hours, on a machine that does nothing else), then reading and starting.
bench: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,bench]' --config-settings editable_mode=strict
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python benchmarks/reading.py
	$(BIN)/python benchmarks/starting.py

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info runs
