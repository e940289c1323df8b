# make        creates .venv with pinned versions and installs agd-fast into it
# make demo   runs the main job on the digits that ship: runs/demo/report.html
# make test   lint, types, tests, and the wheel in an environment of its own
# make oldest PYTHON=python3.10   the oldest versions that pyproject.toml asks for, and tests that must run with them

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: all demo test lint types unit wheel oldest clean

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

# of a wheel, away from the sources; families that an older diffusers lacks are left out
OLDEST := adapters backend engine ops package resume sampling storage
oldest:
	rm -rf build/oldest
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/pip install --quiet uv
	AGD_FAST_BUILD_EXT=0 build/oldest/bin/uv build --quiet --wheel --out-dir build/oldest/dist .
	build/oldest/bin/uv pip install --quiet --python build/oldest/bin/python --resolution lowest-direct --requirement pyproject.toml --extra test
	build/oldest/bin/uv pip install --quiet --python build/oldest/bin/python --no-deps build/oldest/dist/*.whl
	OMP_NUM_THREADS=1 build/oldest/bin/pytest $(OLDEST:%=tests/test_%.py)

clean:
	rm -rf $(VENV) build dist *.egg-info
