#!/usr/bin/env bash
# Build the wheel and the sdist, and see each work in an empty environment; the wheel also with the oldest dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/build"
"$work/build/bin/pip" install --quiet --disable-pip-version-check build hatchling uv
rm -rf dist
"$work/build/bin/python" -m build --quiet --no-isolation --outdir dist .

# torch stays that of constraints.txt: others come with gigabytes for a GPU.
grep '^torch==' constraints.txt > "$work/torch.txt"
export UV_FIND_LINKS=$(PYTHON="$python" bash tools/find-links.sh)

try() { # name, what to install, further options
    "$python" -m venv "$work/$1"
    "$work/build/bin/uv" pip install --quiet --python "$work/$1/bin/python" -c "$work/torch.txt" "${@:2}"
    (cd "$work" && "$work/$1/bin/python" "$OLDPWD/tools/smoke.py")
}

try wheel dist/*.whl
try sdist dist/*.tar.gz
try oldest --resolution lowest-direct dist/*.whl
ls -l dist
