"""Run a function on several real processes, joined by gloo; for tests and benchmarks."""

import tempfile
from pathlib import Path

import torch
from torch import distributed, multiprocessing


def on_ranks(world, function, *args):
    """Call ``function(rank, world, *args)`` on each rank; an exception in one fails the test with its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        joined = (world, f"file://{Path(folder) / 'store'}", function, args)
        multiprocessing.start_processes(_joined, joined, nprocs=world, start_method="fork")


def _joined(rank, world, store, function, args):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        function(rank, world, *args)
    finally:
        distributed.destroy_process_group()
