"""Fine-tuning on GLUE: what is learnt, what is cut and regrouped, and the command as users type it."""

import dataclasses
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from hub import Hub
from hub_contents import card, parquet
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

from fastkd.files import read_jsonl
from fastkd.glue import __main__ as command_line
from fastkd.glue.cells import Cell
from fastkd.glue.encoded import EncodedTask, LengthGroupedBatches, Split, collate, cut_embeddings, encode, load_rows
from fastkd.glue.evaluation import evaluate
from fastkd.glue.finetune import Job, check_model, finetune, load_classifier, predict, training_arguments
from fastkd.glue.protocol import HEADLINE, PAPER, Protocol
from fastkd.glue.rows import read_rows
from fastkd.glue.scores import choose, markdown, to_json, update_card
from fastkd.glue.submission import write_submission
from fastkd.glue.tasks import TASKS

QUICK = dataclasses.replace(HEADLINE, epochs=3)
GLUE = "fastkd.glue.__main__"


@pytest.fixture(scope="module")
def student(quickstart_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random student as fastkd exports it: no pooler, BERT's vocabulary."""
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    AutoTokenizer.from_pretrained(quickstart_teacher).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# A student\n")
    return folder


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
def run_folder(student: Path, tmp_path: Path) -> Path:
    """What a finished run leaves behind, as far as GLUE reads it."""
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "ledger.jsonl").write_text('{"event": "export", "seconds": 1.0, "step": 3, "charged": false}\n')
    (folder / "plan.json").write_text('{"ancestors": ["runs/other", "quickstart"]}')
    subprocess.run(["cp", "-r", str(student), str(folder / "final")], check=True)
    return folder


def write_sst2(data: Path, train: int = 96, dev: int = 40) -> Path:
    """Sentences of 3 to 12 words, positive where they hold "good"."""
    generator = np.random.default_rng(0)
    words = np.array(["the", "film", "was", "with", "plot", "and", "actors", "who", "speak", "of", "rain"])
    folder = data / "SST-2"
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("dev", dev), ("test", 6)):
        lines = ["index\tsentence" if name == "test" else "sentence\tlabel"]
        for i in range(rows):
            positive = int(generator.integers(2))
            sentence = [*generator.choice(words, generator.integers(2, 11)), "good" if positive else "bad"]
            text = " ".join(sentence)
            lines.append(f"{i}\t{text}" if name == "test" else f"{text}\t{positive}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return data


def write_rte(data: Path) -> Path:
    folder = data / "RTE"
    folder.mkdir(parents=True)
    labels = ("entailment", "not_entailment")
    rows = "".join(f"{i}\tIt rains.\tIt is {['wet', 'dry'][i % 2]}.\t{labels[i % 2]}\n" for i in range(40))
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + rows)
    return data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_sst2(tmp_path / "data")


def job(model: Path, data: Path, **changes: Any) -> Job:
    return dataclasses.replace(Job(model, TASKS["sst2"], data, None, QUICK, 3e-3, 16, 0), **changes)


def glue(*options: object) -> subprocess.CompletedProcess[str]:
    """The command as users type it."""
    argv = [sys.executable, "-m", "fastkd.glue", *map(str, options)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


# --- one fine-tuning


def test_learns_and_repeats_itself(student: Path, data: Path) -> None:
    wanted = job(student, write_sst2(data, train=320), test=("test",))
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
    result = finetune(job(student, tmp_path, task=TASKS["stsb"], protocol=protocol, test=("test",)))
    assert result["metrics"]["pearson"] > 80 and result["metrics"]["spearman"] > 80
    scores = torch.tensor(result["predictions"]["test"], dtype=torch.float64)
    assert np.corrcoef(scores, [row["label"] for row in rows])[0, 1] * 100 == pytest.approx(
        result["metrics"]["pearson"]
    )
    assert (scores != scores.to(torch.bfloat16)).any(), "rounded to bfloat16"


@pytest.mark.parametrize("protocol", [HEADLINE, PAPER])
def test_the_recipe(protocol: Protocol, tmp_path: Path) -> None:
    for rate, size in protocol.grid:
        one = Job(tmp_path, TASKS["rte"], None, None, protocol, rate, size, 3)
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
    rows = load_rows(task, data, None)
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
    split = Split({"input_ids": [[5, 6, 7], [8]], "token_type_ids": [[0, 1, 1], [0]]}, [1, 0])
    batch = collate([split[0], split[1]], pad_token_id=3)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 3, 3]], "token_type_ids": [[0, 1, 1], [0, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]], "labels": [1, 0],
    }  # fmt: skip


