"""Converted models in several threads, and in a DataLoader's workers."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from variants import VARIANTS

import nmgraph
from nmgraph.compilation import SWITCH

ROOT = Path(__file__).parents[2]
STEPS = 8


def network(variant, seed):
    generator = torch.Generator().manual_seed(seed)
    method, options = VARIANTS[variant]
    net = nn.Sequential(
        nn.Conv2d(8, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 1), nn.Flatten(), nn.Linear(2048, 8)
    )
    with torch.no_grad():
        for p in net.parameters():  # not from the generator that all threads share
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return nmgraph.convert(net, method=method, **options)


def trained(variant, seed):
    model = network(variant, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    nmgraph.attach(model, optimizer, total_steps=STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        optimizer.zero_grad()
        x, y = torch.randn(4, 8, 4, 4, generator=generator), torch.randint(8, (4,), generator=generator)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def in_threads(jobs):
    ready = threading.Barrier(len(jobs))

    def run(job):
        ready.wait()
        return trained(*job)

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


@pytest.mark.parametrize("variant", ["bame, bidirectional", "bimask", "lbc", "maxq", "srste", "tmask"])
def test_models_converted_and_trained_in_two_threads_equal_each_alone(variant):
    jobs = [(variant, 1), (variant, 2)]
    assert all(map(same, in_threads(jobs), [trained(*job) for job in jobs]))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["srste", "bimask"])
def test_masks_compiled_while_another_thread_trains_are_the_same(variant, monkeypatch):
    monkeypatch.setenv(SWITCH, "never")
    wanted = [trained(variant, seed) for seed in (1, 2)]
    monkeypatch.setenv(SWITCH, "always")
    assert all(map(same, in_threads([(variant, 1), (variant, 2)]), wanted))


def halting():
    """Give a model that stops in its forward, also while it is traced, and the events when it has and when it may go on."""
    began, may_go_on = threading.Event(), threading.Event()

    class Halting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 8)

        def forward(self, x):
            began.set()
            assert may_go_on.wait(20)
            return self.layer(x)

    return Halting(), began, may_go_on


def test_a_model_runs_on_while_another_thread_converts_one():
    running, (halted, began, may_go_on) = network("srste", 1), halting()
    x = torch.randn(4, 8, 4, 4)
    wanted = running(x)
    with ThreadPoolExecutor(1) as pool:
        conversion = pool.submit(nmgraph.convert, halted, method="lbc")
        assert began.wait(20)
        try:
            found = running(x)
        finally:
            may_go_on.set()
        assert str(nmgraph.manifest(conversion.result())).startswith("1 sites converted")
    assert torch.equal(found, wanted)


def test_two_conversions_at_once_leave_torch_as_it_was():
    call = nn.Module.__call__
    (first, first_began, first_may), (second, second_began, second_may) = halting(), halting()
    with ThreadPoolExecutor(2) as pool:
        conversions = [pool.submit(nmgraph.convert, first)]
        assert first_began.wait(20)
        conversions.append(pool.submit(nmgraph.convert, second))
        second_began.wait(0.5)  # only where the two do not take turns
        first_may.set()
        conversions[0].result()
        second_may.set()
        conversions[1].result()
    found, nn.Module.__call__ = nn.Module.__call__, call  # whatever was left must not fail the tests after this one
    assert found is call


WORKERS = """
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import nmgraph


class Taught(Dataset):
    def __init__(self, teachers):
        self.teachers = teachers

    def __len__(self):
        return 8

    @torch.no_grad()
    def __getitem__(self, index):
        x = torch.randn(64, 4, 4, generator=torch.Generator().manual_seed(index))
        return x, sum(teacher(x[None])[0] for teacher in self.teachers)


class Collate:
    def __init__(self, teacher):
        self.teacher = teacher

    @torch.no_grad()
    def __call__(self, items):
        x, y = (torch.stack(part) for part in zip(*items))
        return x, y + self.teacher(x)


def network(method):
    net = nn.Sequential(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 8))
    return nmgraph.convert(net, method=method)


def train(student, optimizer, x, y):
    optimizer.zero_grad()
    (student(x) - y).square().mean().backward()
    optimizer.step()


if __name__ == "__main__":
    torch.manual_seed(0)
    data, collate = Taught([network("srste"), network("bimask").eval()]), Collate(network("lbc"))
    alone = [collate([data[index] for index in batch]) for batch in (range(4), range(4, 8))]
    student = network("srste")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    nmgraph.attach(student, optimizer, total_steps=4)
    for x, y in alone:  # before there are workers
        train(student, optimizer, x, y)
    loader = DataLoader(data, 4, num_workers=1, multiprocessing_context=sys.argv[1], collate_fn=collate, timeout=60)
    for (x, y), (wanted_x, wanted_y) in zip(loader, alone, strict=True):
        assert torch.equal(x, wanted_x)
        torch.testing.assert_close(y, wanted_y, rtol=1e-4, atol=1e-5)
        train(student, optimizer, x, y)
    assert student[0].nm_clock.tolist() == [4, 4]
    print("read all")
"""


@pytest.mark.parametrize(
    ("start", "compiled"),
    [
        ("fork", "auto"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("spawn", "auto"), ("fork", "always"))),
    ],
)
def test_workers_of_a_data_loader_ask_converted_teachers(start, compiled, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, script, start],
        env={**os.environ, "PYTHONPATH": str(ROOT), SWITCH: compiled, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("read all\n", "", 0)
