"""The model card: its numbers are the run folder's, and the hub reads its metadata."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from made_run import PLAN, make_run
from markdown_it import MarkdownIt

from fastkd.reports import plots
from fastkd.reports.model_card import model_card
from fastkd.reports.page import fenced
from fastkd.reports.run_report import build_report
from fastkd.reports.tables import Table


@pytest.mark.parametrize("mlm_head", [True, False])
def test_the_model_card_is_one_the_hub_reads(tmp_path: Path, mlm_head: bool) -> None:
    content = model_card(make_run(tmp_path / "run", joules=True), mlm_head=mlm_head)
    card = ModelCard(content)
    assert card.data.license == "unknown" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == ("fill-mask" if mlm_head else "feature-extraction")
    assert card.data.tags == ["fastkd", "knowledge-distillation", "minilmv2", "sentence-transformers"]
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2", (
        "the packaged teacher, by its name on the hub"
    )
    results = {result.metric_type: result.metric_value for result in card.data.eval_results or []}
    assert results == {"loss": 3.1, "accuracy": 0.231}
    assert ("head was trained" in content) == mlm_head
    assert ("head was **not** trained" in content) != mlm_head
    for text in (
        "58.15 GPU-seconds",
        "233.2 k",
        "student 12.14 TFLOP",
        "17.70 kJ",
        "NLI and paraphrase",
    ):
        assert text in content
    table = [line for line in content.splitlines() if line.startswith("|")]
    assert all(line.count("|") == 3 for line in table)


def test_a_loss_that_is_no_cross_entropy_is_no_fill_mask_result(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    metrics = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(
        metrics.replace('"mlm_loss": 3.1', '"mlm_loss": null').replace("0.231", "null")
    )
    (result,) = ModelCard(model_card(folder, mlm_head=False)).data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("feature-extraction", "loss", 2.9)
    assert result.metric_name == "held-out loss of minilmv2"


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_model_card_says_which_tokens_the_cosine_takes(tmp_path: Path, weight: float) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "config.toml").write_text(f'method = "logit_kd"\n[method_options]\ncosine_weight = {weight}\n')
    assert ("that of the masked positions" in model_card(folder, mlm_head=True)) == (weight > 0)


def test_the_model_card_names_a_divergence_that_is_not_the_usual_one(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "config.toml").write_text('method = "logit_kd"\n[method_options]\ndivergence = "reverse_kl"\n')
    assert "Distilled by KL(student ‖ teacher) in place of KL(teacher ‖ student)." in model_card(folder, mlm_head=True)


def test_the_model_card_of_scratch_training_names_no_teacher(tmp_path: Path) -> None:
    content = model_card(make_run(tmp_path / "run", plan=PLAN | {"method": "mlm", "teacher": None}), mlm_head=True)
    assert (
        ModelCard(content).data.tags == ["fastkd", "mlm", "sentence-transformers"] and "| teacher | none |" in content
    )
    assert "energy" not in content


NASTY = "a<img src=x onerror='alert(1)'>|b`c`*d* _e_ [f](http://g) ~~h~~ \\ &amp; <!-- $i_{ \"j\": - k\n---\n```\nl"


def shown(markdown: str) -> tuple[str, list[list[str]]]:
    """Markdown as a hub shows it: the HTML, and the texts of a table's cells by row."""
    parser = MarkdownIt("commonmark").enable("table")
    cells: list[list[str]] = []
    for before, token in pairwise(parser.parse(markdown)):
        if token.type == "tr_open":
            cells.append([])
        elif before.type in ("th_open", "td_open"):
            inner = token.children or []
            assert {child.type for child in inner} <= {"text", "text_special"}, token.content
            cells[-1].append("".join(child.content for child in inner))
    return parser.render(markdown), cells


def test_names_in_a_card_are_text_whatever_they_hold(tmp_path: Path) -> None:
    plain = " ".join(NASTY.split())
    plan = PLAN | {"teacher": PLAN["teacher"] | {"source": NASTY}, "corpus": PLAN["corpus"] | {"sources": [NASTY]}}
    folder = make_run(tmp_path / NASTY.replace("/", ""), plan=plan)
    corpus = f"corpus = {json.dumps([NASTY])}\n"
    (folder / "config.toml").write_text(corpus + (folder / "config.toml").read_text())
    content = model_card(folder, mlm_head=True)
    card = ModelCard(content)
    assert card.data.model_name == folder.name and card.data.eval_results[0].dataset_name == f"held-out part of {NASTY}"
    html, rows = shown(card.text)
    values = {row[0]: row[1] for row in rows if len(row) == 2}
    assert "<img" not in html and "alert(1)" in html
    assert values["teacher"].startswith(f"{plain}, 6 layers") and values["corpus"].startswith(
        f"{plain}: 10,033 documents"
    )
    assert "<img" not in build_report(folder).read_text()


def test_names_in_a_table_of_results_are_text_whatever_they_hold() -> None:
    html, rows = shown(Table(("label", "score"), [(NASTY, "1"), ("a_b", "<2")]).markdown())
    assert "<img" not in html and rows == [["label", "score"], [" ".join(NASTY.split()), "1"], ["a_b", "<2"]]
    assert "<img" in shown(fenced(NASTY))[0].replace("&lt;", "<") and shown(fenced(NASTY))[0].startswith(
        "<pre><code>a&lt;img"
    )
    drawn = plots.curves("name", [plots.Line(NASTY, [0, 1], [0, 1])], title=NASTY, x_label=NASTY)
    assert "<img" not in drawn
