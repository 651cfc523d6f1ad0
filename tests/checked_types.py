"""jaxtyping's checks of every call, without three costs of theirs. What is checked is the same.

* ``jaxtyped`` compiles two checks whenever a ``def`` runs, milliseconds for a function inside a function each time that
  the outer one is called. Here the first one's check serves them all.
* It checks the arguments at every call twice, and looks for shapes also where a signature has none. Here beartype
  checks once, in a context of jaxtyping's where there are shapes.
* While its hook imports a module, all that this module imports is compiled anew: torch's compiler, transformers, sympy.
  Here the hook looks for bytecode of its own for the modules of gradsketch only.
"""

import functools
import inspect
import types
import typing
from importlib.machinery import SourceFileLoader
from unittest.mock import patch

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, _import_hook

check = beartype(conf=BeartypeConf(violation_type=TypeCheckError))
_jaxtyped = jaxtyping.jaxtyped
_context = _jaxtyped("context")
_made = {}


def install():
    """Check every call of a function of gradsketch that is imported from now on."""
    jaxtyping.jaxtyped = _typed
    loader = _import_hook._JaxtypingLoader
    loader.exec_module, loader.get_code = SourceFileLoader.exec_module, _code_with_checks
    jaxtyping.install_import_hook("gradsketch", "checked_types.check")


def _code_with_checks(loader, name):
    own = functools.partial(_import_hook._optimized_cache_from_source, loader._typechecker.get_hash())
    with patch("importlib._bootstrap_external.cache_from_source", own):
        return SourceFileLoader.get_code(loader, name)


def _typed(function=None, *, typechecker):
    if function is None:
        return functools.partial(_typed, typechecker=typechecker)
    if not isinstance(function, types.FunctionType):
        return _jaxtyped(function, typechecker=typechecker)
    if inspect.isgeneratorfunction(function):  # whose arguments beartype checks later, in another's context
        return _jaxtyped(function, typechecker=typechecker)
    return (_nested if "<locals>" in function.__qualname__ else _checked)(function, typechecker)


def _checked(function, typechecker):
    function.__annotations__ = {name: _read(function, hint) for name, hint in function.__annotations__.items()}
    return _in_context(typechecker(function), any(map(_names_a_shape, function.__annotations__.values())))


def _read(function, hint):
    """The type that an annotation stands for; anything, where it names what only type checkers know."""
    holder = types.SimpleNamespace(__annotations__={"it": hint}, __globals__=function.__globals__)
    try:
        return typing.get_type_hints(holder, include_extras=True)["it"]
    except Exception:  # whatever an annotation raises that only type checkers are meant to read
        return typing.Any


def _names_a_shape(hint):
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(map(_names_a_shape, hint if isinstance(hint, list) else typing.get_args(hint)))


def _in_context(function, shapes):
    """In a context, one letter is one size throughout a call."""
    if not shapes:
        return function

    @functools.wraps(function)
    def checked(*args, **kwargs):
        with _context:
            return function(*args, **kwargs)

    return checked


def _nested(function, typechecker):
    """Check one of many functions that one ``def`` makes as the first of them; what that one holds is not kept."""
    # By the text of its annotations, because a shape is a new class whenever it is written.
    key = function.__module__, function.__code__, repr(function.__annotations__)
    if key not in _made:
        _made[key] = _recipe(function, typechecker)
    parts, objects, shapes = _made[key]
    if parts is None:
        return function
    checked = types.FunctionType(*parts)
    checked.__kwdefaults__ = objects | {"__beartype_func": function}
    return _in_context(functools.update_wrapper(checked, function), shapes)


def _recipe(function, typechecker):
    """How beartype checks a function, seen on a twin with empty cells in place of what it closes over."""
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    twin = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    twin.__qualname__, twin.__module__ = function.__qualname__, function.__module__
    twin.__annotations__ = {name: _read(function, hint) for name, hint in function.__annotations__.items()}
    twin.__defaults__ = function.__defaults__ and (None,) * len(function.__defaults__)
    twin.__kwdefaults__ = function.__kwdefaults__ and dict.fromkeys(function.__kwdefaults__)
    checked = typechecker(twin)
    if checked is twin:  # nothing to check
        return None, None, False
    objects = dict(checked.__kwdefaults__)
    del objects["__beartype_func"]
    parts = checked.__code__, checked.__globals__, checked.__name__, checked.__defaults__, checked.__closure__
    return parts, objects, any(map(_names_a_shape, twin.__annotations__.values()))
