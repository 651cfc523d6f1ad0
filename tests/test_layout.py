"""Modules import one another in no circle, however an import is written, and the public names are all there."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import gradsketch as gs

SOURCE = Path(gs.__file__).parent
FRONT_DOOR = "gradsketch"  # resolves the public names by text on first use; it is the only module that may


def module_name(path):
    parts = ("gradsketch", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}


def imported(text, known):
    """Return the known modules that a module imports, at its top, in a function, or for a type checker."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
    return found & known


def circle(arrows):
    """Return the modules of one circle, in order, or nothing."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for other in sorted(arrows[module]):
            if found := visit(other):
                return found
        done.add(path.pop())
        return []

    return next((found for module in sorted(arrows) if (found := visit(module))), [])


def names_imports(text):
    """Whether a module can import by text, which no one who follows imports can see."""
    for node in ast.walk(ast.parse(text)):
        names = [node.id] if isinstance(node, ast.Name) else []
        names += [node.attr] if isinstance(node, ast.Attribute) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        if {"import_module", "__import__"} & set(names):
            return True
    return False


def test_no_circle_of_imports():
    arrows = {name: imported(text, MODULES.keys()) for name, text in MODULES.items()}
    assert sum(map(len, arrows.values())) > 300  # the imports were seen at all
    assert circle(arrows) == []


def test_only_the_front_door_imports_by_text():
    assert {name for name, text in MODULES.items() if names_imports(text)} == {FRONT_DOOR}


@pytest.mark.parametrize(
    "hidden",
    [
        "from b import thing",
        "import b",
        "def f():\n    from b import thing",
        "if TYPE_CHECKING:\n    import b",
        "try:\n    import b\nexcept ImportError:\n    pass",
    ],
)
def test_a_circle_is_seen_wherever_the_import_stands(hidden):
    texts = {"a": hidden, "b": "from c import x", "c": "import a", "d": "import a"}
    arrows = {name: imported(text, texts.keys()) for name, text in texts.items()}
    assert circle(arrows) == ["a", "b", "c", "a"]
    assert circle(arrows | {"c": set()}) == []


@pytest.mark.parametrize(
    "text", ["importlib.import_module('b')", "from importlib import import_module as f", "__import__('b')"]
)
def test_imports_by_text_are_seen(text):
    assert names_imports(text)
    assert not names_imports("import importlib.metadata")


# Functions of torch that make tensors from nothing, and those of them whose dtype is else the user's default.
_WHOLE = {"arange", "randint", "randperm", "tensor", "tril_indices", "triu_indices", "empty_strided"}
_BROKEN = {"empty", "eye", "full", "linspace", "ones", "rand", "randn", "zeros"}


def left_to_the_user(text):
    """Return the lines that make a tensor on the default device, or of the default dtype."""
    lines = []
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
            wanted = {"device"} if node.func.attr in _WHOLE | _BROKEN else set()
            of_numbers = node.func.attr == "full" and any("index" in ast.unparse(a) for a in node.args[1:])
            wanted |= {"dtype"} if node.func.attr in _BROKEN and not of_numbers else set()
            if wanted - {keyword.arg for keyword in node.keywords}:
                lines.append(node.lineno)
    return lines


def test_own_tensors_depend_on_no_default_that_a_user_has_set():
    found = {name: left_to_the_user(text) for name, text in MODULES.items() if ".jax" not in name}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_a_tensor_that_is_left_to_the_user_is_seen():
    assert left_to_the_user("torch.zeros(3)\ntorch.ones(3, device=d)\ntorch.arange(3)\ntorch.zeros(3, dtype=t)") == [
        1,
        2,
        3,
        4,
    ]
    assert left_to_the_user("torch.zeros(3, dtype=t, device=d)\ntorch.arange(3, device=d)\nx.new_zeros(3)") == []


def test_every_public_name_resolves_to_where_it_is_said_to_be():
    for name in gs.__all__:
        assert getattr(gs, name) is not None
        assert gs._HOME[name] in MODULES


def test_files_of_tests_have_names_of_their_own():
    """Pytest imports each by its name alone, and would stop at the second of one name."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, often in names.items() if often > 1] == []
