"""Spectra during a run of the Hugging Face Trainer. The only module here that imports transformers."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from contextlib import suppress
from inspect import signature
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback

from gradsketch.as_found import evaluating
from gradsketch.errors import GradsketchWarning, InputError, NonFiniteError
from gradsketch.gradients.curvature import fisher, gauss_newton, hessian, loss_gradient
from gradsketch.gradients.parameters import selected
from gradsketch.gradients.tasks import TaskLike
from gradsketch.linear_map import LinearMap
from gradsketch.spectra.evolution import PAPER_EVERY, PAPER_STEPS, Evolution, plan_for, saved_spectra, spectrum_over
from gradsketch.spectra.solve import spectrum

__all__ = ["SpectrumCallback"]

_CURVATURES = {"hessian": hessian, "gauss-newton": gauss_newton, "fisher": fisher}
# Of ``spectrum``; the others are the callback's own.
_OPTIONS = signature(spectrum).parameters.keys() - {"operator", "k", "gradient", "resume"}


class SpectrumCallback(TrainerCallback):  # type: ignore[misc]
    """Take the spectrum of the loss on fixed data at chosen steps, and leave the model as it was.

    By default at the steps of [P]: 0, 10, 50, 100, 150, 200, 250, 500 and every 1000. Each spectrum goes to
    ``directory`` (default: ``spectrum`` in the Trainer's output) as it is done. A resumed training run keeps those
    already there, if they are of the same weights, data and options; otherwise it raises FingerprintError. The model is
    in evaluation mode while a spectrum is taken. A loss or a product that is not finite costs a warning and that step's
    spectrum, not the training. Options are those of ``spectrum``.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> class Net(torch.nn.Linear):
        ...     def forward(self, x, labels):
        ...         logits = super().forward(x)
        ...         return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}
        >>> def losses(model, batch):
        ...     logits = torch.nn.Linear.forward(model, batch["x"])
        ...     return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        >>> data = [{"x": torch.randn(20), "labels": i % 2} for i in range(32)]
        >>> callback = gs.SpectrumCallback(losses, data, k=2, at=(0, 2), every=0, progress=False)
        >>> arguments = TrainingArguments("runs/toy", max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True)
        >>> _ = Trainer(Net(20, 2), arguments, train_dataset=data, callbacks=[callback]).train()
        {...}
        >>> callback.evolution.steps
        (0, 2)
    """

    def __init__(
        self,
        task: TaskLike,
        data: Any,
        *,
        parameters: str | Iterable[str] | None = None,
        curvature: Literal["hessian", "gauss-newton", "fisher"] = "hessian",
        at: Collection[int] = PAPER_STEPS,
        every: int = PAPER_EVERY,
        k: int = 10,
        batch_size: int = 8,
        directory: str | Path | None = None,
        **options: Any,
    ) -> None:
        if curvature not in _CURVATURES:
            raise InputError(f"curvature={curvature!r}", f"one of {', '.join(_CURVATURES)}", "Leave it out")
        at = _steps(at, every)
        unknown = sorted(options.keys() - _OPTIONS)
        if unknown:
            raise InputError(
                f"the option {unknown[0]!r}", f"of spectrum's {', '.join(sorted(_OPTIONS))}", "Leave it out"
            )
        self.task, self.data, self.parameters, self.curvature = task, data, parameters, curvature
        self.at, self.every, self.k, self.batch_size = frozenset(at), every, k, batch_size
        self._given = None if directory is None else Path(directory)
        self.directory = self._given
        self.options = options

    @property
    def evolution(self) -> Evolution:
        """The spectra taken so far.

        Raises:
            InputError: none has been taken.
        """
        if self.directory is None:
            raise InputError("a callback that has not run", "one given to Trainer(callbacks=[...])", "Call train()")
        return saved_spectra(self.directory)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the spectrum of the starting point; or else find out now what would end the training later.

        Raises:
            InputError: no spectrum can be taken of this model, loss, data or selection.
        """
        self.directory = self._given or Path(args.output_dir) / "spectrum"
        if self._is_due(state):
            self._take(state, kwargs["model"])
        elif state.is_world_process_zero:
            self._rehearse(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the spectrum where it is due."""
        if self._is_due(state):
            self._take(state, kwargs["model"])

    def _is_due(self, state: Any) -> bool:
        step = int(state.global_step)
        due = step in self.at or (self.every > 0 and step % self.every == 0)
        return due and bool(state.is_world_process_zero)

    def _rehearse(self, model: Any) -> None:
        """Evaluate the losses and plan, as before every spectrum, but form no product."""
        with suppress(NonFiniteError), evaluating(model):
            plan_for(self._operator(model), self.k, self.options)

    def _take(self, state: Any, model: Any) -> None:
        step = int(state.global_step)
        try:
            with evaluating(model):
                spectrum_over({step: lambda: self._load(model)}, self.k, directory=self.directory, **self.options)
        except NonFiniteError as error:
            # Whoever watches a training may not end it: a loss that is infinite at this step need not stay so.
            warnings.warn(f"no spectrum at step {step}: {error}", GradsketchWarning, stacklevel=2)

    def _load(self, model: Any) -> Any:
        parameters = selected(model, self.parameters)
        gradient = loss_gradient(model, self.task, self.data, parameters, batch_size=self.batch_size)
        return self._operator(model), gradient

    def _operator(self, model: Any) -> LinearMap:
        make = _CURVATURES[self.curvature]
        return make(model, self.task, self.data, selected(model, self.parameters), batch_size=self.batch_size)


def _steps(at: Collection[int], every: int) -> tuple[int, ...]:
    """Return the steps of ``at``, once both are steps."""
    found = tuple(at) if isinstance(at, Iterable) else (at,)
    sound = isinstance(at, Iterable) and all(isinstance(step, Integral) and step >= 0 for step in found)
    if not sound:
        raise InputError(f"at={at!r}", "steps, whole numbers from 0", "Type at=(0, 100, 500)")
    if not isinstance(every, Integral) or every < 0:
        raise InputError(f"every={every!r}", "a number of steps, or 0 for none but those of at", "Type every=1000")
    return found
