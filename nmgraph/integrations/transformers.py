"""N:M training in Hugging Face's ``Trainer``: ``Trainer(model, args, ..., callbacks=[SparseTraining()])``.

The Trainer clips gradients before any callback sees them: a method gets the clipped gradient, and what it adds is not
clipped. ``TrainingArguments(max_grad_norm=0)`` turns clipping off.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nmgraph.api import attach
from nmgraph.errors import MissingPackageError, first_line
from nmgraph.seeing import record
from nmgraph.training.controller import Controller
from nmgraph.training.telemetry import Telemetry

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingPackageError(
        f"nmgraph.integrations.transformers needs transformers and accelerate: {first_line(error)}. "
        "Install them: pip install transformers accelerate."
    ) from error


class SparseTraining(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Attach a converted model to the Trainer's optimizer, for the Trainer's number of optimizer steps.

    Its checkpoints hold everything, so that ``train(resume_from_checkpoint=True)`` goes on as if never stopped. Convert
    the model before the Trainer is made, in a resumed run as well.

    Args:
        *sinks: where records of the masks and of what the Trainer logs go, as for ``nmgraph.record``; by default none are made.
        every: optimizer steps between two records.

    Attributes:
        controller: what ``nmgraph.attach`` gave; None before training.
        telemetry: what ``nmgraph.record`` gave; None without sinks.

    Raises:
        TrainingError: when training begins, if the model has no sparse layer.
    """

    def __init__(self, *sinks: Any, every: int | None = None) -> None:
        self._sinks, self._every = sinks, every
        self.controller: Controller | None = None
        self.telemetry: Telemetry | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **kwargs: Any
    ) -> None:
        """Attach; by now the checkpoint of a resumed run is loaded."""
        self.controller = attach(model, optimizer, total_steps=state.max_steps)
        if self._sinks:
            self.telemetry = record(self.controller, *self._sinks, every=self._every)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Note the loss that the Trainer logs, a mean already."""
        if self.telemetry is not None and logs and "loss" in logs:
            self.telemetry.note(loss=logs["loss"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the records."""
        if self.telemetry is not None:
            self.telemetry.close()
