"""How much a sketch distorts the gradients of a user's own model, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.evaluation.cost import interleaved_seconds, peak_bytes
from gradsketch.evaluation.quality import Quality, check_wanted, needed_size, sketch_quality
from gradsketch.evaluation.stored import Stored, cheapest, stored_qualities, stored_table
from gradsketch.gradients.data import Batcher, to_device
from gradsketch.gradients.gram import gradient_gram
from gradsketch.gradients.parameters import Parameters, Selection, selected
from gradsketch.gradients.per_example import GradientSketcher
from gradsketch.gradients.per_example.audit import Audits
from gradsketch.gradients.per_example.differentiating import differentiating
from gradsketch.gradients.tasks import Batch, Task, TaskLike, as_task
from gradsketch.report.distortion import distortion_figure
from gradsketch.results import Result
from gradsketch.sketches.base import Sketch
from gradsketch.sketches.block_sum import BlockSum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Distortion", "distortion"]

_SMALLEST = 256  # sizes below say little about anything
_VERIFIED = 3
# Largest relative error of a gradient that rounding explains, by the dtype of the weights.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 5e-2


@dataclass(frozen=True, eq=False)
class Distortion(Result):
    """What ``distortion`` measured on one model of ``parameters`` numbers, on ``examples`` rows of a task.

    ``qualities`` says how well each size of sketch keeps inner products. Batches had ``batch`` examples.
    ``gradient_error`` is the largest relative error of ``verified`` examples' sketched gradients against autograd, each
    run alone; ``tolerance`` is what rounding explains. ``seconds`` and ``reference_seconds`` are medians for one batch,
    of the sketches and of a plain forward + backward, interleaved; ``peak_bytes`` and ``reference_peak_bytes`` likewise
    (None where memory cannot be measured). ``needed`` is the d, unrounded, at which r would be ``wanted``. ``audits``
    says how many batches were held against autograd's gradients; ``slow`` maps each parameter whose gradients are
    formed one example after another to the operation and the module's class, and ``slow_share`` is their share of all
    entries. ``stored`` says what r is left at each size where an index stores rows in fewer bits.
    """

    derived = ("right", "cost_ratio", "sufficient", "recommended", "cheapest")

    parameters: int
    examples: int
    qualities: tuple[Quality, ...]
    verified: int
    gradient_error: float
    tolerance: float
    batch: int
    seconds: float
    reference_seconds: float
    peak_bytes: int | None
    reference_peak_bytes: int | None
    wanted: float
    needed: float
    audits: Audits
    slow: dict[str, str]
    slow_share: float
    stored: tuple[Stored, ...] = ()

    @property
    def right(self) -> bool:
        """Whether the verified gradients agree with autograd to rounding."""
        return self.gradient_error <= self.tolerance

    @property
    def cost_ratio(self) -> float:
        """Time of the sketches over the time of a plain forward + backward."""
        return self.seconds / self.reference_seconds

    @property
    def sufficient(self) -> int | None:
        """The smallest measured d whose interval for r lies above ``wanted``, if any."""
        return min((q.d for q in self.qualities if q.pearson_interval[0] >= self.wanted), default=None)

    @property
    def recommended(self) -> int:
        """``sufficient`` or, where it is smaller, the power of two from ``needed`` on, at most all parameters.

        The prediction takes errors of different pairs for independent. Where gradients have much in common, so have
        the errors, which then spoil r less than predicted.
        """
        predicted = self.parameters
        if self.needed < self.parameters:
            predicted = min(self.parameters, 1 << max(0, math.ceil(math.log2(max(1.0, self.needed)))))
        return predicted if self.sufficient is None else min(predicted, self.sufficient)

    @property
    def cheapest(self) -> Stored | None:
        """The fewest bytes per row, among the sizes and dtypes measured, whose interval for r lies above ``wanted``."""
        return cheapest(self.stored, self.wanted)

    def summary(self) -> str:
        sound = "right" if self.right else "WRONG"
        noise, d = self.qualities[-1].noise, self.qualities[-1].d
        return (
            f"gradients {sound}, noise·√d {noise:.3f} at d = {d:,}, {self.cost_ratio:.2f} × forward + backward; "
            f"recommended d = {self.recommended:,} for r ≥ {self.wanted:g}"
        )

    def _figure(self) -> Figure:
        return distortion_figure(self.qualities, self.wanted, self.recommended)

    def __str__(self) -> str:
        """Return a table a person understands."""
        return "\n".join(_table(self))


def distortion(
    model: nn.Module,
    task: TaskLike,
    examples: Sequence[Any],
    sketch: Sketch,
    *,
    parameters: Selection = None,
    wanted: float = 0.95,
    repeats: int = 3,
) -> Distortion:
    """Measure on raw examples how well the sketch keeps their gradients' inner products, and what it costs.

    Exact inner products come from ``gradient_gram``. Where the sketch nests, its size is halved down to 256, all from
    one pass. 32 to 128 examples of the kind that will be indexed do; time and memory are taken on the largest batch.

    Args:
        model: in the mode it will be used in; left as it was found.
        task: maps batches to per-example losses and collates raw examples.
        examples: raw examples, at least three with a gradient.
        sketch: a BlockSum over parameters of the model, or any sketch of the flat vector of ``parameters``.
        parameters: the selection, or globs of names; by default the BlockSum's own.
        wanted: the Pearson r that ``needed`` and ``recommended`` aim at.
        repeats: how often time is taken.

    Example:
        >>> model, task = torch.nn.Linear(20, 2), gs.Classification()
        >>> data = [(torch.randn(20), i % 2) for i in range(32)]
        >>> result = gs.distortion(model, task, data, gs.BlockSum(gs.Parameters(model), 32), repeats=1)
        >>> result.right
        True

    Raises:
        InputError: fewer than three examples with a gradient, or r is not between 0 and 1.
        NonFiniteError: a loss or gradient is not finite.
    """
    check_wanted(wanted)
    check = _Check(model, as_task(task), examples, sketch, parameters)
    sketches, exact = check.sketches(), check.exact()
    sizes = list(_sizes(sketch, sketches))
    qualities = tuple(sketch_quality(exact, part) for part in sizes)
    noise = math.sqrt(sum(q.noise**2 for q in qualities) / len(qualities))
    seconds, memory = check.cost(repeats)
    return Distortion(
        parameters=sketch.n,
        examples=len(examples),
        qualities=qualities,
        verified=min(_VERIFIED, len(examples)),
        gradient_error=check.gradient_error(sketches),
        tolerance=check.tolerance,
        batch=len(check.places[0]),
        seconds=seconds[0],
        reference_seconds=seconds[1],
        peak_bytes=memory[0],
        reference_peak_bytes=memory[1],
        wanted=wanted,
        needed=needed_size(exact, noise, wanted),
        audits=check.sketcher.audits,
        slow=dict(check.sketcher.slow),
        slow_share=sum(check.tensors[name].numel() for name in check.sketcher.slow) / sketch.n,
        stored=stored_qualities(exact, sizes),
    )


class _Check:
    """The measurements, on one set of examples in batches of like length."""

    def __init__(
        self, model: nn.Module, task: Task, examples: Sequence[Any], sketch: Sketch, parameters: Selection
    ) -> None:
        self.model, self.task, self.examples, self.sketch = model, task, examples, sketch
        self.sketcher = GradientSketcher(model, task, sketch, parameters=parameters)
        if parameters is None and isinstance(sketch, BlockSum):
            parameters = Parameters(model, sketch.names, frozen=True)
        self.parameters = selected(model, parameters)
        self.tensors = dict(self.parameters)
        example = next(iter(self.tensors.values()))
        self.device = example.device
        self.tolerance = _TOLERANCE.get(example.dtype, _HALF_TOLERANCE)
        self.places: list[list[int]] = []

    def sketches(self) -> Float[Tensor, "b d"]:
        """Sketch every example."""
        out = torch.zeros(len(self.examples), self.sketch.d, dtype=torch.float64, device="cpu")
        batcher = Batcher(self.task, device=self.device)
        for places, values in batcher.map(lambda batch: self.sketcher(batch).values, self.examples):
            out[places] = values.double().cpu()
            self.places.append(places)
        return out

    def exact(self) -> Float[Tensor, "b b"]:
        """Return all exact inner products."""
        out = torch.zeros(len(self.examples), len(self.examples), dtype=torch.float64, device="cpu")
        for i, rows in enumerate(self.places):
            for columns in self.places[: i + 1]:
                second = None if columns is rows else self._batch(columns)
                gram = gradient_gram(self.model, self.task, self._batch(rows), second, parameters=self.parameters)
                block = gram.double().cpu()
                out[torch.tensor(rows, device="cpu")[:, None], torch.tensor(columns, device="cpu")] = block
                out[torch.tensor(columns, device="cpu")[:, None], torch.tensor(rows, device="cpu")] = block.T
        return out

    def gradient_error(self, sketches: Float[Tensor, "b d"]) -> float:
        """Return the largest relative error of a few rows against autograd, each example run alone."""
        worst = 0.0
        for place in range(min(_VERIFIED, len(self.examples))):
            gradient = torch.cat([part.reshape(-1) for part in self._gradients(self._batch([place]))])
            wanted = self.sketch(gradient).double().cpu()
            error = (sketches[place] - wanted).norm() / wanted.norm().clamp(min=torch.finfo(torch.float32).tiny)
            worst = max(worst, float(error))
        return worst

    def cost(self, repeats: int) -> tuple[tuple[float, float], tuple[int | None, int | None]]:
        """Return (sketches, plain forward + backward) of the largest batch: median seconds and peak bytes."""
        batch = self._batch(self.places[0])
        jobs = {"sketch": lambda: self.sketcher(batch), "plain": lambda: self._gradients(batch)}
        seconds = interleaved_seconds(jobs, repeats)
        memory = {name: peak_bytes(job) for name, job in jobs.items()}
        return (seconds["sketch"]["median"], seconds["plain"]["median"]), (memory["sketch"], memory["plain"])

    def _batch(self, places: Sequence[int]) -> Batch:
        return to_device(self.task.collate([self.examples[place] for place in places]), self.device)

    def _gradients(self, batch: Batch) -> list[Tensor]:
        """Return the gradients of the summed losses by autograd."""
        tensors = list(self.tensors.values())
        with differentiating(self.model, self.tensors):
            parts = torch.autograd.grad(self.task.losses(self.model, batch).sum(), tensors, allow_unused=True)
        return [torch.zeros_like(t) if part is None else part for part, t in zip(parts, tensors, strict=True)]


def _sizes(sketch: Sketch, sketches: Float[Tensor, "b d"]) -> Iterator[Float[Tensor, "b d2"]]:
    """Yield the sketches at every nested size, smallest first."""
    sizes = [sketch.d]
    while sketch.nesting is not None and sizes[-1] % 2 == 0 and sizes[-1] // 2 >= _SMALLEST:
        sizes.append(sizes[-1] // 2)
    for d in reversed(sizes):
        yield sketches if d == sketch.d else sketch.truncate_sketch(sketches, d)


def _table(result: Distortion) -> Iterator[str]:
    """Yield the lines of a table a person understands."""
    sound = "agree" if result.right else "DO NOT AGREE"
    yield (
        f"gradients   {result.verified} examples {sound} with autograd "
        f"(relative error {result.gradient_error:.1e}, allowed {result.tolerance:.0e})"
    )
    if not result.right:
        yield "            if the model is in training mode, its dropout does this: call model.eval()"
    yield f"audits      {result.audits}"
    if result.slow:
        shown = ", ".join(f"{name} ({reason})" for name, reason in list(result.slow.items())[:3])
        yield f"slow        {len(result.slow)} tensors, {result.slow_share:.1%} of n, one example at a time: {shown}"
    yield (
        f"cost        {result.cost_ratio:.2f} × a plain forward + backward "
        f"({result.seconds:.3g} s and {result.reference_seconds:.3g} s for a batch of {result.batch})"
    )
    if result.peak_bytes is not None and result.reference_peak_bytes is not None:
        yield (
            f"memory      {_megabytes(result.peak_bytes)} at the peak, "
            f"{_megabytes(result.reference_peak_bytes)} for forward + backward"
        )
    yield ""
    yield "       d   noise·√d  (95 %)             Pearson r  (95 %)"
    for q in result.qualities:
        yield (
            f"{q.d:>8,}   {q.noise:.3f}  ({q.noise_interval[0]:.3f} – {q.noise_interval[1]:.3f})"
            f"     {q.pearson:.4f}  ({q.pearson_interval[0]:.4f} – {q.pearson_interval[1]:.4f})"
        )
    yield ""
    pairs = result.examples * (result.examples - 1) // 2
    yield f"over {pairs:,} pairs of {result.examples} examples; noise·√d is 1 for a dense Gaussian projection"
    if math.isinf(result.needed) or math.isnan(result.needed):
        yield "all inner products are equal: no size can be recommended"
    else:
        why = f"predicted from noise and spread: {result.needed:,.0f} of {result.parameters:,} parameters"
        if result.recommended == result.sufficient:
            why = "measured: its interval lies above that"
        yield f"recommended  d = {result.recommended:,} for r ≥ {result.wanted:g} ({why})"
    if result.stored:
        yield from ("", *stored_table(result.stored), "")
        yield _cheapest_line(result)


def _cheapest_line(result: Distortion) -> str:
    found = result.cheapest
    if found is None:
        return (
            f"cheapest     none of these is sure to reach r ≥ {result.wanted:g}: try a larger --d, or more --examples"
        )
    low, high = found.pearson_interval
    return (
        f"cheapest     --d {found.d} --store {found.dtype}: {found.bytes:,} bytes a row for r {found.pearson:.4f} "
        f"({low:.4f} – {high:.4f})"
    )


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MB"
