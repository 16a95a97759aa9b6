"""Hugging Face directories: what opens bit-equal, what is refused before transformers sees it, and the way back."""

import json
import os
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import nmgraph
from nmgraph.checkpoint.dense_file import open_dense, read_dense
from nmgraph.errors import ExportError, FileError, MissingPackageError, UntrustedError

BERT = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=120,
                  max_position_embeddings=32)  # fmt: skip
LLAMA = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=120,
                    max_position_embeddings=32, tie_word_embeddings=True)  # fmt: skip
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=120, n_positions=32, bos_token_id=1, eos_token_id=2)
VIT = ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
)
TOKENS = torch.tensor([[5, 7, 11, 13], [3, 2, 1, 0]])


pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def bert(tmp_path):
    BertForSequenceClassification(BERT).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def message(directory, error=FileError):
    with pytest.raises(error) as caught:
        read_dense(directory)
    assert type(caught.value) is error
    return str(caught.value)


def reconfigure(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return list(one) == list(other) and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


@pytest.mark.parametrize("size", ["20KB", "1GB"], ids=["sharded", "whole"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: BertForSequenceClassification(BERT),
        lambda: LlamaForCausalLM(LLAMA).bfloat16(),
        lambda: GPT2LMHeadModel(GPT2),
    ],
    ids=["BERT", "Llama bf16, tied", "GPT-2"],
)
def test_directory_opens_bit_equal_in_its_dtype(make, size, tmp_path, capfd):
    model = make()
    model.save_pretrained(tmp_path / "m", max_shard_size=size)
    capfd.readouterr()
    dense = read_dense(tmp_path / "m")
    assert capfd.readouterr() == ("", "")
    assert type(dense.model) is type(model)
    assert equal(dense.model, model)
    assert (dense.factory, dense.notes) == (None, ())


def test_links_to_a_cache_are_followed(bert):
    blobs = bert.parent / "blobs"
    blobs.mkdir()
    (bert / "model.safetensors").rename(blobs / "a1b2")
    (bert / "model.safetensors").symlink_to("../blobs/a1b2")
    assert isinstance(open_dense(bert), BertForSequenceClassification)


def test_missing_head_is_named_and_not_made_at_random(tmp_path):
    BertModel(BERT).save_pretrained(tmp_path / "m")
    reconfigure(tmp_path / "m", architectures=["BertForSequenceClassification"])
    assert message(tmp_path / "m") == (
        f"{tmp_path / 'm'} does not hold all of BertForSequenceClassification, which its config.json names; the rest would "
        "be random:\n  classifier.bias is missing in the files\n  classifier.weight is missing in the files\n"
        "Train or load that part in Python, and write the model with save_pretrained."
    )


def test_mismatched_weight_is_named(bert):
    state = load_file(bert / "model.safetensors")
    state["classifier.weight"] = torch.zeros(5, 32)
    save_file(state, bert / "model.safetensors", {"format": "pt"})
    assert "classifier.weight is 5x32 in the files, 2x32 in the model" in message(bert)


def test_tensors_that_the_model_does_not_have_are_said(bert):
    state = load_file(bert / "model.safetensors")
    save_file(
        {**state, "cls.seq_relationship.weight": torch.zeros(2, 32)}, bert / "model.safetensors", {"format": "pt"}
    )
    assert read_dense(bert).notes == (
        "BertForSequenceClassification has no place for 1 tensors of the files, which are left out: "
        "cls.seq_relationship.weight.",
    )


def test_pickled_weights_are_refused(bert):
    torch.save(load_file(bert / "model.safetensors"), bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    assert message(bert) == (
        f"{bert} holds its weights as a pickle only (pytorch_model.bin), which can hold code. If you trust it, load it "
        "with transformers, and write it again with save_pretrained, as safetensors."
    )


def test_directory_without_weights(bert):
    (bert / "model.safetensors").unlink()
    assert message(bert) == f"{bert} has a config.json, but no model.safetensors. Write it again with save_pretrained."


@pytest.mark.parametrize("share", [0, 0.0001, 0.5, 0.999])
def test_truncated_shard_is_named(share, tmp_path):
    BertForSequenceClassification(BERT).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[2]
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * share)])
    text = message(tmp_path / "m")
    assert text.startswith(f"{shard} can't be read as safetensors: ")
    assert text.endswith("Copy it again.")


