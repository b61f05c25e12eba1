"""One fine-tuning: what is learnt, what is cut and regrouped, which models are refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from glue_case import save_student, write_rte, write_sst2
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

from fastkd.glue.encoded import (
    EncodedSplit,
    EncodedTask,
    LengthGroupedBatches,
    collate,
    cut_embeddings,
    encode,
    load_examples,
)
from fastkd.glue.finetune import FineTuning, check_model, finetune, load_classifier, predict, training_arguments
from fastkd.glue.protocol import HEADLINE, PAPER, Protocol
from fastkd.glue.tasks import TASKS

QUICK = dataclasses.replace(HEADLINE, epochs=3)


@pytest.fixture(scope="module")
def student(quickstart_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("student"), quickstart_teacher)


@pytest.fixture(scope="module")
def roberta(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random RoBERTa, whose positions count from the padding id."""
    folder = tmp_path_factory.mktemp("roberta")
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=0, type_vocab_size=2,
    )  # fmt: skip
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    AutoTokenizer.from_pretrained(student).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_sst2(tmp_path / "data")


def tuning(model: Path, data: Path, **changes: Any) -> FineTuning:
    return dataclasses.replace(FineTuning(model, TASKS["sst2"], data, None, QUICK, 3e-3, 16, 0), **changes)


def test_learns_and_repeats_itself(student: Path, data: Path) -> None:
    wanted = tuning(student, write_sst2(data, train=320), test=("test",))
    first = finetune(wanted)
    assert first["metrics"]["accuracy"] == 100
    sentences = (data / "SST-2" / "test.tsv").read_text().splitlines()[1:]
    assert first["predictions"]["test"] == [int("good" in sentence) for sentence in sentences]
    assert finetune(wanted)["loss"] == first["loss"]
    assert finetune(dataclasses.replace(wanted, seed=1))["loss"] != first["loss"]


