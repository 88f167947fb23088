# make demo: train ten models and draw what they cost.   make test: run the tests.
# make docs: build the documentation site.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow lint docs install constraints clean

demo: install
	$(RUN) -m train.examples.demo

test: install
	$(RUN) -m pytest -q -n 2

test-slow: install
	$(RUN) -m pytest -q -n 2 -m slow

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# An undocumented public name and a broken link or anchor are errors. Nothing in site/ needs a network.
docs: $(VENV)/docs
	$(RUN) -m pytest -q tests/test_docs.py
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

install: $(VENV)/installed

# The authors' package is the oracle of tests/test_compat.py. It has our name, so it is kept apart.
$(VENV)/installed: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,test]'
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/published vision_xformer==0.2.0
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# Writes constraints.txt anew, for every supported Python.
constraints:
	$(RUN) -m pip install --quiet uv
	$(RUN) -m uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate --no-emit-index-url --extra train --extra test --extra docs --upgrade -o constraints.txt pyproject.toml

clean:
	rm -rf $(VENV) runs build site *.egg-info
