"""Spectra during a run of the Hugging Face Trainer. The only module here that imports transformers."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback

from gradsketch.as_found import evaluating
from gradsketch.errors import GradsketchWarning, InputError, NonFiniteError
from gradsketch.gradients.curvature import fisher, gauss_newton, hessian, loss_gradient
from gradsketch.gradients.parameters import selected
from gradsketch.gradients.tasks import TaskLike
from gradsketch.spectra.evolution import PAPER_EVERY, PAPER_STEPS, Evolution, saved_spectra, spectrum_over

__all__ = ["SpectrumCallback"]

_CURVATURES = {"hessian": hessian, "gauss-newton": gauss_newton, "fisher": fisher}


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
        """Take the spectrum of the starting point."""
        self.directory = self._given or Path(args.output_dir) / "spectrum"
        self._take(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the spectrum where it is due."""
        self._take(state, kwargs["model"])

    def _take(self, state: Any, model: Any) -> None:
        step = int(state.global_step)
        due = step in self.at or (self.every > 0 and step % self.every == 0)
        if not due or not state.is_world_process_zero:
            return
        try:
            with evaluating(model):
                spectrum_over({step: lambda: self._load(model)}, self.k, directory=self.directory, **self.options)
        except NonFiniteError as error:
            # Whoever watches a training may not end it: a loss that is infinite at this step need not stay so.
            warnings.warn(f"no spectrum at step {step}: {error}", GradsketchWarning, stacklevel=2)

    def _load(self, model: Any) -> Any:
        parameters = selected(model, self.parameters)
        make = _CURVATURES[self.curvature]
        operator = make(model, self.task, self.data, parameters, batch_size=self.batch_size)
        gradient = loss_gradient(model, self.task, self.data, parameters, batch_size=self.batch_size)
        return operator, gradient