def test_missing_shard_is_named(tmp_path):
    BertForSequenceClassification(BERT).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[2]
    shard.unlink()
    assert message(tmp_path / "m") == (
        f"{shard} does not exist, which model.safetensors.index.json names. Copy the directory again."
    )


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/outside.safetensors", "a\\b.safetensors", "pytorch_model.bin", "..", "", "x/../y"],
)
def test_index_that_leads_out_of_the_directory_is_refused(name, tmp_path):
    BertForSequenceClassification(BERT).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["classifier.bias"] = name
    index.write_text(json.dumps(content))
    assert message(tmp_path / "m") == f"{index} names {name!r}, which is no safetensors file in the directory."


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}'])
def test_index_without_a_map_is_refused(content, tmp_path):
    BertForSequenceClassification(BERT).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    index = tmp_path / "m" / "model.safetensors.index.json"
    index.write_text(content)
    assert message(tmp_path / "m") == f"{index} has no weight_map, which says where the weights are. Copy it again."


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "can't be read as JSON: Expecting value: line 1 column 1 (char 0). Copy it again."),
        (b"{", "can't be read as JSON: "),
        (b"\xff\xfe", "can't be read as JSON: "),
        (b"[" * 100_000, "can't be read as JSON: "),
        (b"[1]", "holds a list, not an object. Copy it again."),
        (b"{}", "does not name one model class (architectures: None). Load the model in Python"),
        (b'{"architectures": ["A", "B"]}', "does not name one model class (architectures: ['A', 'B'])."),
        (b'{"architectures": [["A"]]}', "does not name one model class (architectures: [['A']])."),
    ],
)
def test_damaged_config_is_said(content, said, bert):
    (bert / "config.json").write_bytes(content)
    assert message(bert).startswith(f"{bert / 'config.json'} {said}")


@pytest.mark.parametrize(
    "name",
    [
        "NoSuchModel",
        "Trainer",
        "AutoModel",
        "os.system",
        "__file__",
        "PreTrainedModel",
        "utils",
        "BertConfig",
        "",
        "Bért",
    ],
)
def test_class_that_is_no_model_of_transformers_is_refused(name, bert):
    reconfigure(bert, architectures=[name])
    assert message(bert, UntrustedError) == (
        f"{bert} needs the class {name}, which transformers {transformers.__version__} does not have. Code that comes with "
        "a model is never run. If you know it, load the model in Python, and nmgraph.convert it there."
    )


def test_code_in_the_directory_is_never_run(bert, tmp_path):
    canary = tmp_path / "canary"
    (bert / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    reconfigure(bert, architectures=["EvilModel"], auto_map={"AutoModel": "modeling_evil.EvilModel"})
    assert "needs the class EvilModel (modeling_evil.EvilModel), which" in message(bert, UntrustedError)
    (bert / "custom_generate").mkdir()
    (bert / "custom_generate" / "generate.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    reconfigure(bert, architectures=["BertForSequenceClassification"])
    assert type(open_dense(bert)) is BertForSequenceClassification
    assert not canary.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config: its weights are quantized."),
        ({"transformers_weights": "../x.safetensors"}, "transformers_weights: it names other files for its weights."),
        ({"fusion_config": {"a": 1}}, "fusion_config: it asks for fused layers."),
        ({"model_args": {"checkpoint_path": "evil.pth"}}, "checkpoint_path: it names other files for its weights."),
        ({"architecture": "local-dir:/tmp/x"}, "architecture: local-dir:/tmp/x would be fetched from elsewhere."),
        ({"backbone": "hf-hub:x/y"}, "backbone: hf-hub:x/y would be fetched from elsewhere."),
        ({"text_config": {"quantization_config": {}}}, "quantization_config: its weights are quantized."),
    ],
)
def test_config_that_leads_elsewhere_is_refused(change, said, bert):
    reconfigure(bert, **change)
    assert message(bert).startswith(f"{bert / 'config.json'}: {said}")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_experts_implementation"])
