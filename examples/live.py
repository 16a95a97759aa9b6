"""What a run's masks do, as a table that stays on the screen: a sink for nmgraph.record.

watch = LiveTable()
telemetry = nmgraph.record(controller, watch)
with rich.live.Live(watch): ...  # the training loop
"""

from __future__ import annotations

from rich.table import Table

from nmgraph.training.run_log import Picture, Record, Run

ROWS = 12  # of the layers in which most weights change sides


class LiveTable:
    """Takes what nmgraph.record gives, and shows the newest of it."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.record: Record | None = None

    def __call__(self, entry: Run | Record | Picture) -> None:
        if isinstance(entry, Run):
            self.run = entry
        elif isinstance(entry, Record):
            self.record = entry

    def __rich__(self) -> Table | str:
        if self.run is None or self.record is None:
            return ""
        noted = (f"{name} {value:.4g}" for name, value in self.record.metrics.items() if value is not None)
        title = ", ".join((f"step {self.record.step:,} of {self.run.total_steps:,}", *noted))
        table = Table("layer", "pattern", title=title, title_justify="left", header_style="bold")
        for column in ("kept", "flipped", "magnitude"):
            table.add_column(column, justify="right")
        busiest = sorted(self.record.layers.items(), key=lambda layer: layer[1].get("flipped", 0.0), reverse=True)
        for name, numbers in busiest[:ROWS]:
            shares = (f"{numbers[key]:.2%}" if key in numbers else "-" for key in ("kept", "flipped", "magnitude"))
            table.add_row(name or "(root)", self.run.layers[name]["pattern"], *shares)
        if len(busiest) > ROWS:
            table.caption = f"and {len(busiest) - ROWS} layers in which less changed"
        return table
