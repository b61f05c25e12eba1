"""Scores over seeds and configurations: the best of a grid, averages, submissions, the model card's section."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fastkd.glue.finetune import FineTuning
from fastkd.glue.protocol import PAPER
from fastkd.glue.scores import choose, markdown, to_json, update_card
from fastkd.glue.submission import write_submission
from fastkd.glue.tasks import TASKS


def finished(**values: list[float]) -> list[tuple[FineTuning, dict[str, Any]]]:
    """Finished fine-tunings of given metrics: task_lr_batch=[score of seed 0, …]."""
    found = []
    for key, scores in values.items():
        name, rate, size = key.split("_")
        for seed, value in enumerate(scores):
            task = TASKS[name]
            one = FineTuning(Path(), task, None, None, PAPER, float(rate), int(size), seed, rows={"train": 9})
            metrics = {metric: value + 2 * i for i, metric in enumerate(task.metrics)}
            found.append((one, {"metrics": metrics, "seconds": 1.0}))
    return found


def test_the_grids_best_mean_counts_not_its_luckiest_seed() -> None:
    scores = choose(finished(**{"rte_1e-5_16": [50.0, 70.0], "rte_3e-5_16": [62.0, 64.0]}))
    assert scores["rte"].metrics["accuracy"] == {
        "mean": 63.0, "std": pytest.approx(2**0.5), "seeds": [0, 1], "values": [62.0, 64.0],
    }  # fmt: skip
    assert scores["rte"].best == 1
    assert "Best of the grid: RTE 3e-05, batch 16" in markdown(scores, PAPER) and "optimistic" in markdown(
        scores, PAPER
    )


def test_the_best_seed_is_submitted(tmp_path: Path) -> None:
    pairs = finished(**{"rte_1e-5_16": [50.0, 70.0], "stsb_1e-5_16": [80.0, 60.0]})
    found = []
    for one, result in pairs:
        answers = [one.seed, 1] if one.task.name == "rte" else [5.25 + one.seed, -0.5]
        ready = dataclasses.replace(one, test=("test",))
        found.append((ready, result | {"predictions": {"test": answers}}))
    written = write_submission(choose(found), tmp_path)
    assert [path.name for path in written] == ["RTE.tsv", "STS-B.tsv"]
    assert written[0].read_text() == "index\tprediction\n0\tnot_entailment\n1\tnot_entailment\n"
    assert written[1].read_text() == "index\tprediction\n0\t5.000\n1\t0.000\n"


def test_dtypes_that_differ_are_told() -> None:
    pairs = finished(**{"rte_1e-5_16": [50.0, 70.0]})
    found = [
        (one, result | {"dtype": dtype}) for (one, result), dtype in zip(pairs, ("float32", "bfloat16"), strict=True)
    ]
    assert "ran in bfloat16 and float32" in markdown(choose(found), PAPER)
    assert "ran in" not in markdown(choose(found[:1]), PAPER)


def test_an_average_takes_all_tasks_or_none() -> None:
    complete = {f"{name}_1e-5_16": [60.0, 70.0] for name in PAPER.tasks}
    scores = choose(finished(**complete))
    # MRPC and QQP have a second metric, two points above the first: their score is the mean of both.
    assert to_json(scores, PAPER)["average"]["score"]["values"] == pytest.approx([60 + 2 / 7, 70 + 2 / 7])
    assert "| average | 7 tasks | 65.3 ± 7.1 |" in markdown(scores, PAPER)
    del complete["qnli_1e-5_16"]
    scores = choose(finished(**complete))
    assert "average" not in to_json(scores, PAPER)
    assert "| average" not in markdown(scores, PAPER) and "No average: QNLI missing" in markdown(scores, PAPER)


def test_anchors_stand_beside_the_scores() -> None:
    table = markdown(choose(finished(**{"sst2_1e-5_16": [91.0], "mrpc_1e-5_16": [84.0]})), PAPER)
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
