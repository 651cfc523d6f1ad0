#!/usr/bin/env bash
# Create .venv with everything a developer needs. uv where it can be had (seconds), plain pip otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
extras='.[hf,demo,plot,dev,docs]'

[ -x .venv/bin/python ] || "$python" -m venv .venv
# uv does not read pip's configuration: hand it the local wheel folder that pip would look in, if there is one.
links=${PIP_FIND_LINKS:-$("$python" -m pip config get global.find-links 2>/dev/null || true)}

if .venv/bin/python -m pip install --quiet --disable-pip-version-check uv 2>/dev/null; then
    UV_FIND_LINKS=$(echo "$links" | tr ' \n' ',,') \
        .venv/bin/uv pip install --quiet --python .venv/bin/python -c constraints.txt -e "$extras"
else
    .venv/bin/python -m pip install --quiet -c constraints.txt -e "$extras"
fi
