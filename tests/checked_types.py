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
from jaxtyping import AbstractArray, _import_hook

_jaxtyped = jaxtyping.jaxtyped
_context = _jaxtyped("context")
_checks = {}


def install():
    """Check every call of a function of gradsketch that is imported from now on."""
    jaxtyping.jaxtyped = _typed
    loader = _import_hook._JaxtypingLoader
    loader.exec_module, loader.get_code = SourceFileLoader.exec_module, _code_with_checks
    jaxtyping.install_import_hook("gradsketch", "beartype.beartype")


def _code_with_checks(loader, name):
    own = functools.partial(_import_hook._optimized_cache_from_source, loader._typechecker.get_hash())
    with patch("importlib._bootstrap_external.cache_from_source", own):
        return SourceFileLoader.get_code(loader, name)


def _typed(function=None, *, typechecker):
    if function is None:
        return functools.partial(_typed, typechecker=typechecker)
    if not isinstance(function, types.FunctionType):
        return _jaxtyped(function, typechecker=typechecker)
    if "<locals>" in function.__qualname__:
        return _nested(function, typechecker)
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception:  # a name that only type checkers know: jaxtyping reads the others of the signature
        return _jaxtyped(function, typechecker=typechecker)
    checked = typechecker(function)
    return _in_a_context(checked) if any(map(_names_a_shape, hints.values())) else checked


def _in_a_context(function):
    """One letter is one size throughout a call."""

    @functools.wraps(function)
    def checked(*args, **kwargs):
        with _context:
            return function(*args, **kwargs)

    return checked


def _names_a_shape(hint):
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(map(_names_a_shape, hint if isinstance(hint, list) else typing.get_args(hint)))


def _nested(function, typechecker):
    """Wrap one of many functions that one ``def`` makes, by the check of the first."""
    # By their text, because a shape is a new class whenever it is written.
    key = function.__module__, function.__code__, repr(function.__annotations__)
    if key not in _checks:
        _checks[key] = _jaxtyped(_caller_of(function), typechecker=typechecker)
    check = _checks[key]

    @functools.wraps(function)
    def checked(*args, **kwargs):
        return check(function, *args, **kwargs)

    return checked


def _call(function, /, *args, **kwargs):
    return function(*args, **kwargs)


def _caller_of(function):
    """``_call`` with the signature of a function, and without a reference to anything that the function holds."""
    caller = types.FunctionType(_call.__code__, function.__globals__, function.__name__)
    caller.__qualname__, caller.__module__ = function.__qualname__, function.__module__
    signature = inspect.signature(function)
    first = inspect.Parameter("the_function_itself", inspect.Parameter.POSITIONAL_ONLY)
    others = [p if p.default is p.empty else p.replace(default=None) for p in signature.parameters.values()]
    caller.__signature__ = signature.replace(parameters=[first, *others])
    return caller
