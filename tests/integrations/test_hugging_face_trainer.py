"""Hugging Face's Trainer drives the methods, and its own checkpoints resume them."""

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from variants import IN_SHORT

import nmgraph
from nmgraph.errors import TrainingError
from nmgraph.integrations.transformers import SparseTraining
from nmgraph.methods import METHODS
from nmgraph.training.run_log import Record

TINY = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 8, "num_labels": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip

QUICK = ("lbc", "rigl")


class Tokens(Dataset):
    """Which of four tokens a sequence begins with."""

    def __init__(self, size=64):
        self.tokens = torch.randint(32, (size, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i, 0] % 4}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def model_of(method):
    torch.manual_seed(1)
    return nmgraph.convert(BertForSequenceClassification(BertConfig(**TINY)), method=method, **IN_SHORT.get(method, {}))


def trainer_of(model, directory, *callbacks, **options):
    usual = {
        "output_dir": str(directory), "num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
        "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no",
    }  # fmt: skip
    return Trainer(model, TrainingArguments(**{**usual, **options}), train_dataset=Tokens(), callbacks=list(callbacks))


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_training_ends_at_the_pattern_and_resumes_from_the_trainers_checkpoint(method, tmp_path):
    whole = model_of(method)
    sparse = SparseTraining()
    trainer_of(whole, tmp_path, sparse).train()
    assert (sparse.controller.step, sparse.controller.total_steps) == (16, 16)
    assert nmgraph.verify(nmgraph.finalize(whole)).holds
    saving = {"save_strategy": "steps", "save_steps": 6}
    trainer_of(model_of(method), tmp_path, SparseTraining(), StopAt(7), **saving).train()
    resumed = model_of(method)
    trainer_of(resumed, tmp_path, SparseTraining(), **saving).train(resume_from_checkpoint=True)
    assert same(resumed, whole)


@pytest.mark.parametrize("method", ["lbc", "srste"])
def test_it_is_the_plain_loop_bit_for_bit(method, tmp_path):
    trained, batches = model_of(method), []

    def collate(items):
        batches.append(torch.utils.data.default_collate(items))
        return batches[-1]

    options = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optim": "adamw_torch", "max_steps": 12}
    trainer = trainer_of(trained, tmp_path, SparseTraining(), **options)
    trainer.data_collator = collate
    trainer.train()
    model = model_of(method).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    nmgraph.attach(model, optimizer, total_steps=12)
    for batch in batches[:12]:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert same(trained, model)


def test_accumulated_batches_are_one_step_of_the_schedule(tmp_path):
    model, sparse = model_of("lbc"), SparseTraining()
    trainer_of(model, tmp_path, sparse, gradient_accumulation_steps=2).train()
    assert (sparse.controller.step, sparse.controller.total_steps) == (8, 8)
    assert nmgraph.verify(nmgraph.finalize(model)).holds


def test_bfloat16_autocast_ends_at_the_pattern(tmp_path):
    model = model_of("lbc")
    trainer_of(model, tmp_path, SparseTraining(), bf16=True).train()
    assert nmgraph.verify(nmgraph.finalize(model)).holds


def test_a_model_that_was_not_converted_is_refused(tmp_path):
    trainer = trainer_of(BertForSequenceClassification(BertConfig(**TINY)), tmp_path, SparseTraining())
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    assert str(caught.value) == (
        "BertForSequenceClassification has no sparse layer. Convert it first: nmgraph.convert(model, method=...)."
    )


def test_the_best_checkpoint_is_loaded_with_its_masks(tmp_path):
    model = model_of("lbc")
    trainer = trainer_of(model, tmp_path, SparseTraining(), save_strategy="epoch")
    trainer.eval_dataset = Tokens()
    trainer.args.eval_strategy, trainer.args.load_best_model_at_end = "epoch", True
    trainer.args.metric_for_best_model, trainer.args.greater_is_better = "loss", True  # the worst, which is the first
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-8")
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert int(best["classifier.nm_clock"][0]) == 8
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in best.items())


@pytest.mark.parametrize("method", ["lbc", "bame"])
def test_tied_and_transposed_weights_survive_the_trainers_checkpoint(method, tmp_path):
    """GPT-2 shares its embedding with its head, and its Conv1D weights lie the other way round."""
    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)

    def model():
        torch.manual_seed(1)
        return nmgraph.convert(GPT2LMHeadModel(config), method=method, include=["lm_head"])

    first = model()
    trainer = trainer_of(first, tmp_path, SparseTraining(), max_steps=3)
    trainer.data_collator = lambda items: dict.fromkeys(
        ("input_ids", "labels"), torch.stack([item["input_ids"] for item in items])
    )
    trainer.train()
    trainer.save_model(tmp_path / "checkpoint-3")
    read = model()
    assert not same(first, read)
    trainer_of(read, tmp_path)._load_from_checkpoint(str(tmp_path / "checkpoint-3"))
    assert same(first, read)


def test_records_are_made_with_the_loss_that_is_logged(tmp_path):
    entries = []
    sparse = SparseTraining(entries.append, every=4)
    trainer_of(model_of("lbc"), tmp_path, sparse, logging_strategy="steps", logging_steps=2).train()
    records = [entry for entry in entries if isinstance(entry, Record)]
    assert [r.step for r in records] == [0, 4, 8, 12, 16]
    assert all(r.metrics["loss"] > 0 for r in records[1:])
    assert records[-1].mean("kept") == 0.5
