"""Where records go besides the log file: tables and TensorBoard."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nmgraph.errors import MissingPackageError
from nmgraph.training.run_log import Picture, Record, Run, require_directory


class Csv:
    """Appends records to a table of step, seconds, site, quantity, value; the loop's own metrics have no site.

    Args:
        path: the file; its directory has to exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        require_directory(self.path)

    def __call__(self, entry: Run | Record | Picture) -> None:
        """Append the rows of one record; what stands there stays."""
        if not isinstance(entry, Record):
            return
        # A name may hold half a character, which must not end a run.
        with self.path.open("a", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(("step", "seconds", "site", "quantity", "value"))
            for site, quantity, value in _rows(entry):
                writer.writerow((entry.step, entry.seconds, site, quantity, value))


class TensorBoard:
    """Sends records to TensorBoard: the mean over the layers, and each layer for itself.

    Args:
        writer: a directory, or what has an ``add_scalar(tag, value, step)``, such as a SummaryWriter.

    Raises:
        MissingPackageError: for a directory, if tensorboard is not installed.
    """

    def __init__(self, writer: Any) -> None:
        if isinstance(writer, (str, Path)):
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingPackageError(
                    "TensorBoard's writer could not be imported. pip install tensorboard."
                ) from error
            writer = SummaryWriter(str(writer))
        self.writer = writer

    def __call__(self, entry: Run | Record | Picture) -> None:
        """Send one record."""
        if not isinstance(entry, Record):
            return
        for site, quantity, value in _rows(entry):
            tag = f"nmgraph/{quantity}/{site}" if site else quantity
            self.writer.add_scalar(tag, value, entry.step)
        for quantity in dict.fromkeys(q for numbers in entry.layers.values() for q in numbers):
            self.writer.add_scalar(f"nmgraph/{quantity}", entry.mean(quantity), entry.step)


def _rows(record: Record) -> Iterator[tuple[str, str, float]]:
    yield from (("", name, value) for name, value in record.metrics.items() if value is not None)
    for site, numbers in record.layers.items():
        yield from ((site, quantity, value) for quantity, value in numbers.items())
