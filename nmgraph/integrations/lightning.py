"""N:M training in Lightning's ``Trainer``: ``Trainer(max_epochs=90, callbacks=[SparseTraining()])``."""

from __future__ import annotations

import math
from typing import Any

from nmgraph.api import attach
from nmgraph.errors import MissingPackageError, TrainingError, first_line
from nmgraph.training.controller import Controller

try:
    from lightning.pytorch import Callback
except ImportError as error:
    try:
        from pytorch_lightning import Callback  # the same under its older name
    except ImportError:
        raise MissingPackageError(
            f"nmgraph.integrations.lightning needs lightning: {first_line(error)}. Install it: pip install lightning."
        ) from error


class SparseTraining(Callback):  # type: ignore[misc, unused-ignore]
    """Attach a converted module to its optimizer, for as many optimizer steps as the Trainer is told to take.

    Lightning's checkpoints hold everything, so that ``fit(..., ckpt_path=...)`` goes on as if never stopped. Convert in
    the module's ``__init__``, so that it is converted when a checkpoint is loaded. The method sees gradients before
    they are clipped.

    Attributes:
        controller: what ``nmgraph.attach`` gave; None before training.

    Raises:
        TrainingError: when training begins, if the module has no sparse layer, more than one optimizer or manual optimization,
            or if the Trainer has no end, or averages buffers.
    """

    controller: Controller | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach; by now the checkpoint of a resumed run is loaded."""
        held = len(trainer.optimizers)
        if held != 1 or not pl_module.automatic_optimization:
            raise TrainingError(
                f"{type(pl_module).__name__} {'takes its steps by hand' if held == 1 else f'has {held} optimizers'}, so "
                "SparseTraining can't tell which steps count. Leave it out, and attach in the module's on_train_start: "
                "nmgraph.attach(self, optimizer, total_steps=...)."
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

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Run the method on the unscaled gradient, before Lightning clips it."""
        update = getattr(self.controller, "update", None)
        if update is not None:
            update()
