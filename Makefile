# make        creates .venv with pinned versions and installs agd-fast into it
# make demo   runs the main job on the digits that ship: runs/demo/report.html
# make test   lint, types, tests, and the wheel in an environment of its own

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: all demo test lint types unit wheel clean

all: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: all
	$(BIN)/agd-fast demo --output runs/demo

test: lint types unit wheel

lint: all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: all
	$(BIN)/mypy

# one thread a worker: the models are tiny, and threads that outnumber the cores cost more than they bring
unit: all
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# the sdist, the wheel made from it, and that wheel in a fresh environment away from the sources
wheel: all
	rm -rf dist build/wheel-venv
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/pip install --quiet --constraint constraints.txt torch==2.13.0
	build/wheel-venv/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	$(BIN)/python tests/check_wheel.py dist build/wheel-venv

clean:
	rm -rf $(VENV) build dist *.egg-info
