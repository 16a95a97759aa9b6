"""Run a function on several real processes, joined by gloo; for tests and benchmarks."""

import os
import socket

import torch
from torch import distributed, multiprocessing


def on_ranks(world, function, *args):
    """Call ``function(rank, world, *args)`` on each rank; an exception in one fails the test with its traceback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(_joined, (world, port, function, args), nprocs=world, start_method="fork")


def _joined(rank, world, port, function, args):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=world)
    try:
        function(rank, world, *args)
    finally:
        distributed.destroy_process_group()
