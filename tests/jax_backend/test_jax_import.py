"""JAX is imported by gradsketch.jax alone, which says in one line how to install it; its examples run."""

import doctest
import importlib.util
import subprocess
import sys

import pytest


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_jax():
    hidden = "import sys; sys.modules['jax'] = None; "
    done = python(hidden + "import gradsketch as gs; gs.AFFD(100, 10); import gradsketch.jax")
    assert done.stderr.splitlines()[-1] == 'ImportError: gradsketch.jax needs JAX: pip install "gradsketch[jax]"'


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="the extra gradsketch[jax] is not installed")
def test_gradsketch_never_imports_jax():
    done = python("import sys, gradsketch as gs; [getattr(gs, n) for n in gs.__all__]; print('jax' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


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
