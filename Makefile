# Each target works alone on a fresh machine with Python >= 3.11 and a C compiler.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test demo check docs clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt tools/install.sh
	PYTHON="$(PYTHON)" bash tools/install.sh
	touch $@

test: install
	$(BIN)/python -m pytest -n auto

demo: install
	$(BIN)/gradsketch demo

check: install
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m sphinx -q -W -b html docs docs/_build

clean:
	rm -rf .venv docs/_build