def test_regression_learns_and_is_scored_in_float32(student: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stsb"
    folder.mkdir()
    rows = [{"sentence1": f"{i} cats", "sentence2": "cats " * (i % 6), "label": float(i % 6)} for i in range(120)]
    for name in ("train", "validation", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    protocol = dataclasses.replace(QUICK, epochs=10)
    result = finetune(tuning(student, tmp_path, task=TASKS["stsb"], protocol=protocol, test=("test",)))
    assert result["metrics"]["pearson"] > 80 and result["metrics"]["spearman"] > 80
    scores = torch.tensor(result["predictions"]["test"], dtype=torch.float64)
    assert np.corrcoef(scores, [row["label"] for row in rows])[0, 1] * 100 == pytest.approx(
        result["metrics"]["pearson"]
    )
    assert (scores != scores.to(torch.bfloat16)).any(), "rounded to bfloat16"


@pytest.mark.parametrize("protocol", [HEADLINE, PAPER])
def test_the_recipe(protocol: Protocol, tmp_path: Path) -> None:
    for rate, size in protocol.grid:
        one = FineTuning(tmp_path, TASKS["rte"], None, None, protocol, rate, size, 3)
        found = training_arguments(one, 2490, str(tmp_path))
        assert (found.learning_rate, found.train_batch_size, found.num_train_epochs) == (rate, size, 5)
        steps = 5 * -(-2490 // size)
        recipe = ("polynomial", 0.01, 0) if protocol is PAPER else ("cosine", 0, -(-steps // 10))
        assert (found.lr_scheduler_type, found.weight_decay, found.warmup_steps) == recipe and found.seed == 3
        assert recipe[0] in protocol.description
    assert HEADLINE.grid == [(4e-5, 16)] and HEADLINE.seeds == 5 and len(HEADLINE.tasks) == 8
    assert {rate for rate, _ in PAPER.grid} == {1e-5, 3e-5, 5e-5, 8e-5} and len(PAPER.grid) == 8
    assert set(HEADLINE.tasks) - set(PAPER.tasks) == {"stsb"} and protocol.max_length == 128


@pytest.mark.parametrize("family", ["student", "roberta"])
def test_predictions_are_those_of_the_whole_model_in_file_order(
    family: str, data: Path, request: pytest.FixtureRequest
) -> None:
    """Oracle: transformers, row by row, with the whole vocabulary and no padding."""
    folder = request.getfixturevalue(family)
    task = dataclasses.replace(TASKS["sst2"], labels=(), metrics=("pearson",))
    rows = load_examples(task, data, None)
    torch.manual_seed(1)
    model, tokenizer = load_classifier(folder, task).eval(), AutoTokenizer.from_pretrained(folder)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)  # larger than at the start, so that mistakes show
    with torch.no_grad():
        scores = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in rows["dev"].texts[0]]
    encoded = encode(folder, rows, 128)
    cut_embeddings(model, encoded)
    assert len(model.get_input_embeddings().weight) == len(encoded.used) < 200
    # In float32, of the largest score: smaller ones are differences of numbers as large.
    assert predict(model, encoded, "dev", task) == pytest.approx(scores, abs=5e-6 * max(map(abs, scores)))
    assert np.ptp(scores) > 0.1


def test_cut_embeddings_train_alike() -> None:
    """Three steps of clipped and decaying AdamW on RoBERTa (padding id 1): the same losses and rows, cut or whole."""
    config = RobertaConfig(
        vocab_size=500, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    used = torch.tensor([0, 1, 2, 7, 44, 300, 499])
    ids = torch.tensor([[3, 6, 4, 2, 1], [5, 0, 2, 1, 1], [6, 5, 4, 3, 2]])  # places in `used`, padded with 1
    mask = (ids != 1).long()
    losses, tables = [], []
    for cut in (False, True):
        torch.manual_seed(0)
        model = RobertaForSequenceClassification(config)
        if cut:
            cut_embeddings(model, EncodedTask({}, used, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(3):
            loss = model(input_ids=ids if cut else used[ids], attention_mask=mask, labels=torch.tensor([0, 1, 1])).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        table = model.get_input_embeddings().weight.detach()
        tables.append(table if cut else table[used])
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-6)
    torch.testing.assert_close(tables[0], tables[1])


def test_batches_hold_like_lengths_and_every_row_once() -> None:
    lengths = np.random.default_rng(0).integers(3, 120, 1003).tolist()
    batches = LengthGroupedBatches(lengths, 16, seed=0)
    first, second = list(batches), list(batches)
    assert sorted(row for batch in first for row in batch) == list(range(1003)) and len(first) == len(batches)
    assert first != second and list(LengthGroupedBatches(lengths, 16, seed=0)) == first
    assert list(LengthGroupedBatches(lengths, 16, seed=1)) != first
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in first)
    assert padded < 1.05 * sum(lengths)


def test_padding() -> None:
    split = EncodedSplit({"input_ids": [[5, 6, 7], [8]], "token_type_ids": [[0, 1, 1], [0]]}, [1, 0])
    batch = collate([split[0], split[1]], pad_token_id=3)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 3, 3]], "token_type_ids": [[0, 1, 1], [0, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]], "labels": [1, 0],
    }  # fmt: skip


def test_long_pairs_are_cut_to_what_the_model_takes(student: Path, roberta: Path, tmp_path: Path) -> None:
    data = write_rte(tmp_path)
    train = data / "RTE" / "train.tsv"
    train.write_text(train.read_text().replace("It rains.", "It rains. " * 50))
    encoded = encode(student, load_examples(TASKS["rte"], data, 10), 128)
    split = encoded.splits["train"]
    assert set(split.lengths) == {64} and len(split) == 10
    assert split.columns["token_type_ids"][0][-5:] == [1] * 5, "the shorter text is whole"
    assert set(encode(roberta, load_examples(TASKS["rte"], data, 10), 128).splits["train"].lengths) == {63}


def test_a_subset_is_fixed_and_random(data: Path) -> None:
    whole, part, more = (load_examples(TASKS["sst2"], data, rows)["train"] for rows in (None, 20, 30))
    assert part.texts == load_examples(TASKS["sst2"], data, 20)["train"].texts and len(part) == 20
    assert part.texts[0] != whole.texts[0][:20] and set(part.texts[0]) <= set(more.texts[0])


def test_an_earlier_head_is_forgotten(student: Path, tmp_path: Path) -> None:
    """A model that was fine-tuned before starts as any other: from a head that the seed draws."""
    tuned = load_classifier(student, TASKS["sst2"])
    torch.nn.init.constant_(tuned.classifier.weight, 0.5)
    tuned.save_pretrained(tmp_path)
    heads = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        heads.append(load_classifier(tmp_path, TASKS["rte"]).classifier.weight.detach())
    assert not (heads[0] == 0.5).any() and not torch.equal(heads[0], heads[1]) and torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 10**9}, {"num_attention_heads": 0}, {"vocab_size": 10**12}])
def test_a_configuration_that_no_model_has_is_refused(changes: dict[str, int], student: Path, tmp_path: Path) -> None:
    shutil.copytree(student, tmp_path, dirs_exist_ok=True)
    config = json.loads((student / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match="cannot be loaded") as caught:
        load_classifier(tmp_path, TASKS["rte"])
    assert len(str(caught.value).splitlines()) == 1


def test_an_attention_that_is_not_installed_is_not_needed(student: Path, tmp_path: Path) -> None:
    """config.json keeps the name of what the model was trained with."""
    shutil.copytree(student, tmp_path, dirs_exist_ok=True)
    config = json.loads((student / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_attn_implementation": "flash_attention_3"}))
    check_model(tmp_path)


def test_a_model_without_positions_or_padding_is_refused(student: Path, tmp_path: Path) -> None:
    GPT2ForSequenceClassification(GPT2Config(vocab_size=30522, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(student).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a gpt2 without .* a padding token; give an encoder"):
        check_model(tmp_path)


def test_swapped_splits_are_another_fine_tuning() -> None:
    """A task file whose train and dev files change places must not find the results of before."""
    content = (("a.csv", "1"), ("b.csv", "2"))
    one = dataclasses.replace(TASKS["sst2"], train="a.csv", dev=("b.csv",))
    other = dataclasses.replace(one, train="b.csv", dev=("a.csv",))
    both = [FineTuning(Path(), task, None, None, QUICK, 1e-3, 16, 0, content=content) for task in (one, other)]
    assert len({each.path for each in both}) == 2
