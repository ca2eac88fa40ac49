# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-unit check bench-smoke docs notebook package clean

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## Install, then train four phantom sites together and alone, and compare
	$(BIN)/gcml demo
	@echo "gcml is installed in $(VENV): '. $(BIN)/activate' puts it on the path of this shell"

test: $(VENV)/installed ## All tests: unit, driver with fakes, real Ray
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not cluster"
	$(BIN)/python -m pytest -q -m cluster

test-unit: $(VENV)/installed ## Only the tests that need no Ray
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not cluster"

check: $(VENV)/installed ## ruff, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-smoke: $(VENV)/installed ## Two minutes: fails where orchestration costs more than it should
	$(BIN)/python -m benchmarks.smoke

docs: $(VENV)/docs ## Build the documentation site into site/; every broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebook: $(VENV)/docs ## Run docs/quickstart.ipynb again and store its outputs
	$(BIN)/python .ci/run_notebook.py

package: $(VENV)/installed ## Build wheel and sdist, and try the wheel in a clean environment
	.ci/package $(BIN)/python

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Installing gcml-ray, PyTorch, MONAI, Ray and MLflow into $(VENV): 2 GB or more, some minutes without a word"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

clean: ## Remove the environment and caches, never data or runs
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
