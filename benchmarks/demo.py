"""What does `make demo` show, and how long does it take? Runs it as a user does and keeps its numbers.

    python benchmarks/demo.py

Writes benchmarks/results/demo.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from record import write


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "gradsketch", "demo", "--out", folder], check=True)
        results = json.loads((Path(folder) / "demo.json").read_text(encoding="utf-8"))
    print(write("demo", {name: value for name, value in results.items() if name not in ("page", "index")}))


if __name__ == "__main__":
    main()
