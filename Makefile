PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test slow check bench clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps torchattacks==3.5.1  # it asks for requests of 2020
	touch $@

demo: $(VENV)/installed  ## train, certify and attack a classifier of real digits; writes demo/report.png
	$(BIN)/gsmooth demo

test: $(VENV)/installed  ## every test that is not marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

slow: $(VENV)/installed  ## the tests that take minutes
	$(BIN)/python -m pytest -q -m slow

check: $(VENV)/installed  ## lint, format, types, import levels
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(VENV)/installed
	$(BIN)/python benchmarks/sampling.py

clean:
	rm -rf $(VENV) build src/*.egg-info
