#!/usr/bin/env bash
# Create .venv with everything a developer needs. uv where it can be had (seconds), plain pip otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
extras='.[hf,demo,plot,dev,docs]'

[ -x .venv/bin/python ] || "$python" -m venv .venv
export UV_FIND_LINKS=$(PYTHON="$python" bash tools/find-links.sh)

if .venv/bin/python -m pip install --quiet --disable-pip-version-check uv 2>/dev/null; then
    .venv/bin/uv pip install --quiet --python .venv/bin/python -c constraints.txt -e "$extras"
else
    .venv/bin/python -m pip install --quiet -c constraints.txt -e "$extras"
fi