def test_long_pairs_are_cut_to_what_the_model_takes(student: Path, roberta: Path, tmp_path: Path) -> None:
    data = write_rte(tmp_path)
    train = data / "RTE" / "train.tsv"
    train.write_text(train.read_text().replace("It rains.", "It rains. " * 50))
    encoded = encode(student, load_rows(TASKS["rte"], data, 10), 128)
    split = encoded.splits["train"]
    assert set(split.lengths) == {64} and len(split) == 10
    assert split.columns["token_type_ids"][0][-5:] == [1] * 5, "the shorter text is whole"
    assert set(encode(roberta, load_rows(TASKS["rte"], data, 10), 128).splits["train"].lengths) == {63}


def test_a_subset_is_fixed_and_random(data: Path) -> None:
    whole, part, more = (load_rows(TASKS["sst2"], data, rows)["train"] for rows in (None, 20, 30))
    assert part.texts == load_rows(TASKS["sst2"], data, 20)["train"].texts and len(part) == 20
    assert part.texts[0] != whole.texts[0][:20] and set(part.texts[0]) <= set(more.texts[0])


# --- over tasks and seeds


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
    jobs = [Job(Path(), task, None, None, QUICK, 1e-3, 16, 0, content=content) for task in (one, other)]
    paths = {Cell(each, {}, Path()).path for each in jobs}
    assert len(paths) == 2


def cells(**values: list[float]) -> list[tuple[Cell, dict[str, Any]]]:
    """Cells of given metrics: task_lr_batch=[score of seed 0, …]."""
    found = []
    for key, scores in values.items():
        name, rate, size = key.split("_")
        for seed, value in enumerate(scores):
            task = TASKS[name]
            one = Job(Path(), task, None, None, PAPER, float(rate), int(size), seed)
            metrics = {metric: value + 2 * i for i, metric in enumerate(task.metrics)}
            found.append((Cell(one, {"train": 9}, Path()), {"metrics": metrics, "seconds": 1.0}))
    return found


def test_the_grids_best_mean_counts_not_its_luckiest_seed() -> None:
    scores = choose(cells(**{"rte_1e-5_16": [50.0, 70.0], "rte_3e-5_16": [62.0, 64.0]}))
    assert scores["rte"].metrics["accuracy"] == {
        "mean": 63.0, "std": pytest.approx(2**0.5), "seeds": [0, 1], "values": [62.0, 64.0],
    }  # fmt: skip
    assert scores["rte"].best == 1
    assert "Best of the grid: RTE 3e-05, batch 16" in markdown(scores, PAPER) and "optimistic" in markdown(
        scores, PAPER
    )


def test_the_best_seed_is_submitted(tmp_path: Path) -> None:
    pairs = cells(**{"rte_1e-5_16": [50.0, 70.0], "stsb_1e-5_16": [80.0, 60.0]})
    found = []
    for cell, result in pairs:
        seed = cell.job.seed
        answers = [seed, 1] if cell.job.task.name == "rte" else [5.25 + seed, -0.5]
        ready = dataclasses.replace(cell, job=dataclasses.replace(cell.job, test=("test",)))
        found.append((ready, result | {"predictions": {"test": answers}}))
    written = write_submission(choose(found), tmp_path)
    assert [path.name for path in written] == ["RTE.tsv", "STS-B.tsv"]
    assert written[0].read_text() == "index\tprediction\n0\tnot_entailment\n1\tnot_entailment\n"
    assert written[1].read_text() == "index\tprediction\n0\t5.000\n1\t0.000\n"


