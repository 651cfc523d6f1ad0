"""JAX is imported by gradsketch.jax alone, which says in one line how to install it; its examples run."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradsketch as gs


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_jax():
    hidden = "import sys; sys.modules['jax'] = None; "
    done = python(hidden + "import gradsketch as gs; gs.AFFD(100, 10); import gradsketch.jax")
    assert done.stderr.splitlines()[-1] == 'ImportError: gradsketch.jax needs JAX: pip install "gradsketch[jax]"'


def test_nothing_else_imports_jax():
    source = Path(gs.__file__).parent
    own = {source / "jax", source / "demo" / "animals.py"}  # the latter is a model in JAX, which nothing imports
    others = [path for path in source.rglob("*.py") if not own & {path, path.parent}]
    found = [
        path for path in others if re.search(r"(import|from) (gradsketch\.)?jax\b", path.read_text(encoding="utf-8"))
    ]
    assert len(others) > 200
    assert not found


EXAMPLES = ["affd", "afjl", "qk", "srht", "block_sum", "per_example", "flax_names", "hvp"]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name):
    jax = pytest.importorskip("jax", reason="the extra gradsketch[jax] is not installed")
    import gradsketch.jax as gj

    names = {"gj": gj, "jnp": jax.numpy, "jax": jax}
    (found,) = doctest.DocTestFinder(recurse=False).find(getattr(gj, name), name, globs=names)
    assert found.examples
    printed = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found, out=printed.append)
    assert not printed, "".join(printed)
