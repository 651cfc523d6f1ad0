"""An index of a run of the Hugging Face Trainer. The only module here that imports transformers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from gradsketch.attribution.build import Build
from gradsketch.attribution.checkpointer import Checkpointer
from gradsketch.attribution.index import Index
from gradsketch.errors import GradsketchError, GradsketchWarning, InputError, NonFiniteError
from gradsketch.gradients.tasks import TaskLike

__all__ = ["SketchCallback"]

_MEASURED = 50  # times in a run


class SketchCallback(TrainerCallback):  # type: ignore[misc]
    """Keep a few checkpoints while the Trainer (or TRL's) trains, and index the training data at them when it is done.

    ``path`` is the folder of the index. Which checkpoints are kept, and with which weights, is :class:`Checkpointer`'s
    business; they lie in ``directory`` (default: ``sketched`` in the Trainer's output). ``every`` is in steps; by
    default the loss is measured 50 times in a run. Options are those of :func:`build_index`, which are checked before
    training begins. What goes wrong later, such as a loss that is not finite, costs a warning and not the training.

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
        >>> callback = gs.SketchCallback("runs/sketched", losses, data, keep=2, d=32, progress=False)
        >>> options = dict(max_steps=8, report_to="none", use_cpu=True, disable_tqdm=True)
        >>> arguments = TrainingArguments("runs/trained", **options)
        >>> _ = Trainer(Net(20, 2), arguments, train_dataset=data, callbacks=[callback]).train()
        {...}
        >>> len(callback.index.stores)
        2
    """

    def __init__(
        self,
        path: str | Path,
        task: TaskLike,
        data: Any,
        *,
        keep: int = 4,
        every: int | None = None,
        adam: bool = False,
        directory: str | Path | None = None,
        **options: Any,
    ) -> None:
        self.path, self.task, self.data, self.options = path, task, data, options
        self.keep, self.every, self.adam, self.directory = keep, every, adam, directory
        self._checkpointer: Checkpointer | None = None
        self._index: Index | None = None
        self._rate = 0.0

    @property
    def index(self) -> Index:
        """The index of the run.

        Raises:
            InputError: training has not ended.
        """
        if self._index is None:
            raise InputError("a callback whose training has not ended", "one given to Trainer", "Call train()")
        return self._index

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the loss before the first step, or take up what is there of the steps before this one."""
        if not state.is_world_process_zero:
            return
        self._checkpointer = self._index = None  # of a training before this one
        every = self.every or max(1, int(state.max_steps) // _MEASURED)
        directory = self.directory or Path(args.output_dir) / "sketched"
        checkpointer = Checkpointer(directory, self.task, self.data, keep=self.keep, every=every, adam=self.adam)
        Build(self.path, kwargs["model"], self.task, self.data, **self.options)  # refuses what cannot be built
        try:
            checkpointer.begin(kwargs["model"], int(state.global_step))
        except NonFiniteError as error:  # a loss that is infinite at first need not stay so
            _tell(error)
        self._checkpointer = checkpointer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the learning rate, which the end of a step has changed already."""
        if self._checkpointer is not None:
            self._rate = self._checkpointer.rate(kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep a checkpoint where the loss has changed."""
        if self._checkpointer is not None:
            with _watching():
                self._checkpointer.step(kwargs["model"], kwargs["optimizer"], rate=self._rate)
                if state.global_step >= state.max_steps:  # what comes next may load the best weights instead
                    self._checkpointer.finish(kwargs["model"], kwargs["optimizer"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note which weights the Trainer saved, from which a run may go on."""
        if self._checkpointer is not None:
            with _watching():
                self._checkpointer.saved(kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sketch the data at every checkpoint."""
        if self._checkpointer is not None:
            model = kwargs["model"]
            with _watching():
                if not _is_replaced(args, state):
                    self._checkpointer.finish(model, kwargs["optimizer"])
                self._index = self._checkpointer.index(self.path, model, **self.options)


def _is_replaced(args: Any, state: Any) -> bool:
    """Whether the model has got the best weights of the run in the place of the last."""
    best = state.best_model_checkpoint if args.load_best_model_at_end else None
    return best is not None and not str(best).endswith(f"-{state.global_step}")


@contextmanager
def _watching() -> Iterator[None]:
    """Whoever watches a training may not end it: an error is a warning."""
    try:
        yield
    except GradsketchError as error:
        _tell(error)


def _tell(error: GradsketchError) -> None:
    warnings.warn(f"SketchCallback: {error}", GradsketchWarning, stacklevel=4)
