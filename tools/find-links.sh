#!/usr/bin/env bash
# Print the local wheel folders that pip would look in, as uv takes them: uv does not read pip's configuration.
set -euo pipefail
links=${PIP_FIND_LINKS:-$("${PYTHON:-python3}" -m pip config get global.find-links 2>/dev/null || true)}
echo "$links" | tr ' \n' ',,'