def test_dtypes_that_differ_are_told() -> None:
    pairs = cells(**{"rte_1e-5_16": [50.0, 70.0]})
    found = [
        (cell, result | {"dtype": dtype}) for (cell, result), dtype in zip(pairs, ("float32", "bfloat16"), strict=True)
    ]
    assert "ran in bfloat16 and float32" in markdown(choose(found), PAPER)
    assert "ran in" not in markdown(choose(found[:1]), PAPER)


def test_an_average_takes_all_tasks_or_none() -> None:
    complete = {f"{name}_1e-5_16": [60.0, 70.0] for name in PAPER.tasks}
    scores = choose(cells(**complete))
    # MRPC and QQP have a second metric, two points above the first: their score is the mean of both.
    assert to_json(scores, PAPER)["average"]["score"]["values"] == pytest.approx([60 + 2 / 7, 70 + 2 / 7])
    assert "| average | 7 tasks | 65.3 ± 7.1 |" in markdown(scores, PAPER)
    del complete["qnli_1e-5_16"]
    scores = choose(cells(**complete))
    assert "average" not in to_json(scores, PAPER)
    assert "| average" not in markdown(scores, PAPER) and "No average: QNLI missing" in markdown(scores, PAPER)


def test_anchors_stand_beside_the_scores() -> None:
    table = markdown(choose(cells(**{"sst2_1e-5_16": [91.0], "mrpc_1e-5_16": [84.0]})), PAPER)
    assert "| SST-2 | accuracy | 91.0 | 92.7 | 91.3 | 92.4 | 92.3 |" in table
    assert "| MRPC | accuracy / F1 | 84.0 / 86.0 | 88.6 | 87.5 |  |  |" in table


