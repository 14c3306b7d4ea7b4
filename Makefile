.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test optimum lint bench build clean

help: ## Show this
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/\1\t\2/' | expand -t 10

setup: $(VENV)/.test ## Make .venv with everything: runtime, converters (torch), tests, linters

demo: $(VENV)/.demo ## Make .venv with the light runtime and rerank a sample file with mini
	$(BIN)/qrank score -q "how do plants make food?" --top-k 5 --format table docs/sample/passages.txt

test: $(VENV)/.test ## Run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

optimum: $(VENV)-optimum/.optimum ## Run the tests of --exporter optimum, in an environment of its own
	$(VENV)-optimum/bin/python -m pytest tests/test_optimum.py

lint: $(VENV)/.test ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@# mypy does not know that qrank.converters lies in converters/: check a copy that is laid out.
	rm -rf build/typed
	$(BIN)/pip install --quiet --no-deps --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy -p qrank
	MYPYPATH=build/typed $(BIN)/mypy tests

bench: $(VENV)/.test ## Run the benchmarks; DATA=folder with Cranfield (see benchmarks/README.md)
	@test -n "$(DATA)" || { echo "make bench DATA=FOLDER; see benchmarks/README.md"; exit 2; }
	for script in startup install latency batching budget; do \
	  $(BIN)/python benchmarks/$$script.py --data $(DATA) || exit 1; \
	done

build: $(VENV)/.test ## Build wheel and sdist into dist/
	rm -rf dist
	$(BIN)/python -m build

clean: ## Remove what was made, .venv included
	rm -rf $(VENV) $(VENV)-optimum build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[cpu]"
	touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@ $(VENV)/.demo

# optimum-intel takes older packages than .venv has.
$(VENV)-optimum/.optimum: pyproject.toml
	$(PYTHON) -m venv $(VENV)-optimum
	$(VENV)-optimum/bin/pip install --quiet --disable-pip-version-check -e ".[cpu,optimum]" \
	  filelock hypothesis pytest
	touch $@
