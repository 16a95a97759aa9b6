"""nmgraph: train any PyTorch model under N:M sparsity, and export it proved.

``nmgraph.export`` and ``nmgraph.report`` are the functions. The packages of the same names are reached with
``from nmgraph.export.proof import ...``: they are imported, by api.py and seeing.py, before the functions are bound here, so that no
later import puts them in their place.
"""

from nmgraph.api import accelerate, attach, convert, export, finalize, load, manifest, save, verify
from nmgraph.errors import NMGraphError
from nmgraph.methods import METHODS
from nmgraph.nm.pattern import Pattern
from nmgraph.seeing import hardware, inspect, record, report, sensitivity

__all__ = [
    "METHODS",
    "NMGraphError",
    "Pattern",
    "accelerate",
    "attach",
    "convert",
    "export",
    "finalize",
    "hardware",
    "inspect",
    "load",
    "manifest",
    "record",
    "report",
    "save",
    "sensitivity",
    "verify",
]
__version__ = "0.1.0"
