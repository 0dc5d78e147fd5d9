# `make demo` makes a picture, `make test` runs the tests, `make figures` draws the README's pictures and
# writes its tables, `make docs` builds the site; all set up .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test slow figures docs clean

demo: $(VENV)/installed
	$(BIN)/sd3min generate "an owl left of a yellow star and above a pizza on cream" --seed 2 --out demo.png

test: $(VENV)/tested
	$(BIN)/python -m pytest -q

slow: $(VENV)/tested
	$(BIN)/python -m pytest -q -m slow

figures: $(VENV)/tested
	$(BIN)/python tools/figures.py

docs: $(VENV)/tested
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --config-file docs/mkdocs.yml

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch --constraint constraints.txt
	$(BIN)/pip install --quiet --editable . --constraint constraints.txt
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(BIN)/pip install --quiet --editable ".[dev]" --constraint constraints.txt
	touch $@

clean:
	rm -rf $(VENV) demo.png
