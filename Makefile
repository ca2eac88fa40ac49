# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-unit check clean

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## Install, then train four phantom sites together and alone, and compare
	$(BIN)/gcml demo

test: $(VENV)/installed ## All tests: unit, driver with fakes, real Ray
	$(BIN)/python -m pytest -q -m "not cluster"
	$(BIN)/python -m pytest -q -m cluster

test-unit: $(VENV)/installed ## Only the tests that need no Ray
	$(BIN)/python -m pytest -q -m "not cluster"

check: $(VENV)/installed ## ruff, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean: ## Remove the environment and caches, never data or runs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
