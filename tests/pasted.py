"""Run code as Python does when it is pasted at the prompt. In a fresh one: ``python -P tests/pasted.py < block``.

An empty line ends a ``def`` or a ``for``, and what follows one without an empty line is a syntax error, as in Python
before 3.13. The prompt's echo is left out.
"""

import codeop
import sys


def paste(code: str, names: dict[str, object]) -> None:
    """Run every statement of ``code`` as soon as it is complete, with ``names`` as its namespace."""
    compiler, pending, echo = codeop.CommandCompiler(), [], sys.displayhook
    sys.displayhook = lambda value: None
    try:
        for line in [*code.splitlines(), ""]:
            pending.append(line)
            statement = compiler("\n".join(pending), "<pasted>", "single")
            if statement is not None:
                exec(statement, names)
                pending = []
    finally:
        sys.displayhook = echo
    if pending:
        raise SyntaxError(f"it ends in the middle of a statement: {pending}")


if __name__ == "__main__":
    paste(sys.stdin.read(), {"__name__": "__main__"})
