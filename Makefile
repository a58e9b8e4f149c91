# Every target sets up what it needs; `make clean` removes it.
PYTHON ?= python3
VENV ?= .venv
DOCS ?= .venv-docs
BIN := $(VENV)/bin
# as the extra `docs` in pyproject.toml, without the package: pages and docstrings are read from the sources
DOCS_NEEDS := "mkdocs>=1.6,<2" "mkdocs-material>=9.6" "mkdocstrings[python]>=0.29"
STAMP := $(VENV)/.installed

.PHONY: demo test test-fast docs lint types unit fast clean

demo: $(STAMP)
	$(BIN)/lightm demo --out runs/demo --overwrite

test: lint types unit

test-fast: lint types fast

docs: $(DOCS)/.installed
	$(DOCS)/bin/mkdocs build --quiet --strict

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	$(BIN)/pytest

fast: $(STAMP)
	$(BIN)/pytest -m "not slow" --numprocesses 2

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(DOCS_NEEDS)
	touch $@

clean:
	rm -rf $(VENV) $(DOCS) build dist .mypy_cache .ruff_cache .pytest_cache
