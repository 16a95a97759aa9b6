"""N:M training in Lightning's ``Trainer``: ``Trainer(max_epochs=90, callbacks=[SparseTraining()])``."""

from __future__ import annotations

import math
from typing import Any

from nmgraph.api import attach
from nmgraph.errors import MissingPackageError, TrainingError, first_line
from nmgraph.layers.masked import class_name
from nmgraph.seeing import record
from nmgraph.training.controller import Controller
from nmgraph.training.telemetry import Telemetry

try:
    from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
except ImportError as error:
    try:
        from pytorch_lightning.callbacks import Callback, GradientAccumulationScheduler  # its older name
    except ImportError:
        raise MissingPackageError(
            f"nmgraph.integrations.lightning needs lightning: {first_line(error)}. Install it: pip install lightning."
        ) from error


class SparseTraining(Callback):  # type: ignore[misc, unused-ignore]
    """Attach a converted module to its optimizer, for as many optimizer steps as the Trainer is told to take.

    Lightning's checkpoints hold everything, so that ``fit(..., ckpt_path=...)`` goes on as if never stopped. Convert in
    the module's ``__init__``, so that it is converted when a checkpoint is loaded. The method sees gradients before
    they are clipped.

    Args:
        *sinks: where records of the masks and the loss go, as for ``nmgraph.record``; by default none are made.
        every: optimizer steps between two records.

    Attributes:
        controller: what ``nmgraph.attach`` gave; None before training.
        telemetry: what ``nmgraph.record`` gave; None without sinks.

    Raises:
        TrainingError: when training begins, if the module has no sparse layer, if the steps of its run can't be counted
            beforehand, or if a callback averages buffers.
    """

    def __init__(self, *sinks: Any, every: int | None = None) -> None:
        super().__init__()
        self._sinks, self._every = sinks, every
        self.controller: Controller | None = None
        self.telemetry: Telemetry | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach; by now the checkpoint of a resumed run is loaded."""
        unknown = _uncounted(trainer, pl_module)
        if unknown:
            raise TrainingError(
                f"{unknown}, so SparseTraining can't tell which steps count. Leave it out, and attach in the module's "
                "on_train_start: nmgraph.attach(self, optimizer, total_steps=...)."
            )
        total_steps = trainer.estimated_stepping_batches
        if not math.isfinite(total_steps) or total_steps < 1:
            raise TrainingError(
                f"the Trainer can't tell how many optimizer steps it will take ({total_steps}), and schedules are fractions "
                "of a whole run. Give it an end: Trainer(max_steps=...), or max_epochs=... if the data has a length."
            )
        blending = [callback for callback in trainer.callbacks if getattr(callback, "_use_buffers", False)]
        if blending:
            raise TrainingError(
                f"{type(blending[0]).__name__} averages buffers, masks and counters included, and writes them over the module "
                "in the end. Give it use_buffers=False: it copies them then."
            )
        self.controller = attach(pl_module, trainer.optimizers[0], total_steps=int(total_steps))
        if self._sinks:
            self.telemetry = record(self.controller, *self._sinks, every=self._every)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Note the loss that is propagated."""
        if self.telemetry is not None:
            self.telemetry.note(loss=loss)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Run the method on the unscaled gradient, before Lightning clips it."""
        if self.controller is not None:
            self.controller.update()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End the records."""
        if self.telemetry is not None:
            self.telemetry.close()


def _uncounted(trainer: Any, module: Any) -> str | None:
    """Say why Lightning's count is not that of the steps which train the sparse layers; None if it is."""
    name, held = class_name(module), len(trainer.optimizers)
    if held != 1:
        return f"{name} has {held} optimizers"
    if not module.automatic_optimization:
        return f"{name} takes its steps by hand"
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
        return "GradientAccumulationScheduler changes how many batches make a step"
    return None
