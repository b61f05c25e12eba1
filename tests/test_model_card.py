"""The model card: its numbers are the run folder's, and the hub reads its metadata."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from made_run import PLAN, make_run

from fastkd.reports.model_card import model_card


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
    assert results == {"loss": 2.9, "accuracy": 0.231}
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


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_model_card_says_which_tokens_the_cosine_takes(tmp_path: Path, weight: float) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "config.toml").write_text(f'method = "logit_kd"\n[method_options]\ncosine_weight = {weight}\n')
    assert ("that of the masked positions" in model_card(folder, mlm_head=True)) == (weight > 0)


def test_the_model_card_of_scratch_training_names_no_teacher(tmp_path: Path) -> None:
    content = model_card(make_run(tmp_path / "run", plan=PLAN | {"method": "mlm", "teacher": None}), mlm_head=True)
    assert (
        ModelCard(content).data.tags == ["fastkd", "mlm", "sentence-transformers"] and "| teacher | none |" in content
    )
    assert "energy" not in content
