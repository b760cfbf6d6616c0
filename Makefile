# make demo and make test need nothing but python3 (3.11 or newer) and make.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test everycase lint types layers docs bench study smallest clean

demo: $(VENV)/core  ## recover real photographs from their gradients, in a virtual environment
	$(BIN)/rgap demo --force

test: $(VENV)/test  ## tests and doctests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests rgap solvers analysis --doctest-modules

everycase: $(VENV)/test  ## the tests with every one of their cases; half as long again
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests --every-case

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: build/tree
	cd build/tree && ../../$(BIN)/python -m mypy --config-file ../../setup.cfg -p rgap

layers: build/tree
	cd build/tree && PYTHONPATH=. ../../$(BIN)/lint-imports --config ../../.importlinter

docs: $(VENV)/docs  ## the site, in build/site; every warning is an error, every example runs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/site
	$(BIN)/python docs/_ext/offline.py build/site
	$(BIN)/python -m pytest -q docs --doctest-glob='*.md' --doctest-glob='*.rst'

bench: $(VENV)/test  ## wall time and memory beside a dense route
	$(BIN)/python -m benchmarks.timing.recovery
	$(BIN)/python -m benchmarks.timing.dense

study: $(VENV)/test  ## every row of the tables of results; an hour
	$(BIN)/python -m benchmarks.studies.lenet
	$(BIN)/python -m benchmarks.studies.table

smallest: $(VENV)/test  ## the smallest case of every script of benchmarks/
	$(BIN)/python -m benchmarks.smallest

clean:
	rm -rf $(VENV) build dist demo *.egg-info

# mypy and import-linter need the three folders as the one package that they are once installed.
build/tree: $(VENV)/test FORCE
	rm -rf build/tree build/lib
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/tree .

$(VENV)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools
	touch $@

# torch first and alone: with a pinned version present, no other package asks for a CUDA build.
$(VENV)/core: $(VENV)/python setup.cfg constraints.txt
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/test: $(VENV)/core
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/docs: $(VENV)/test
	$(PIP) -e '.[docs]'
	touch $@

FORCE:
