"""Real models and trainers on sparse tensor cores, by the stand-in for the kernels, against masked weights."""

import lightning.pytorch as pl
import models
import pytest
import stand_in
import torch
import transformers
from ranks import on_ranks
from timm.models.efficientnet import efficientnet_b0
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import nmgraph
import nmgraph.integrations.lightning
import nmgraph.integrations.transformers
from nmgraph.integrations.averages import take_masks
from nmgraph.layers import probe

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WHISPER = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 16, "max_source_positions": 8,
    "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def kernels(no_timings, monkeypatch):
    monkeypatch.setattr(probe, "measure", lambda product, device: probe.Timing(1.0, 0.5))
    with stand_in.kernels() as calls:
        yield calls


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **DRY))


def gpt2():
    small = {"n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**SIZES, **small}))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    )


def whisper():
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER, dropout=0.0))


def efficientnet():
    """In channels_last, where activations in place follow 1x1 convolutions; its batch norms are frozen."""
    model = efficientnet_b0(num_classes=16, drop_rate=0.0).to(memory_format=torch.channels_last)
    nn.init.normal_(model.classifier.weight, std=0.1)
    return model


def inputs_of(model):
    """What a model is called with, drawn anew."""
    drawn = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 64, (2, 8), generator=drawn)
    if isinstance(model, transformers.WhisperForConditionalGeneration):
        return {"input_features": torch.randn(2, 16, 16, generator=drawn), "labels": tokens}
    if isinstance(model, transformers.PreTrainedModel):
        return {"input_ids": tokens, "labels": tokens}
    x = torch.randn(2, 3, 32, 32, generator=drawn)
    return {"x": x.to(memory_format=torch.channels_last) if "EfficientNet" in str(type(model)) else x}


def loss_of(model, inputs):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(*inputs.values()) if "x" in inputs else model(**inputs)
    return found.float().square().mean() if isinstance(found, torch.Tensor) else found.loss


def converted(make, hardware, method="tmask", **options):
    torch.manual_seed(0)
    model = make().train()
    for module in model.modules():
        module.training &= not isinstance(module, nn.BatchNorm2d)
    model = nmgraph.convert(model, method=method, hardware=hardware, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    nmgraph.attach(model, optimizer, total_steps=10)
    return model, optimizer


def train(model, optimizer, steps=3, micro=1, called=None):
    """Give the losses, and the gradients of the first step."""
    losses, gradients = [], None
    for step in range(steps):
        for part in range(micro):
            torch.manual_seed(10 * step + part)
            loss = loss_of(model if called is None else called, inputs_of(model))
            loss.backward()
            losses.append(loss.detach())
        gradients = gradients or [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def assert_close(ours, theirs):
    """Compare tensors as wholes: of numbers that cancel out, rounding to bfloat16 leaves nothing."""
    largest = max(float(t.norm()) for t in theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert float((one.float() - other).norm()) <= 0.02 * float(other.norm()) + 1e-3 * largest


def multiplied(calls):
    return sum(call[0] == "multiply" for call in calls)


@pytest.mark.parametrize(("make", "counts"), [
    (bert, (13, 0, 13)), (gpt2, (8, 0, 8)), (llama, (15, 0, 15)), (mixtral, (9, 0, 15)), (whisper, (16, 0, 18)),
    (efficientnet, (33, 0, 61)), (models.deit, (8, 0, 9)),
    (models.swin, (9, 8, 18)),  # its attention reads the weights of eight layers itself
])  # fmt: skip
@pytest.mark.parametrize("method", ["tmask", *(pytest.param(m, marks=pytest.mark.slow) for m in ("bimask", "srste"))])
def test_a_model_trains_as_with_masked_weights_and_the_report_counts_what_multiplies(make, counts, method, kernels):
    model, optimizer = converted(make, "force", method)
    ours = train(model, optimizer)
    called = multiplied(kernels)
    report = nmgraph.hardware(model)
    assert tuple(len({layer.name for layer in of}) for of in (report.sparse, report.expected, report.layers)) == counts
    assert called == 3 * counts[0] * (1 if method == "srste" else 2)
    theirs = train(*converted(make, "off", method))
    assert multiplied(kernels) == called
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)
    assert nmgraph.verify(nmgraph.finalize(model)).holds


@pytest.mark.parametrize("rows", [8, 9])
def test_an_activation_may_change_what_a_layer_gives_in_place(rows, kernels):
    def made():
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(inplace=True), nn.Linear(64, 32), nn.SiLU(inplace=True))

    found = []
    for mode in ("force", "off"):
        model, _ = converted(made, mode)
        loss_of(model, {"x": torch.randn(rows, 32, generator=torch.Generator().manual_seed(0))}).backward()
        found.append([p.grad for p in model.parameters()])
    assert_close(*found)
    assert kernels


def test_a_default_device_keeps_nothing_from_sparse_tensor_cores(kernels):
    model, _ = converted(models.mlp, "force")
    with torch.device("cpu"):
        loss_of(model, {"x": torch.randn(8, 16)})
    assert multiplied(kernels) == 1  # the other layer has 8 outputs


def test_a_layer_that_is_not_called_in_half_precision_is_not_counted():
    model, _ = converted(lambda: nn.Sequential(nn.Linear(32, 32)), "force")
    model(torch.randn(8, 32))
    report = nmgraph.hardware(model)
    assert (report.sparse, len(report.expected)) == ((), 1)
    assert str(report) == ("0 of 1 sparse layers train on sparse tensor cores, and 1 more if compiled code calls them")
    assert report.layers[0].reason == (
        "no call in half precision was seen; compiled code, and attention that reads its weight, are not seen"
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_compress_once_a_step_whatever_the_micro_batches(reentrant, kernels):
    packed, found = [], []
    for mode, micro in (("force", 1), ("force", 3), ("off", 3)):
        model, optimizer = converted(bert, mode)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        kernels.clear()
        found.append(train(model, optimizer, 2, micro))
        packed.append(sum(call[0] == "compress" for call in kernels))
    assert packed[0] == packed[1] > packed[2] == 0
    for ours, theirs in zip(*found[1:], strict=True):
        assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, mixtral, gpt2, models.swin])
def test_compiled_graphs_break_no_more_than_with_masked_weights(make, kernels):
    broken, found = [], []
    for mode in ("force", "off"):
        torch._dynamo.reset()
        model, optimizer = converted(make, mode, "bimask")
        broken.append(torch._dynamo.explain(loss_of)(model, inputs_of(model)).graph_break_count)
        compiled = torch.compile(model, backend="aot_eager")
        found.append(train(model, optimizer, 2, called=compiled))
    assert broken[0] == broken[1]
    assert multiplied(kernels)
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs)


class Lit(pl.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch):
        return self.net(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        tokens = torch.randint(3, 64, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": tokens}


def by_lightning(model, path):
    usual = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callback = nmgraph.integrations.lightning.SparseTraining()
    trainer = pl.Trainer(accelerator="cpu", precision="bf16-mixed", max_epochs=1, callbacks=[callback], **usual)
    trainer.fit(Lit(model), DataLoader(Tokens(), batch_size=4))


def by_transformers(model, path):
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "bf16": True, "use_cpu": True, "report_to": "none"}
    told = transformers.TrainingArguments(
        str(path),
        save_strategy="no",
        disable_tqdm=True,
        optim="sgd",
        learning_rate=0.05,
        gradient_checkpointing=True,
        **options,
    )
    callback = nmgraph.integrations.transformers.SparseTraining()
    transformers.Trainer(model, told, train_dataset=Tokens(), callbacks=[callback]).train()


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.parametrize("fit", [by_lightning, by_transformers])
def test_trainers_in_bfloat16_end_with_the_weights_that_masked_ones_give(fit, tmp_path, kernels):
    found = []
    for mode in ("force", "off"):
        torch.manual_seed(0)
        model = nmgraph.convert(gpt2(), method="tmask", hardware=mode)
        kernels.clear()
        fit(model, tmp_path)
        assert (multiplied(kernels) >= 4 * 8 * 2) == (mode == "force")
        found.append([p.detach() for p in model.parameters()])
        assert nmgraph.verify(nmgraph.finalize(model)).holds
    assert_close(*found)


@pytest.mark.parametrize("kept", ["file", "state_dict"])
def test_a_run_goes_on_from_the_middle_bit_for_bit_and_its_average_is_sparse(kept, tmp_path, kernels):
    whole, optimizer = converted(bert, "force", "bimask", interval=1)
    average = AveragedModel(whole, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=False)
    train(whole, optimizer, 2)
    if kept == "file":
        nmgraph.save(whole, tmp_path / "model.nm.pt")
        again = nmgraph.load(tmp_path / "model.nm.pt", hardware="force").train()
    else:
        again, _ = converted(bert, "force", "bimask", interval=1)
        again.load_state_dict(whole.state_dict())
    resumed = torch.optim.SGD(again.parameters(), 0.05)
    nmgraph.attach(again, resumed, total_steps=10)
    ours = train(again, resumed, 2)
    theirs = train(whole, optimizer, 2)
    assert ours[0] == theirs[0]
    assert all(torch.equal(t, whole.state_dict()[name]) for name, t in again.state_dict().items())
    average.update_parameters(whole)
    take_masks(average, whole)
    kernels.clear()
    assert loss_of(average, inputs_of(whole)).isfinite()
    assert not kernels  # no controller stands by the masks of an average
    assert nmgraph.verify(nmgraph.finalize(average)).holds


def _rank(rank, world, path):
    model, optimizer = converted(bert, "force", "bimask", interval=1)
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(model, optimizer, 3, 2, wrapped)
    assert len(nmgraph.hardware(wrapped).sparse) == 13
    torch.save(model.state_dict(), path / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path, kernels):
    on_ranks(2, _rank, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(t, other[key]) for key, t in one.items())
