"""nmgraph: train any PyTorch model under N:M sparsity, and export it proved.

``nmgraph.export`` is the function. The package of the same name is reached with ``from nmgraph.export.proof import ...``:
the package is imported, by api.py, before the function is bound here, so that no later import puts it in its place.
"""

from nmgraph.api import (
    accelerate,
    attach,
    convert,
    export,
    finalize,
    inspect,
    load,
    manifest,
    record,
    save,
    sensitivity,
    verify,
)
from nmgraph.errors import NMGraphError
from nmgraph.methods import METHODS
from nmgraph.nm.pattern import Pattern

__all__ = [
    "METHODS",
    "NMGraphError",
    "Pattern",
    "accelerate",
    "attach",
    "convert",
    "export",
    "finalize",
    "inspect",
    "load",
    "manifest",
    "record",
    "save",
    "sensitivity",
    "verify",
]
__version__ = "0.1.0"
