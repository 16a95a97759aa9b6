"""Timings of products: taken once, kept in files, never believed blindly."""

import json
import logging

import pytest
import stand_in
import torch

from nmgraph.layers import probe
from nmgraph.layers.probe import Product, Timing, timing_of

CPU = torch.device("cpu")
PRODUCT = Product(32, 64, 16, "bfloat16", bias=True)


@pytest.fixture(autouse=True)
def cache(no_timings):
    probe._say_once.cache_clear()
    return no_timings


@pytest.fixture
def measured(monkeypatch):
    """Count measurements, by numbers that are made up."""
    seen = []
    monkeypatch.setattr(probe, "measure", lambda product, device: seen.append(product) or Timing(1.0, 0.5))
    return seen


def files(cache):
    return sorted(path for path in cache.rglob("*") if path.is_file())


@pytest.mark.parametrize("product", [
    PRODUCT, Product(64, 32, 64, "float16", input_gradient=True, gathers=True), Product(16, 16, 16, "bfloat16"),
], ids=str)  # fmt: skip
def test_a_product_is_timed_dense_and_sparse(product):
    with stand_in.kernels():
        found = probe.measure(product, CPU)
    assert found.usable
    assert found.error < 0.01
    assert min(found.dense, found.sparse, found.prepare) > 0
    assert (found.gather > 0) == product.gathers
    assert found.whole == found.sparse + found.gather + found.prepare


def test_a_kernel_that_gives_something_else_is_not_used(monkeypatch):
    with stand_in.kernels():
        right = probe.multiply_24
        monkeypatch.setattr(probe, "multiply_24", lambda *args: 1.1 * right(*args))
        found = probe.measure(PRODUCT, CPU)
    assert "differs from the dense one by 10" in found.failure
    assert not found.usable
    assert not found.wins


def test_a_kernel_that_gives_nan_is_not_used(monkeypatch):
    with stand_in.kernels():
        right = probe.multiply_24
        monkeypatch.setattr(probe, "multiply_24", lambda *args: torch.nan * right(*args))
        assert not probe.measure(PRODUCT, CPU).usable


def test_a_kernel_that_fails_is_a_reason_for_dense(monkeypatch):
    def fails(weight):
        raise RuntimeError("CUDA error: architecture mismatch when calling `cusparseLtInit`\nmore")

    with stand_in.kernels():
        monkeypatch.setattr(probe, "compress", fails)
        found = probe.measure(PRODUCT, CPU)
    assert found.failure == "CUDA error: architecture mismatch when calling `cusparseLtInit`"
    assert found.dense > 0
    assert not found.usable


def test_the_faster_of_the_default_and_the_searched_algorithm_is_taken(monkeypatch):
    asked = []
    with stand_in.kernels():
        right = probe.multiply_24
        monkeypatch.setattr(probe, "multiply_24", lambda *args: asked.append(args[-1]) or right(*args))
        found = probe.measure(PRODUCT, CPU)
    assert set(asked) == {0, 1}
    assert found.algorithm in (0, 1)


@pytest.mark.parametrize("spoilt", [0, 1])
@pytest.mark.parametrize("how", ["wrong", "fails"])
def test_an_algorithm_that_is_wrong_or_fails_is_passed_over(spoilt, how, monkeypatch):
    def product(*args):
        if args[-1] == spoilt and how == "fails":
            raise RuntimeError("CUDA error: operation not supported")
        return right(*args) * (0.5 if args[-1] == spoilt else 1.0)

    with stand_in.kernels():
        right = probe.multiply_24
        monkeypatch.setattr(probe, "multiply_24", product)
        found = probe.measure(PRODUCT, CPU)
    assert found.algorithm == 1 - spoilt
    assert found.usable


def test_timings_are_taken_once(cache, measured):
    assert timing_of(PRODUCT, CPU) == timing_of(PRODUCT, CPU) == Timing(1.0, 0.5)
    assert measured == [PRODUCT]


def test_timings_are_kept_for_the_next_process(cache, measured):
    timing_of(PRODUCT, CPU)
    (path,) = files(cache)
    assert path.name == "32x64x16-bfloat16-bias.json"
    assert f"torch{torch.__version__}" in path.parent.name
    probe._timing_of.cache_clear()
    assert timing_of(PRODUCT, CPU) == Timing(1.0, 0.5)
    assert len(measured) == 1


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        '{"dense": 1.0, "unknown": 2}',
        '{"dense": "fast"}',
        "\x00\xff",
        json.dumps({**vars(Timing(1.0, 0.5)), "sparse": -1.0}),
        json.dumps({**vars(Timing(1.0, 0.5)), "algorithm": -1}),
        json.dumps({**vars(Timing(1.0, 0.5)), "algorithm": 10**30}),
        json.dumps({**vars(Timing(1.0, 0.5)), "error": 0.9}),
        json.dumps({**vars(Timing(1.0, 0.5)), "failure": 3}),
        "[" * 100_000,
        '{"dense": NaN}',
        '{"dense": 1.0}',
    ],
)
def test_a_damaged_file_is_measured_again(content, cache, measured):
    timing_of(PRODUCT, CPU)
    (path,) = files(cache)
    path.write_bytes(content.encode("latin-1"))
    probe._timing_of.cache_clear()
    assert timing_of(PRODUCT, CPU) == Timing(1.0, 0.5)
    assert json.loads(path.read_text())["dense"] == 1.0


def test_where_nothing_can_be_kept_it_says_so_once_and_goes_on(tmp_path, monkeypatch, measured, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NMGRAPH_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "nmgraph"):
        for outputs in (16, 32):
            assert timing_of(Product(outputs, 16, 16, "bfloat16"), CPU).sparse == 0.5
    assert len(caplog.records) == 1
    assert "NMGRAPH_CACHE" in caplog.text


def test_want_of_memory_is_not_remembered(cache, monkeypatch):
    def full(product, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probe, "measure", full)
    assert "memory" in timing_of(PRODUCT, CPU).failure
    assert not files(cache)
    monkeypatch.setattr(probe, "measure", lambda *_: Timing(1.0, 0.5))
    assert timing_of(PRODUCT, CPU).wins


def test_want_of_memory_leaves_operands_to_several_kernels_for_now(monkeypatch):
    def full(work, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probe, "median_ms", full)
    kept = dict(probe._fusing)
    assert not probe.fusing_pays(torch.randn(48, 80), torch.float16, None, None)
    assert probe._fusing == kept


def test_a_search_for_an_algorithm_that_runs_out_of_memory_is_not_a_failure_of_the_kernel(cache, monkeypatch):
    def full(weight):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probe, "compress", full)
    with stand_in.kernels():
        assert "memory" in timing_of(PRODUCT, CPU).failure
    assert not files(cache)