def test_kernels_from_the_hub_are_refused(key, bert):
    reconfigure(bert, sub={key: "someone/flash-attn"})
    assert message(bert, UntrustedError) == (
        f"{bert / 'config.json'}: {key} names code on the hub (someone/flash-attn), which is never run. Take it out."
    )


def test_adapter_is_refused(bert):
    (bert / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')
    assert message(bert).startswith(f"{bert} holds an adapter (PEFT). Merge it into its model, and save that: ")


def test_config_that_the_class_does_not_take_is_said(bert):
    reconfigure(bert, hidden_size=-3)
    text = message(bert)
    assert text.startswith(f"{bert} can't be read as BertForSequenceClassification: ")
    assert text.endswith(f"transformers.BertForSequenceClassification.from_pretrained({str(bert)!r}) first.")


def test_missing_transformers_is_named(bert, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert message(bert, MissingPackageError) == (
        f"{bert} needs the package transformers, which could not be imported: import of transformers halted; None in "
        "sys.modules. Install it: pip install transformers."
    )


def test_directory_needs_no_other_model(bert):
    with pytest.raises(FileError, match=r" holds a whole model; leave --model models:mlp away\.$"):
        read_dense(bert, factory="models:mlp")


def test_model_in_training_is_told_to_be_finalized(tmp_path):
    model = nmgraph.convert(BertForSequenceClassification(BERT), method="srste")
    model.save_pretrained(tmp_path / "m")
    assert message(tmp_path / "m") == (
        f"{tmp_path / 'm'} holds a converted model in training. Finalize it first: "
        "nmgraph.finalize(model).save_pretrained(...); to train on, load these weights into the converted model."
    )


@pytest.mark.parametrize("name", ["mödel 模型", "run[1]"])
def test_directory_may_be_called_anything(name, tmp_path):
    BertForSequenceClassification(BERT).save_pretrained(tmp_path / name)
    assert isinstance(open_dense(tmp_path / name), BertForSequenceClassification)


@pytest.mark.parametrize(
    "make", [lambda: LlamaForCausalLM(LLAMA), lambda: GPT2LMHeadModel(GPT2)], ids=["Llama, tied", "GPT-2"]
)
def test_trained_model_is_saved_as_a_plain_one_that_generates(make, tmp_path):
    make().save_pretrained(tmp_path / "dense")
    model = nmgraph.convert(open_dense(tmp_path / "dense"), method="srste").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    nmgraph.attach(model, optimizer, total_steps=2)
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    nmgraph.save(model, tmp_path / "m.nm.pt")
    finished = nmgraph.finalize(nmgraph.load(tmp_path / "m.nm.pt")).eval()
    finished.save_pretrained(tmp_path / "out")
    again = type(finished).from_pretrained(tmp_path / "out", local_files_only=True)
    assert type(again) is type(finished)
    assert equal(again, finished)
    assert not [key for key in again.state_dict() if "nm_" in key]
    assert again.config.to_dict().keys() == finished.config.to_dict().keys()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(TOKENS, **options), finished.generate(TOKENS, **options))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_export_writes_the_directory_and_reads_it_back(precision, tmp_path):
    LlamaForCausalLM(LLAMA).bfloat16().save_pretrained(tmp_path / "dense")
    model = nmgraph.convert(open_dense(tmp_path / "dense"), method="srste")
    before = model.config.to_dict()
    report = nmgraph.export(model, tmp_path / "out", hf=True, onnx=False, precision=precision)
    assert report.holds
    assert str(report.hugging_face) == "from_pretrained gives LlamaForCausalLM back, 21 tensors bit-equal"
    assert report.to_dict()["hugging_face"]["holds"] is True
    assert sorted(report.files) == [
        "hf/config.json", "hf/generation_config.json", "hf/model.safetensors", "hf/nmgraph.json", "manifest.json",
        "report.json",
    ]  # fmt: skip
    assert model.config.to_dict() == before
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert open_dense(tmp_path / "out" / "hf").dtype is dtype
    found = nmgraph.verify(tmp_path / "out" / "hf")
    assert found.holds
    assert sum(c.expected for c in found.checks) == 14


def test_verify_reads_every_shard(tmp_path):
    model = nmgraph.convert(BertForSequenceClassification(BERT), method="srste", pattern="1:4", skip=["classifier"])
    report = nmgraph.export(model, tmp_path / "out", hf=True, onnx=False)
    assert report.holds
    hf = tmp_path / "out" / "hf"
    open_dense(hf).save_pretrained(hf, max_shard_size="20KB")
    (hf / "model.safetensors").unlink(missing_ok=True)
    assert len(list(hf.glob("*.safetensors"))) > 2
    assert nmgraph.verify(hf).holds
    weights = json.loads((hf / "model.safetensors.index.json").read_text())["weight_map"]
    name = "bert.encoder.layer.1.output.dense.weight"
    state = load_file(hf / weights[name])
    state[name][0, :4] = 1.0
    save_file(state, hf / weights[name], {"format": "pt"})
    found = nmgraph.verify(hf)
    assert not found.holds
    assert [c.name for c in found.checks if c.expected and not c.holds] == [name.removesuffix(".weight")]


@pytest.mark.parametrize("content", ["", "{}", '{"method": "x", "entries": [{}], "inputs": [], "untraced": {}}'])
def test_damaged_manifest_beside_a_model_is_said(content, bert):
    (bert / "nmgraph.json").write_text(content)
    with pytest.raises(FileError, match=r"nmgraph\.json is damaged: "):
        nmgraph.verify(bert)


def test_what_came_back_changed_fails_the_export(tmp_path, monkeypatch):
    def save_wrong(self, directory):
        original(self, directory)
        state = load_file(directory / "model.safetensors")
        save_file(
            {**state, "classifier.bias": state["classifier.bias"] + 1},
            directory / "model.safetensors",
            {"format": "pt"},
        )

    original = BertForSequenceClassification.save_pretrained
    monkeypatch.setattr(BertForSequenceClassification, "save_pretrained", save_wrong)
    model = nmgraph.convert(BertForSequenceClassification(BERT), method="srste")
    report = nmgraph.export(model, tmp_path / "out", hf=True, onnx=False)
    assert not report.holds
    assert str(report.hugging_face) == "1 of 41 tensors came back changed: classifier.bias"


def test_only_hugging_face_models_are_written_so(tmp_path):
    model = nmgraph.convert(torch.nn.Sequential(torch.nn.Linear(16, 8)), method="srste")
    with pytest.raises(
        ExportError, match=r"^Sequential is no Hugging Face model, so --hf \(hf=True\) can't write it\."
    ):
        nmgraph.export(model, tmp_path / "out", hf=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: LlamaForCausalLM(LLAMA), "input_ids=3x5:int64 (the model's dummy_inputs)"),
        (lambda: ViTForImageClassification(VIT), "pixel_values=1x3x32x32 (the model's config)"),
    ],
    ids=["Llama", "ViT"],
)
def test_onnx_needs_no_inputs_to_be_told(make, inputs, tmp_path):
    model = nmgraph.convert(make(), method="srste")
    caching = getattr(model.config, "use_cache", None)
    report = nmgraph.export(model, tmp_path / "out")
    assert (report.holds, report.inputs) == (True, inputs)
    assert len(report.parity.outputs) == 1
    assert getattr(model.config, "use_cache", None) is caching


def test_mixture_of_experts_goes_from_its_directory_through_a_file_and_back(tmp_path):
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, vocab_size=120,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "dense")
    model = nmgraph.convert(open_dense(tmp_path / "dense"), method="srste")
    assert {e.axis for e in nmgraph.manifest(model).converted if "experts" in e.name} == {-1}
    nmgraph.save(model, tmp_path / "a.nm.pt")
    loaded, tokens = nmgraph.load(tmp_path / "a.nm.pt"), torch.arange(7).unsqueeze(0)
    assert torch.equal(loaded.eval()(tokens).logits, model.eval()(tokens).logits)
    finished = nmgraph.finalize(loaded)
    finished.save_pretrained(tmp_path / "sparse")
    again = open_dense(tmp_path / "sparse")
    assert torch.equal(again.eval()(tokens).logits, finished.eval()(tokens).logits)
    assert float((again.model.layers[0].mlp.experts.down_proj == 0).float().mean()) == 0.5