def test_a_cards_section_is_put_once_and_replaced(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("# Student\n\nText.\n")
    update_card(card, "old\n")
    card.write_text(card.read_text() + "\n## After\n")
    update_card(card, "new \\1\n")
    text = card.read_text()
    assert text.startswith("# Student\n\nText.\n") and text.endswith("## After\n")
    assert text.count("## GLUE") == 1 and "new \\1" in text and "old" not in text


# --- the command


def put_on_hub(hub: Hub, data: Path, *tasks: str) -> None:
    """The rows of official files, in the hub's layout."""
    splits = {"train": "train", "dev": "validation"}
    files = {}
    for task, (split, name) in itertools.product(map(TASKS.__getitem__, tasks), splits.items()):
        rows = read_rows(task, split, data)
        columns = dict(zip(task.texts, rows.texts, strict=True)) | {"label": rows.labels, "idx": range(len(rows))}
        files[f"{task.name}/{name}-00000-of-00001.parquet"] = parquet(columns)
    hub.add("datasets", "nyu-mll/glue", {"README.md": card(*tasks, splits=tuple(splits.values())), **files})


def test_a_run_is_scored_once(run_folder: Path, tmp_path: Path, hub: Hub) -> None:
    data = write_rte(write_sst2(tmp_path / "data"))
    options = (run_folder, "--data", data, "--seeds", 2, "--predict-test", "--tasks", "sst2", "--train-rows", "32")
    first = glue(*options)
    assert (first.returncode, first.stderr) == (0, ""), first.stderr
    scores = json.loads((run_folder / "glue.json").read_text())
    assert set(scores) == {"sst2"} and scores["sst2"]["accuracy"]["seeds"] == [0, 1]
    text = (run_folder / "final" / "README.md").read_text()
    assert text.startswith("---\nlicense") and "fixed random subset of 32 rows" in text
    assert "fine-tuned on NLI and paraphrase pairs" in text
    result = (ModelCard(text).data.eval_results or [])[0]
    assert (result.dataset_type, result.dataset_config, result.metric_type) == ("nyu-mll/glue", "sst2", "accuracy")
    assert result.metric_value == pytest.approx(scores["sst2"]["accuracy"]["mean"] / 100, abs=1e-5)
    event = json.loads((run_folder / "ledger.jsonl").read_text().splitlines()[-1])
    assert event["event"] == "glue" and event["charged"] is False and event["seconds"] > 0
    assert (event["task"], event["seed"]) == ("sst2", 1), "a line for each fine-tuning: a kill loses none that finished"
    submission = (run_folder / "submission" / "SST-2.tsv").read_text().splitlines()
    assert submission[0] == "index\tprediction" and [line[:2] for line in submission[1:]] == [
        f"{i}\t" for i in range(6)
    ]

    before = snapshot(run_folder)
    again = processes.run(GLUE, *options)
    assert again.returncode == 0 and "2 of them finished before" in again.stdout
    assert snapshot(run_folder) == before

    log: list[str] = []
    put_on_hub(hub, data, "sst2", "rte")
    evaluate(
        run_folder,
        data=None,
        tasks=["sst2", "rte"],
        seeds=2,
        train_rows={"sst2": 32},
        output_dir=run_folder,
        log=log.append,
    )
    assert "4 fine-tunings, 2 of them finished before" in log[1]
    assert set(json.loads((run_folder / "glue.json").read_text())) == {"sst2", "rte"}
    text = (run_folder / "final" / "README.md").read_text()
    assert text.count("## GLUE") == 1
    assert [result.dataset_config for result in ModelCard(text).data.eval_results or []] == ["sst2", "rte"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_for(process: processes.Command, text: str) -> None:
    assert any(text in line for line in process.stdout), f"{text} never came"


def test_killed_and_issued_again_it_repeats_nothing(run_folder: Path, data: Path) -> None:
    options = (run_folder, "--data", data, "--seeds", 3)
    process = processes.Command(GLUE, *options)
    wait_for(process, "[1/3]")
    process.kill()
    process.finish()
    assert not (run_folder / "glue.json").exists()
    finished = snapshot(run_folder / "glue")
    assert 1 <= len(finished) < 3
    again = processes.run(GLUE, *options)
    assert f"{len(finished)} of them finished before" in again.stdout, again.stderr
    after = snapshot(run_folder / "glue")
    assert len(after) == 3 and finished.items() <= after.items()


def start_two_workers(run_folder: Path, data: Path) -> tuple[processes.Command, list[int]]:
    """An evaluation of two long fine-tunings side by side, and the ids of its child processes."""
    write_sst2(data, train=12000)
    process = processes.Command(GLUE, run_folder, "--data", data, "--seeds", 2, "--jobs", 2)
    wait_for(process, "2 at a time")
    children: list[int] = []
    while len(children) < 2:
        children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    return process, children


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_their_parent(run_folder: Path, data: Path) -> None:
    process, children = start_two_workers(run_folder, data)
    handles = [os.pidfd_open(pid) for pid in children]
    process.kill()
    process.finish()
    for handle in handles:
        assert select.select([handle], [], [], 15)[0], "a worker outlived its parent"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_that_dies_is_named(run_folder: Path, data: Path) -> None:
    process, children = start_two_workers(run_folder, data)
    os.kill(max(children), signal.SIGKILL)
    done = process.finish()
    assert done.returncode == 1
    assert "seed 1, died (exit code -9); the same command continues" in done.stderr and done.stderr.count("\n") == 1


def test_a_terminated_evaluation_says_how_to_go_on(run_folder: Path, data: Path) -> None:
    process = processes.Command(GLUE, run_folder, "--data", data, "--seeds", 3)
    wait_for(process, "[1/3]")
    process.send_signal(signal.SIGTERM)
    done = process.finish()
    assert done.returncode == 75 and "the same command continues" in done.stderr
    first, *_, last = [line for line in read_jsonl(run_folder / "ledger.jsonl") if line["event"] == "glue"]
    assert first["seed"] == 0 and last["task"] is None and last["seconds"] > 0


def break_layer(folder: Path) -> None:
    weights = load_file(folder / "final" / "model.safetensors")
    weights.pop("encoder.layer.0.output.dense.weight")
    save_file(weights, folder / "final" / "model.safetensors", metadata={"format": "pt"})


def break_tokenizer(folder: Path) -> None:
    for path in (folder / "final").glob("tokenizer*"):
        path.unlink()


def unfinish(folder: Path) -> None:
    (folder / "final").rename(folder / "other")


def spoil_card(folder: Path) -> None:
    (folder / "final" / "README.md").write_bytes(b"\xff\xfe\xfa")


def spoil_plan(folder: Path) -> None:
    (folder / "plan.json").write_text('{"teacher": ')


REFUSED: dict[str, tuple[Callable[[Path], None] | None, list[str], str]] = {
    "protocol": (None, ["--protocol", "best"], "invalid choice: 'best'"),
    "option": (None, ["--seed", "3"], "no option --seed: see --help"),
    "seeds": (None, ["--seeds", "0"], "--seeds must be at least 1, not 0"),
    "task": (None, ["--tasks", "sst2,squad"], "unknown task 'squad': choose from cola"),
    "absent task": (None, ["--tasks", "cola"], "has no folder CoLA"),
    "rows": (None, ["--train-rows", "many"], "--train-rows takes a number from 1, 20000, or one by task"),
    "rows of another task": (None, ["--train-rows", "rte=3"], "--train-rows names 'rte', which is not evaluated"),
    "no rows": (None, ["--train-rows", "0"], "--train-rows takes a number from 1"),
    "card": (spoil_card, [], "README.md is no text file in UTF-8"),
    "plan": (spoil_plan, [], "plan.json holds no JSON object: restore the file"),
    "data": (None, ["--data", "nowhere"], "--data nowhere is not a folder"),
    "task file": (None, ["--task-file", "absent.toml"], "absent.toml: not a readable TOML file"),
    "weights": (break_layer, [], "lacks bert.encoder.layer.0.output.dense.weight and 0 more weights"),
    "tokenizer": (break_tokenizer, [], "tokenizer"),
    "unfinished": (unfinish, [], "the run is not finished: issue its command again"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_with_nothing_written(
    case: str, run_folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, options, message = REFUSED[case]
    if damage is not None:
        damage(run_folder)
    before = snapshot(run_folder)
    assert command_line.main([str(run_folder), "--data", str(data), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert snapshot(run_folder) == before


def test_a_bad_row_is_refused_before_anything_is_written(run_folder: Path, data: Path) -> None:
    with (data / "SST-2" / "dev.tsv").open("a") as file:
        file.write("A row\tmaybe\n")
    before = snapshot(run_folder)
    with pytest.raises(ValueError, match=r"dev\.tsv:42: label 'maybe' is neither one of negative, positive"):
        evaluate(run_folder, data=data)
    assert snapshot(run_folder) == before


def test_weights_that_are_not_finite_are_named(run_folder: Path, data: Path) -> None:
    weights = load_file(run_folder / "final" / "model.safetensors")
    weights["encoder.layer.0.output.dense.weight"].fill_(float("nan"))
    save_file(weights, run_folder / "final" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="SST-2, seed 0: the loss is nan; are the model's weights finite"):
        evaluate(run_folder, data=data, seeds=1)


WITHOUT_SKLEARN = """
import sys
for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
    del sys.modules[name]
sys.modules["sklearn"] = None
from fastkd.glue.__main__ import main
sys.exit(main())
"""


def test_the_packages_of_the_extra_are_asked_for(run_folder: Path, data: Path, tmp_path: Path) -> None:
    """A process in which scikit-learn cannot be imported."""
    script = tmp_path / "without.py"
    script.write_text(WITHOUT_SKLEARN)
    found = processes.run(str(script), run_folder, "--data", data)
    assert found.returncode == 2
    assert found.stderr == 'error: GLUE needs scikit-learn: pip install "fastkd[glue]"\n'


def test_other_weights_or_rows_are_scored_anew(run_folder: Path, data: Path) -> None:
    log: list[str] = []

    def reused() -> str:
        evaluate(run_folder, data=data, seeds=1, log=log.append)
        return [line for line in log if "finished before" in line][-1].split(", ")[1].split(" of")[0]

    assert reused() == "0" and reused() == "1"
    weights = load_file(run_folder / "final" / "model.safetensors")
    weights["encoder.layer.0.output.dense.bias"] += 1
    save_file(weights, run_folder / "final" / "model.safetensors", metadata={"format": "pt"})
    assert reused() == "0" and reused() == "1"
    with (data / "SST-2" / "train.tsv").open("a") as file:
        file.write("one more\t1\n")
    assert reused() == "0" and reused() == "1"


def test_scores_beside_the_model_are_no_part_of_it(student: Path, data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(student, model)
    evaluate(model, data=data, seeds=1, output_dir=model, log=lambda line: None)
    said: list[str] = []
    evaluate(model, data=data, seeds=1, output_dir=model, log=said.append)
    assert "1 of them finished before" in said.pop(1)
    for result in (model / "glue").iterdir():
        result.write_text("[]")  # valid JSON, but no result
    evaluate(model, data=data, seeds=1, output_dir=model, log=said.append)
    assert any("0 of them finished before" in line for line in said)


def test_a_torn_ledger_line_is_cut_off(run_folder: Path, data: Path) -> None:
    with (run_folder / "ledger.jsonl").open("a") as ledger:
        ledger.write('{"event": "st')
    evaluate(run_folder, data=data, seeds=1, log=lambda line: None)
    assert [line["event"] for line in read_jsonl(run_folder / "ledger.jsonl")] == ["export", "glue"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_damaged_files_of_a_model_are_named(name: str, run_folder: Path, data: Path) -> None:
    (run_folder / "final" / name).write_text("{}")
    with pytest.raises(ValueError, match=r"final (cannot be loaded|has no usable tokenizer) \(\w+: "):
        evaluate(run_folder, data=data, seeds=1, log=lambda line: None)


def test_a_file_that_changes_meanwhile_is_noticed(run_folder: Path, data: Path) -> None:
    def change(line: str) -> None:
        if "finished before" in line:
            write_sst2(data, train=97)

    with pytest.raises(ValueError, match=r"SST-2/train\.tsv has changed since the evaluation began"):
        evaluate(run_folder, data=data, seeds=1, log=change)


def test_predictions_that_were_not_asked_for_before_are_made(run_folder: Path, data: Path) -> None:
    evaluate(run_folder, data=data, seeds=1, log=lambda line: None)
    assert evaluate(run_folder, data=data, seeds=1, predict_test=True, log=lambda line: None)["submission"]
    finished = snapshot(run_folder / "glue")
    evaluate(run_folder, data=data, seeds=1, log=lambda line: None)
    assert snapshot(run_folder / "glue") == finished, "predictions are kept where they are not asked for again"


def test_a_task_file_is_scored_beside_glue(student: Path, data: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "tone.toml").write_text(
        'name = "tone"\ntexts = ["said"]\nlabels = ["low", "mid", "high"]\nmetrics = ["macro_f1"]\n'
        'train = "train.csv"\ndev = "train.csv"\ntest = "test.csv"\n'
    )
    (own / "train.csv").write_text("said,label\n" + "hum,low\nah,mid\neek,high\n" * 8)
    (own / "test.csv").write_text("said\nhum\neek\n")
    result = evaluate(
        student, ["sst2"], data, seeds=1, output_dir=tmp_path / "out", task_files=[own / "tone.toml"], train_rows=16,
        predict_test=True, log=lambda line: None,
    )  # fmt: skip
    assert {name: list(found) for name, found in result["scores"].items()} == {
        "sst2": ["accuracy"],
        "tone": ["macro_f1"],
    }
    assert result["average"] is None
    assert "RTE" in result["missing"] and "SST-2" not in result["missing"]
    answers = (tmp_path / "out" / "submission" / "tone.tsv").read_text().split()
    assert answers[:3] == ["index", "prediction", "0"] and set(answers[3::2]) <= {"low", "mid", "high"}
