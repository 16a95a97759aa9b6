"""Files that nmgraph 0.1.0 wrote (data/write.py) are read by every later one as what they were."""

from pathlib import Path

import pytest
import torch

import nmgraph
from nmgraph.errors import FileError
from nmgraph.layers.masked import masked_weights

FILES = {method: Path(__file__).parent / "data" / f"version-1-{method}.nm.pt" for method in ("lbc", "bimask")}
ANSWERS = {"lbc": [0.01387, 0.00595, -0.08871, -0.11085], "bimask": [0.10688, -0.02893, -0.07934, -0.11623]}
KEPT = {"lbc": {"0": 216, "4": 16}, "bimask": {"0": 144, "4": 8}}


def inputs():
    return torch.arange(4 * 6 * 6.0).reshape(1, 4, 6, 6) / 72 - 1


@pytest.mark.parametrize("method", FILES)
def test_model_answers_as_it_did(method):
    model = nmgraph.load(FILES[method]).eval()
    assert model(inputs())[0].tolist() == pytest.approx(ANSWERS[method], abs=2e-5)
    weights = masked_weights(model)
    assert {site: int(weight.mask().sum()) for site, weight in weights.items()} == KEPT[method]
    assert {site: str(weight.told) for site, weight in weights.items()} == {"0": f"{method} 2:4", "4": f"{method} 1:4"}
    assert {tuple(weight.clock.tolist()) for weight in weights.values()} == {(3, 8)}
    assert str(nmgraph.manifest(model)) == "2 sites converted, 0 skipped, 100.0% of their weights"


def test_state_of_lbc_is_in_the_middle_of_its_run():
    weight = masked_weights(nmgraph.load(FILES["lbc"]))["0"]
    sums = {name: float(value.double().sum()) for name, value in weight.state._asdict().items()}
    assert sums == pytest.approx({"alive": 1314, "accumulator": 0.0420, "velocity": -0.0392, "mask": 216}, abs=1e-4)
    assert weight.unfinished() == "72 of 72 blocks still keep more than 2 of 4"


def test_rows_of_bimask_stay_permuted():
    weight = masked_weights(nmgraph.load(FILES["bimask"]))["0"]
    assert weight.state.permutation.tolist() == [4, 1, 5, 3, 0, 2, 6, 7]
    assert int(weight.state.seed) == 165514754


@pytest.mark.parametrize("method", FILES)
def test_run_goes_on_to_its_end(method):
    model = nmgraph.load(FILES[method])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    nmgraph.attach(model, optimizer, total_steps=8)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 4, 6, 6)).square().mean().backward()
        optimizer.step()
    assert nmgraph.verify(nmgraph.finalize(model)).holds


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_file_of_another_version_is_refused_by_name(version, tmp_path):
    path = tmp_path / "later.nm.pt"
    torch.save(torch.load(FILES["lbc"], weights_only=True) | {"version": version}, path)
    for read in (nmgraph.load, nmgraph.verify):
        with pytest.raises(FileError) as caught:
            read(path)
        assert str(caught.value) == (
            f"{path} has format version {version!r}; this nmgraph reads version 1. Install the one that wrote it."
        )
