"""Follow, from function to function, which dim of a tensor counts the examples of the batch.

A dim counts the examples when its ``size`` is a multiple of their number b and entry r belongs to example
``r // (size / b)``. Only functions known to keep that order are followed. Everything else is unknown, and whoever needs
to know must measure (see ``owners``).
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from gradsketch.gradients.data import tensors_of

__all__ = ["SHARED", "UNKNOWN", "Axis", "Provenance", "einsum_letters", "function_name", "is_full", "tensors_in"]

# The dim that counts examples, or one of the two states below.
Axis = int
SHARED: Final = -1  # nothing in the tensor belongs to an example: parameters, buffers, constants
UNKNOWN: Final = -2

_TAG = "_gradsketch_axis"


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors among arguments, also those in lists and tuples."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):  # a union takes twice as long, at every function
            found += tensors_in(value)
    return found


@lru_cache(maxsize=4096)
def function_name(func: Any) -> str:
    """Return a torch function's plain name: "add" for ``Tensor.__iadd__``, "mT" for the property of that name."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return str(getattr(func.__self__, "__name__", ""))
    name = name.strip("_")
    return name[1:] if name[:1] in ("i", "r") and name[1:] in _OPERATORS else name


def _words(text: str) -> list[str]:
    return text.split()


class Provenance:
    """Where the examples stand in each tensor of one forward pass over ``examples`` examples."""

    def __init__(self, examples: int, batch: Any, constants: Mapping[int, Tensor]) -> None:
        self.examples, self._constants = examples, constants
        self._batch = {id(tensor): tensor for tensor in tensors_of(batch)}
        self._pass = object()  # tags stay on tensors, so they must not hold anything
        self._written: set[int] = set()
        self._probes: dict[Any, Any] = {}

    def axis(self, tensor: Tensor) -> Axis:
        """Return the dim that counts the examples, ``SHARED`` or ``UNKNOWN``."""
        if self._written and self._memory(tensor) in self._written:
            return UNKNOWN
        tag = getattr(tensor, _TAG, None)
        if tag is not None and tag[0] is self._pass:
            return int(tag[1])
        if id(tensor) in self._batch:
            return 0 if tensor.ndim and tensor.shape[0] == self.examples else UNKNOWN
        # What was made before this pass, or outside torch, is a constant of it unless gradients pass through.
        return UNKNOWN if tensor.requires_grad and id(tensor) not in self._constants else SHARED

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note where the examples stand in a function's result."""
        name = function_name(func)
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
        if args and isinstance(args[0], Tensor) and (result is args[0] or name == "setitem"):
            self._wrote(name, args, kwargs)
            return
        results = tensors_in((result,))
        if not results:
            return
        by_place = tensors_in(args)
        results = [t for t in results if not any(t is a for a in by_place)]
        given = by_place + tensors_in(kwargs.values()) if kwargs else by_place
        for position, tensor in enumerate(results):
            self._tag(tensor, self._of_result(name, func, args, kwargs, given, tensor, position, len(results)))

    def follows(self, func: Any) -> bool:
        """Whether a function computes new numbers and its dim of examples is known."""
        name = function_name(func)
        return name in _ELEMENTWISE or (name in _HANDLERS and name not in _RESHAPES)

    def cuts_alike(self, func: Any, place: int) -> bool:
        """Whether operands that count examples do so where the result does, at ``place``, counted from the right."""
        name = function_name(func)
        product = _HANDLERS.get(name) is _product or name == "scaled_dot_product_attention"
        return name in _ELEMENTWISE or (product and place <= -3)

    def place(self, tensor: Tensor, axis: Axis) -> None:
        """Note which dim of a tensor counts the examples."""
        self._tag(tensor, axis)

    def same(self, before: Tensor, after: Tensor) -> None:
        """Note that a tensor is another in the same place, of which a rank may hold a part."""
        axis = self.axis(before)
        cut = axis >= 0 and before.shape[axis] != after.shape[axis]
        self._tag(after, UNKNOWN if cut else axis)

    def _tag(self, tensor: Tensor, axis: Axis) -> None:
        setattr(tensor, _TAG, (self._pass, axis))

    def _memory(self, tensor: Tensor) -> int:
        try:
            return tensor.untyped_storage().data_ptr()
        except RuntimeError:  # a tensor without storage, as inside functorch
            return 0

    def _wrote(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A tensor was written to: through a view, or in a way that is not followed, nobody knows any more."""
        target, before = args[0], self.axis(args[0])
        if name in _VIEWS:  # transpose_ and its like turn the tensor itself
            self._tag(target, before if before == SHARED else UNKNOWN)
            return
        others = [t for t in tensors_in((*args[1:], *kwargs.values())) if self.axis(t) != SHARED]
        if not others or (name == "setitem" and before >= 0 and self._keeps(target, args[1], args[2], before)):
            return
        if name == "setitem" and before == SHARED and not target._is_view():
            self._tag(target, 0)  # as decoders shift their labels into new memory
            if target.ndim and self.multiple(len(target)) and self._keeps(target, args[1], args[2], 0):
                return
            self._tag(target, before)
        after = UNKNOWN
        if name in _ELEMENTWISE:
            after = _elementwise(self, self._relevant([t for t in (target, *others) if self.axis(t) != SHARED]), target)
        if after != before and (after == UNKNOWN or target._is_view()):
            self._written.add(self._memory(target))
        self._tag(target, after)

    def _of_result(
        self,
        name: str,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        given: list[Tensor],
        result: Tensor,
        position: int,
        count: int,
    ) -> Axis:
        examples = [t for t in given if self.axis(t) != SHARED]
        if name in _CONSTANT or not examples:
            return SHARED
        if name == "scaled_dot_product_attention":
            examples = [t for t in given[:3] if self.axis(t) != SHARED]
        relevant = self._relevant(examples)
        if name in _ELEMENTWISE or (name in ("min", "max") and len(given) > 1):
            return _elementwise(self, relevant, result)
        if not relevant or any(self.axis(t) == UNKNOWN for t in relevant):
            return UNKNOWN
        if name in _VIEWS:
            by_all = _by_all(self, args, result) if name == "getitem" else UNKNOWN
            return by_all if by_all >= 0 else self._view(func, args, kwargs, position, count)
        handler = _HANDLERS.get(name)
        return UNKNOWN if handler is None else handler(self, name, args, kwargs, relevant, result)

    def _relevant(self, examples: list[Tensor]) -> list[Tensor]:
        """Return the tensors that decide, of those not shared: with gradients, else of numbers, else all."""
        if len(examples) < 2:
            return examples
        numbers = [t for t in examples if t.is_floating_point()]
        return [t for t in numbers if t.requires_grad] or numbers or examples

    def _view(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int, count: int) -> Axis:
        """Where the dim of examples goes in a view: seen on strides that are 1 there and 0 elsewhere."""
        if not args:
            return UNKNOWN
        source = args[0]
        axis = self.axis(source)
        if axis < 0 or any(isinstance(a, Tensor) for a in _flat((*args[1:], *kwargs.values()))):
            return UNKNOWN
        try:
            key = (func, tuple(source.shape), axis, _frozen(args[1:]), _frozen(tuple(kwargs.items())))
            if key not in self._probes:
                strides = [int(dim == axis) for dim in range(source.ndim)]
                probe = torch.empty_strided(source.shape, strides, device="meta")
                # Indexing by a list and im2col make copies, whose strides say nothing.
                self._probes[key] = [
                    _stride_one(r, source.shape[axis]) if r._is_view() else UNKNOWN
                    for r in tensors_in((func(probe, *args[1:], **kwargs),))
                ]
            found = self._probes[key]
            return int(found[position]) if len(found) == count else UNKNOWN
        except (RuntimeError, TypeError, IndexError):
            return UNKNOWN

    def _keeps(self, target: Tensor, index: Any, value: Any, axis: Axis) -> bool:
        """Whether writing a value to these places leaves every entry of the dim of examples with its example."""
        if not _is_whole(index, axis, target.ndim):
            return False
        place = self._view(Tensor.__getitem__, (target, index), {}, 0, 1) - target[index].ndim
        own = self.axis(value) if isinstance(value, Tensor) else SHARED
        return own == SHARED or (own >= 0 and own - value.ndim == place)

    def multiple(self, size: int) -> bool:
        """Whether a dim of this size can count the examples."""
        return size > 0 and size % self.examples == 0


def _by_all(self: Provenance, args: tuple[Any, ...], result: Tensor) -> Axis:
    """Places of the first dims by tensors, of which one counts all examples in order, as masks of transformers do."""
    source, index = args
    axis = self.axis(source)
    whole = isinstance(index, tuple) and 0 <= axis < len(index)
    if not whole or not all(isinstance(i, Tensor) and not i.is_floating_point() for i in index):
        return UNKNOWN
    own, size = index[axis], source.shape[axis]
    counts = [dim for dim, length in enumerate(own.shape) if length != 1]
    others_shared = all(self.axis(i) == SHARED for i in index if i is not own)
    if len(counts) != 1 or own.numel() != size or own.dtype == torch.bool or not others_shared:
        return UNKNOWN
    if not torch.equal(own.flatten(), torch.arange(size, device=own.device, dtype=own.dtype)):
        return UNKNOWN
    return int(counts[0] + result.ndim - (source.ndim - len(index)) - own.ndim)


def _is_whole(index: Any, axis: Axis, ndim: int) -> bool:
    """Whether places are chosen by numbers along other dims than that of the examples."""
    places = index if isinstance(index, tuple) else (index,)
    dots = [place for place, i in enumerate(places) if i is Ellipsis]
    if dots and not any(i is None or isinstance(i, Tensor | list) for i in places):
        rest = ndim - len(places) + 1
        places = (*places[: dots[0]], *(slice(None) for _ in range(rest)), *places[dots[0] + 1 :])
    plain = not any(isinstance(i, Tensor | list) or i is None or i is Ellipsis for i in places[: axis + 1])
    return plain and len(places) > axis and is_full(places[axis]) and not any(isinstance(i, Tensor) for i in places)


def is_full(index: Any) -> bool:
    """Whether an index takes all there is."""
    return isinstance(index, slice) and index.start in (None, 0) and index.stop is None and index.step in (None, 1)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value


def _frozen(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    return value


def _stride_one(result: Tensor, size: int) -> Axis:
    found = [dim for dim in range(result.ndim) if result.stride(dim) == 1 and result.shape[dim] == size]
    return found[0] if len(found) == 1 and (size > 1 or result.ndim == 1) else UNKNOWN


def _elementwise(self: Provenance, relevant: list[Tensor], result: Tensor) -> Axis:
    """Broadcasting aligns dims from the right; a tensor of size 1 along the dim of examples decides nothing."""
    if len(relevant) == 1:
        axis = self.axis(relevant[0])
        place = axis - relevant[0].ndim
        same = axis >= 0 and -place <= result.ndim and result.shape[place] == relevant[0].shape[axis]
        return result.ndim + place if same and self.multiple(result.shape[place]) else UNKNOWN
    found: set[int] = set()
    unknown = False
    for tensor in relevant:
        axis = self.axis(tensor)
        if axis >= 0:
            found.add(axis - tensor.ndim)
        else:
            unknown = True
    if len(found) != 1:
        return UNKNOWN
    place = found.pop()
    if unknown and any(self.axis(t) == UNKNOWN and t.ndim >= -place and t.shape[place] > 1 for t in relevant):
        return UNKNOWN
    whole = -place <= result.ndim and self.multiple(result.shape[place])
    sizes = {t.shape[place] for t in relevant if self.axis(t) >= 0}
    return result.ndim + place if whole and sizes == {result.shape[place]} else UNKNOWN


def _same_dim(self: Provenance, name: str, args: Any, kwargs: Any, relevant: list[Tensor], result: Tensor) -> Axis:
    """Functions that work along other dims and keep that of the examples."""
    axes = {self.axis(t) for t in relevant}
    if len(axes) != 1:
        return UNKNOWN
    axis = axes.pop()
    same = axis < result.ndim and all(t.shape[axis] == result.shape[axis] for t in relevant)
    return axis if same and self.multiple(result.shape[axis]) else UNKNOWN


def _first_dim(self: Provenance, name: str, args: Any, kwargs: Any, relevant: list[Tensor], result: Tensor) -> Axis:
    """Convolutions, pooling, attention, channel norms: dim 0 or nothing."""
    axis = _same_dim(self, name, args, kwargs, relevant, result)
    return axis if axis == 0 else UNKNOWN


def _before_last(self: Provenance, name: str, args: Any, kwargs: Any, relevant: list[Tensor], result: Tensor) -> Axis:
    axis = _same_dim(self, name, args, kwargs, relevant, result)
    return axis if 0 <= axis < result.ndim - 1 else UNKNOWN


def _normalised(self: Provenance, name: str, args: Any, kwargs: Any, relevant: list[Tensor], result: Tensor) -> Axis:
    shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
    inner = len(shape) if isinstance(shape, tuple | list | torch.Size) else 1
    axis = _same_dim(self, name, args, kwargs, relevant, result)
    return axis if 0 <= axis < result.ndim - inner else UNKNOWN


def _along(self: Provenance, name: str, args: Any, kwargs: Any, relevant: list[Tensor], result: Tensor) -> Axis:
    """Functions along one named dim that keep the shape: softmax, cumsum, sort, roll, flip."""
    axis = _same_dim(self, name, args, kwargs, relevant, result)
    dims = _dims(name, args, kwargs, result.ndim)
    return axis if dims is not None and axis not in dims else UNKNOWN


# Where functions take their dim by position, if they do.
_DIM_POSITION = {
    **dict.fromkeys(
        _words("""softmax log_softmax softmin cumsum cumprod sort argsort cat concat concatenate stack gather"""), 1
    ),
    **dict.fromkeys(_words("sum mean amax amin max min argmax argmin prod var std logsumexp any all nansum median"), 1),
    "index_select": 1,
    **dict.fromkeys(_words("topk roll take_along_dim"), 2),
}
_DIM_DEFAULT = {"sort": -1, "argsort": -1, "topk": -1, "cat": 0, "concat": 0, "concatenate": 0, "stack": 0}


def _dims(name: str, args: Any, kwargs: Any, ndim: int) -> list[int] | None:
    """Return the dims that a call names, counted from the left, or None where it names none."""
    value = next((kwargs[n] for n in ("dim", "dims", "axis") if kwargs.get(n) is not None), None)
    position = _DIM_POSITION.get(name, len(args))
    if value is None:
        value = args[position] if position < len(args) else _DIM_DEFAULT.get(name)
    values: list[Any] = list(value) if isinstance(value, tuple | list) else [value]
    whole = ndim > 0 and len(values) > 0 and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    return [int(v) % ndim for v in values] if whole else None


def _reduced(self: Provenance, name: str, args: Any, kwargs: Any, relevant: list[Tensor], result: Tensor) -> Axis:
    """Sums, means and the like over named dims."""
    source = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input")
    if not isinstance(source, Tensor):
        return UNKNOWN
    axis = self.axis(source)
    dims = _dims(name, args, kwargs, source.ndim)
    if axis < 0 or dims is None or axis in dims:
        return UNKNOWN
    moved = axis if result.ndim == source.ndim else axis - sum(d < axis for d in dims)
    return moved if moved < result.ndim and result.shape[moved] == source.shape[axis] else UNKNOWN


def _reshaped(self: Provenance, name: str, args: Any, kwargs: Any, relevant: list[Tensor], result: Tensor) -> Axis:
    """Row-major order is kept: look for the dim that starts where that of the examples started."""
    source = args[0]
    axis = self.axis(source)
    if axis < 0 or source.numel() == 0:
        return UNKNOWN
    outer, seen = math.prod(source.shape[:axis]), 1
    for dim, size in enumerate(result.shape):
        if seen == outer and size > 1:
            inner = result.numel() // (outer * size)
            # Whole rows of one example: the entries after this dim must divide what one example has.
            exact = self.multiple(size) and (source.numel() // outer // self.examples) % inner == 0
            return dim if exact else UNKNOWN
        seen *= size
    return UNKNOWN


def _padded(self: Provenance, name: str, args: Any, kwargs: Any, relevant: list[Tensor], result: Tensor) -> Axis:
    """Padding of other dims; of this one, what is cut at one side may be added at the other."""
    axis = _same_dim(self, name, args, kwargs, relevant, result)
    sides = args[1] if len(args) > 1 else kwargs.get("pad", ())
    return axis if axis >= 0 and not any(sides[2 * (result.ndim - 1 - axis) :][:2]) else UNKNOWN


def _joined(self: Provenance, name: str, args: Any, kwargs: Any, relevant: list[Tensor], result: Tensor) -> Axis:
    """Concatenation along another dim."""
    axis = _same_dim(self, name, args, kwargs, relevant, result)
    dims = _dims(name, args, kwargs, result.ndim) or [0]
    return axis if axis not in dims else UNKNOWN


def _stacked(self: Provenance, name: str, args: Any, kwargs: Any, relevant: list[Tensor], result: Tensor) -> Axis:
    axes = {self.axis(t) for t in relevant}
    if len(axes) != 1 or min(axes) < 0:
        return UNKNOWN
    axis, dim = axes.pop(), (_dims(name, args, kwargs, result.ndim) or [0])[0]
    return axis + (dim <= axis)


def _repeated(self: Provenance, name: str, args: Any, kwargs: Any, relevant: list[Tensor], result: Tensor) -> Axis:
    source = args[0]
    axis = self.axis(source)
    moved = axis + result.ndim - source.ndim
    return moved if axis >= 0 and result.shape[moved] == source.shape[axis] else UNKNOWN


def _repeat_interleaved(
    self: Provenance, name: str, args: Any, kwargs: Any, relevant: list[Tensor], result: Tensor
) -> Axis:
    source = args[0]
    axis = self.axis(source)
    even = result.ndim == source.ndim and axis >= 0 and result.shape[axis] % source.shape[axis] == 0
    numbers = not any(isinstance(a, Tensor) for a in (*args[1:], *kwargs.values()))
    return axis if even and numbers else UNKNOWN


def _product(self: Provenance, name: str, args: Any, kwargs: Any, relevant: list[Tensor], result: Tensor) -> Axis:
    """Matrix products: a leading dim of all factors that hold examples, or rows of the first or columns of the last."""
    factors = [t for t in tensors_in((*args, *kwargs.values())) if t.ndim > 1]
    if len(factors) < 2 or result.ndim < 2:
        return UNKNOWN
    places = {self.axis(t) - t.ndim for t in relevant}
    if len(places) != 1 or any(self.axis(t) < 0 for t in relevant):
        return UNKNOWN
    place = places.pop()
    alone = len(relevant) == 1 and relevant[0] is (factors[-2] if place == -2 else factors[-1])
    if not (place <= -3 or alone) or -place > result.ndim:
        return UNKNOWN
    return result.ndim + place if result.shape[place] == relevant[0].shape[place] else UNKNOWN


def _distances(self: Provenance, name: str, args: Any, kwargs: Any, relevant: list[Tensor], result: Tensor) -> Axis:
    """Rows of one operand against those of the other: examples in leading dims, or rows of one operand alone."""
    if len(relevant) == 1 and len(args) > 1 and self.axis(relevant[0]) == relevant[0].ndim - 2:
        return result.ndim - (2 if relevant[0] is args[0] else 1)
    places = {self.axis(t) - t.ndim for t in relevant}
    return result.ndim + places.pop() if len(places) == 1 and max(places) <= -3 else UNKNOWN


def einsum_letters(args: tuple[Any, ...]) -> tuple[list[str], str]:
    """Return a letter for each dim of the operands and of the result, also of dims that dots or nothing stand for."""
    left, arrow, right = args[0].replace(" ", "").partition("->")
    given = list(zip(left.split(","), tensors_in(args[1:]), strict=True))
    unused = [letter for letter in string.ascii_letters if letter not in args[0]]
    most = max((t.ndim - len(letters.replace("...", "")) for letters, t in given if "..." in letters), default=0)
    dots = "".join(unused[:most])
    operands = [
        letters.replace("...", dots[most - (t.ndim - len(letters.replace("...", ""))) :])
        if "..." in letters
        else letters
        for letters, t in given
    ]
    if not arrow:
        named = left.replace("...", "").replace(",", "")
        right = "..." + "".join(sorted(letter for letter in set(named) if named.count(letter) == 1))
    return operands, right.replace("...", dots)


def _einsum(self: Provenance, name: str, args: Any, kwargs: Any, relevant: list[Tensor], result: Tensor) -> Axis:
    """The letter of the examples, in every operand that holds some and in the result."""
    if not isinstance(args[0], str):
        return UNKNOWN
    left, right = einsum_letters(args)
    operands = tensors_in(args[1:])
    letters = {
        letter[self.axis(t)]
        for letter, t in zip(left, operands, strict=True)
        if any(t is r for r in relevant) and self.axis(t) >= 0
    }
    if len(letters) != 1 or any(self.axis(t) < 0 for t in relevant):
        return UNKNOWN
    letter = letters.pop()
    return right.index(letter) if letter in right else UNKNOWN


def _gathered(self: Provenance, name: str, args: Any, kwargs: Any, relevant: list[Tensor], result: Tensor) -> Axis:
    """Entries chosen along another dim, by an index whose examples stand in the same dim."""
    given = [t for t in tensors_in((*args, *kwargs.values())) if self.axis(t) != SHARED]
    dims = _dims(name, args, kwargs, result.ndim)
    axis = _same_dim(self, name, args, kwargs, given, result)
    return axis if dims is not None and axis not in dims else UNKNOWN


def _along_another(self: Provenance, name: str, args: Any, kwargs: Any, relevant: list[Tensor], result: Tensor) -> Axis:
    """Entries of another dim, at places that all examples share."""
    source, dims = args[0], _dims(name, args, kwargs, result.ndim)
    shared = all(t is source or self.axis(t) == SHARED for t in tensors_in((*args, *kwargs.values())))
    axis = self.axis(source)
    return axis if shared and axis >= 0 and dims is not None and axis not in dims else UNKNOWN


def _selected(self: Provenance, name: str, args: Any, kwargs: Any, relevant: list[Tensor], result: Tensor) -> Axis:
    """Rows of a table that all share: the index has the examples."""
    index = [t for t in tensors_in((*args[:1], *kwargs.values())) if not t.is_floating_point()]
    if len(index) != 1:
        return UNKNOWN
    axis = self.axis(index[0])
    return axis if 0 <= axis < result.ndim and result.shape[axis] == index[0].shape[axis] else UNKNOWN


_OPERATORS = frozenset(_words("add sub mul div truediv floordiv mod pow and or xor matmul eq ne lt le gt ge"))

_ELEMENTWISE = frozenset(
    _words("""
    add sub mul div truediv floordiv true_divide floor_divide mod remainder fmod pow float_power neg pos abs exp
    exp2 expm1 log log1p log2 log10 sqrt rsqrt square reciprocal sin cos tan sinh cosh tanh asinh erf erfc sigmoid
    logit relu relu6 gelu silu elu selu celu leaky_relu softplus softsign hardtanh hardswish hardsigmoid mish
    logsigmoid tanhshrink softshrink hardshrink threshold prelu rrelu clamp clip clamp_min clamp_max maximum
    minimum fmax fmin where masked_fill lerp addcmul addcdiv dropout alpha_dropout feature_dropout clone
    contiguous to float double half bfloat16 type type_as long int bool detach requires_grad eq ne lt le gt ge
    equal isnan isinf isfinite logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not
    and or xor invert sign round floor ceil trunc frac nan_to_num rsub subtract multiply divide negative data real
    cpu cuda copy positive heaviside xlogy erfinv angle sinc fill zero""")
)

# Their values are constants, whatever they are shaped after.
_CONSTANT = frozenset(
    _words(
        "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty arange"
    )
)

_VIEWS = frozenset(
    _words("""transpose swapaxes swapdims permute movedim moveaxis t T mT H mH adjoint select narrow getitem unsqueeze
    squeeze expand expand_as broadcast_to unbind chunk split tensor_split unfold diagonal""")
)

_RESHAPES = ("view", "reshape", "flatten", "unflatten", "ravel", "view_as", "reshape_as")

_HANDLERS: dict[str, Callable[..., Axis]] = {
    **dict.fromkeys(_RESHAPES, _reshaped),
    **dict.fromkeys(("linear", "glu", "bilinear", "pairwise_distance"), _before_last),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalised),
    **dict.fromkeys(
        (
            "softmax",
            "log_softmax",
            "softmin",
            "cumsum",
            "cumprod",
            "sort",
            "argsort",
            "topk",
            "roll",
            "normalize",
            "flip",
        ),
        _along,
    ),
    **dict.fromkeys(
        _words("""sum mean amax amin max min argmax argmin prod var std norm logsumexp any all vector_norm nansum median
    count_nonzero"""),
        _reduced,
    ),
    **dict.fromkeys(("cat", "concat", "concatenate"), _joined),
    "stack": _stacked,
    **dict.fromkeys(("repeat", "tile"), _repeated),
    "repeat_interleave": _repeat_interleaved,
    **dict.fromkeys(("matmul", "bmm", "mm", "baddbmm", "addmm"), _product),
    "einsum": _einsum,
    "cdist": _distances,
    **dict.fromkeys(("gather", "take_along_dim"), _gathered),
    "embedding": _selected,
    "index_select": _along_another,
    **dict.fromkeys(("pad", "constant_pad_nd"), _padded),
    **dict.fromkeys(
        _words("""scaled_dot_product_attention conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    batch_norm group_norm instance_norm max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    interpolate upsample pixel_shuffle pixel_unshuffle channel_shuffle local_response_norm grid_sample"""),
        _first_dim,
    ),
}
