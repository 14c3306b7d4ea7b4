.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test test-browser test-js arm frozen wheelhouse optimum lint docs bench bench-peers build clean

help: ## Show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 14

setup: $(VENV)/.test ## Make .venv with everything: runtime, converters (torch), tests, linters

demo: $(VENV)/.demo ## Make .venv with the light runtime and rerank a sample file with mini
	$(BIN)/qrank score -q "how do plants make food?" --top-k 3 --format table docs/sample/passages.txt

test: $(VENV)/.test ## Run the tests
	@# xdist's loadfile waits for ever after a worker that died and was replaced.
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 \
	  -m "not browser and not install and not ray"
	$(BIN)/python -m pytest -m ray tests/test_ray.py

test-browser: $(VENV)/.test-browser ## Run the tests of the page of qrank serve, in Chromium
	$(BIN)/python tests/browser.py
	$(BIN)/python -m pytest -m browser tests/test_page_browser.py

test-js: $(VENV)/.test clients/js/node_modules/.installed ## Run the tests of clients/js, in Node and Chromium, and compare with Python
	cd clients/js && npm run types && npm test
	$(BIN)/python -m pytest -n 2 tests/test_js.py

arm: $(VENV)/.test $(VENV)-wheelhouse/.wheelhouse ## Prove and rank on aarch64, emulated (Debian, x86-64; REPORT=FILE writes a report)
	$(BIN)/python tests/arm.py $(if $(REPORT),--report $(REPORT)) $(TARGETS)

frozen: $(VENV)/.test-install ## Install qrank without a network, freeze an application of one file, and test both
	$(BIN)/python -m pytest -m install tests/test_install.py

wheelhouse: $(VENV)-wheelhouse/.wheelhouse ## Collect all wheels for PLATFORM=manylinux_2_28_aarch64 (VERSION=3.12, EXTRAS=onnx) in dist/
	$(VENV)-wheelhouse/bin/python deploy/wheelhouse.py --platform $(or $(PLATFORM),native) \
	  $(if $(VERSION),--python $(VERSION)) --extras $(or $(EXTRAS),onnx)

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

docs: $(VENV)/.docs ## Build the documentation as a site into build/site; warnings are errors
	@# mkdocs-material prints that mkdocs 2 will not run it; pyproject.toml has the bound.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.test ## Run the benchmarks; DATA=folder with Cranfield (see benchmarks/README.md)
	@test -n "$(DATA)" || { echo "make bench DATA=FOLDER; see benchmarks/README.md"; exit 2; }
	for script in startup install extras latency batching budget; do \
	  $(BIN)/python benchmarks/$$script.py --data $(DATA) || exit 1; \
	done

bench-peers: $(VENV)/.test $(VENV)-peers-openvino/.peers $(VENV)-peers-onnx/.peers ## Compare with the alternatives; DATA=folder with Cranfield; takes an hour and more
	@test -n "$(DATA)" || { echo "make bench-peers DATA=FOLDER; see benchmarks/README.md"; exit 2; }
	$(BIN)/python benchmarks/record.py --data $(DATA) \
	  --openvino-python $(VENV)-peers-openvino/bin/python --onnx-python $(VENV)-peers-onnx/bin/python

build: $(VENV)/.test ## Build wheel and sdist into dist/
	rm -rf dist
	$(BIN)/python -m build

clean: ## Remove what was made, .venv included
	rm -rf $(VENV) $(VENV)-optimum $(VENV)-peers-* $(VENV)-wheelhouse build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[cpu]"
	touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@ $(VENV)/.demo

# No install scripts: onnxruntime-node's would fetch CUDA's libraries, from elsewhere.
clients/js/node_modules/.installed: clients/js/package.json clients/js/package-lock.json
	cd clients/js && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

$(VENV)/.docs: $(VENV)/.test
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

$(VENV)/.test-browser: $(VENV)/.test
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[browser-test]"
	touch $@

$(VENV)/.test-install: $(VENV)/.test
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[install-test]"
	touch $@

$(VENV)-wheelhouse/.wheelhouse:
	$(PYTHON) -m venv $(VENV)-wheelhouse
	$(VENV)-wheelhouse/bin/pip install --quiet --disable-pip-version-check "uv>=0.9"
	touch $@

# optimum-intel takes older packages than .venv has.
$(VENV)-optimum/.optimum: pyproject.toml
	$(PYTHON) -m venv $(VENV)-optimum
	$(VENV)-optimum/bin/pip install --quiet --disable-pip-version-check -e ".[cpu,optimum]" \
	  filelock hypothesis pytest
	touch $@

# The alternatives' versions conflict with .venv's, and with each other's (benchmarks/README.md).
$(VENV)-peers-openvino/.peers:
	$(PYTHON) -m venv $(VENV)-peers-openvino
	$(VENV)-peers-openvino/bin/pip install --quiet --disable-pip-version-check "torch==2.13.0" \
	  "sentence-transformers==6.2.0" "optimum-intel[openvino]<2.2"
	touch $@

$(VENV)-peers-onnx/.peers:
	$(PYTHON) -m venv $(VENV)-peers-onnx
	$(VENV)-peers-onnx/bin/pip install --quiet --disable-pip-version-check "torch==2.13.0" \
	  "sentence-transformers==5.1.2" "transformers<4.58" "optimum-onnx[onnxruntime]" fastembed FlashRank
	touch $@
