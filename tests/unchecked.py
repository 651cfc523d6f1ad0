"""Run snippets as a user would: without the type checks that conftest switches on."""

import json
import subprocess
import sys
from pathlib import Path

_SRC = Path(__file__).parents[1] / "src"
_PROGRAM = """
import json, sys
import torch
import gradsketch as gs
answers = []
for snippet in json.load(sys.stdin):
    try:
        eval(snippet)
        answers.append("")
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
print(json.dumps(answers))
"""


def errors_of(snippets: list[str]) -> list[str]:
    """Return, for each expression over ``gs`` and ``torch``, its error as "Type: message", or "" if it passed.

    One process for all of them. Use it where an argument's type is wrong, which the test-time checks would catch
    before the library's own error.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=json.dumps(snippets),
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(_SRC), "OMP_NUM_THREADS": "1"},
    )
    answers: list[str] = json.loads(done.stdout)
    return answers
