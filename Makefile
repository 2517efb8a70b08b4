# make demo: try it; make test: all tests; make lint: what CI checks besides; make help: this list
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint benchmark neighbours readme pin clean

help:
	@echo 'make demo       index and search a sample set of pictures, in build/demo'
	@echo 'make test       run the tests, with a real Elasticsearch (needs Maven and a JDK 17 or newer)'
	@echo 'make lint       check style and types'
	@echo 'make benchmark  measure speed, and write build/benchmark.md'
	@echo 'make neighbours measure recall and loads on a real Elasticsearch, and write build/neighbours.md'
	@echo 'make readme     write the option lists of the README from --help'
	@echo 'make pin        compile requirements*.in to requirements*.txt, every version pinned'
	@echo 'make clean      remove .venv and build'

demo: .venv/installed
	$(BIN)/python -m tools.demo

test: .venv/installed-dev
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

benchmark: .venv/installed-dev
	$(BIN)/python -m tools.benchmark

neighbours: .venv/installed-dev
	$(BIN)/python -m tools.benchmark.neighbours

readme: .venv/installed-dev
	$(BIN)/python -m tools.readme

pin: .venv/installed-dev
	$(BIN)/uv pip compile --universal --python-version 3.11 --quiet --upgrade requirements.in -o requirements.txt
	$(BIN)/uv pip compile --universal --python-version 3.11 --quiet --upgrade requirements-dev.in -o requirements-dev.txt

clean:
	rm -rf .venv build

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: set PYTHON=python3.x" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo 'Python could not make .venv (Debian: apt-get install python3-venv)'; exit 1; }

.venv/installed: .venv/bin/python requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/bin/python requirements.txt requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ .venv/installed
