# make demo: try it; make test: all tests; make lint: what CI checks besides; make help: this list
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PARALLEL := -n 3 --dist loadgroup

.PHONY: help demo test test-fast lint benchmark neighbors pin clean

help:
	@echo 'make demo       index and search a sample set of pictures, in build/demo'
	@echo 'make test       run the tests, with real servers (needs Maven and a JDK 17 or newer; PYTEST="…" for options)'
	@echo 'make test-fast  run the tests that need no server'
	@echo 'make lint       check style and types'
	@echo 'make benchmark  measure speed, and write build/benchmark.md'
	@echo 'make neighbors  measure recall on a real Elasticsearch, and write build/neighbors.md; N=1000000 TYPE=int8_hnsw'
	@echo '                for one size and index type, which takes hours and 30 GB of the disk'
	@echo 'make pin        compile requirements*.in to requirements*.txt, with the version and the hashes of every package'
	@echo 'make clean      remove .venv and build'

demo: $(VENV)/installed
	$(BIN)/python -m tools.demo

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST)

test-fast: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow' $(PYTEST)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

benchmark: $(VENV)/installed-dev
	$(BIN)/python -m tools.benchmark

neighbors: $(VENV)/installed-dev
	$(BIN)/python -m tools.neighbors $(if $(N),--size $(N)) $(if $(TYPE),--index-type $(TYPE))

# What imgbeddings names and this project never imports, with what only that needs: half of the whole.
UNUSED := transformers tokenizers safetensors regex typer shellingham rich pygments markdown-it-py mdurl \
    annotated-doc annotated-types pydantic pydantic-core typing-inspection \
    scikit-learn scipy joblib cloudpickle narwhals threadpoolctl

COMPILE := uv pip compile --universal --python-version 3.11 --generate-hashes --quiet --upgrade --custom-compile-command "make pin"

pin: $(VENV)/installed-dev
	$(BIN)/$(COMPILE) $(UNUSED:%=--no-emit-package %) requirements.in -o requirements.txt
	$(BIN)/$(COMPILE) requirements-dev.in -o requirements-dev.txt

clean:
	rm -rf .venv build

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: set PYTHON=python3.x" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'Python could not make $(VENV) (Debian: apt-get install python3-venv)'; exit 1; }

$(VENV)/installed: $(VENV)/bin/python requirements.txt
	@echo 'Installing the dependencies into $(VENV); this takes a minute or two'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/bin/python requirements.txt requirements-dev.txt
	@echo 'Installing the dependencies of the tests into $(VENV); this takes some minutes'
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/installed
