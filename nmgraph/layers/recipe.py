"""What a layer was told to be, as bytes that travel in its ``state_dict``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nmgraph.methods import METHODS, make_method
from nmgraph.methods.contract import Method
from nmgraph.nm.grouping import FLAT, Axis
from nmgraph.nm.pattern import Pattern


@dataclass(frozen=True)
class Recipe:
    """Method, pattern and reduction axis of one site."""

    method: Method[Any]
    pattern: Pattern
    reduction_axis: Axis = 1

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, which :meth:`from_dict` reads back."""
        return {
            "method": self.method.name,
            "options": self.method.options(),
            "pattern": str(self.pattern),
            "reduction_axis": self.reduction_axis,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Read what :meth:`to_dict` wrote."""
        return cls(
            make_method(values["method"], values["options"]),
            Pattern.parse(values["pattern"]),
            values["reduction_axis"],
        )

    def to_tensor(self) -> Tensor:
        """Encode as uint8 JSON, for a buffer."""
        return torch.tensor(list(json.dumps(self.to_dict(), sort_keys=True).encode()), dtype=torch.uint8)

    @classmethod
    def describe_tensor(cls, encoded: Tensor) -> str:
        """Name the recipe of a checkpoint in one line, with the options that are not the defaults."""
        try:
            values = json.loads(bytes(encoded.tolist()))
            method = METHODS.get(values["method"])
            usual = {f.name: f.default for f in dataclasses.fields(method)} if method else {}
            options = (f"{key}={value}" for key, value in values["options"].items() if usual.get(key) != value)
            told = ", ".join([*options, *(["blocks run flat"] if values["reduction_axis"] == FLAT else [])])
            return f"{values['method']} {values['pattern']}{f' ({told})' if told else ''}"
        except (ValueError, KeyError, TypeError, AttributeError):
            return "something unreadable"

    def __str__(self) -> str:
        return self.describe_tensor(self.to_tensor())
