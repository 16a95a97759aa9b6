"""N:M training in Hugging Face's ``Trainer``: ``Trainer(model, args, ..., callbacks=[SparseTraining()])``.

The Trainer clips gradients before any callback sees them: a method gets the clipped gradient, and what it adds is not
clipped. ``TrainingArguments(max_grad_norm=0)`` turns clipping off.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nmgraph.api import attach
from nmgraph.errors import MissingPackageError, first_line
from nmgraph.training.controller import Controller

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

    Attributes:
        controller: what ``nmgraph.attach`` gave; None before training.

    Raises:
        TrainingError: when training begins, if the model has no sparse layer.
    """

    controller: Controller | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **kwargs: Any
    ) -> None:
        """Attach; by now the checkpoint of a resumed run is loaded."""
        self.controller = attach(model, optimizer, total_steps=state.max_steps)
