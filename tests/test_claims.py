"""Which differences of a comparison hold: the sentence that its report begins with, and the tables below."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_page import Page

from fastkd.comparison import claims
from fastkd.comparison.items import TITLES, items_of
from fastkd.comparison.report import build_comparison
from fastkd.comparison.results import lower_is_better, read_results, write_results
from fastkd.comparison.scores import MLM_ACCURACY, MLM_LOSS
from fastkd.probes.scores import packed, standard_error

pytestmark = pytest.mark.usefixtures("in_full")
N = 400
TITLE = TITLES["tokens"]


def row(label: str, seed: int, scores: dict[str, float], **more: Any) -> dict[str, Any]:
    return {"method": label, "seed": seed, "status": "ok", "budget": 900.0, "charged_s": 900.0, "scores": scores} | more


def right(label: str, seed: int, share: float, n: int = N) -> dict[str, Any]:
    """A row that is right on this share of the items, the easiest ones but for a few."""
    chance = np.random.default_rng([seed, len(label)])
    items = (np.arange(n) < share * n) ^ (chance.random(n) < 0.02)
    return row(label, seed, {"probe": 100 * float(items.mean())}, items={"probe": items.astype(int).tolist()})


def probed(right: list[int], groups: list[int]) -> dict[str, Any]:
    """A probes.json with one probe."""
    bits = packed(np.array(right, bool))
    scores = {"accuracy": float(np.mean(right)), "best": 1, "layers": [{}, {"right": bits}]}
    about = {"items": len(right), "items_sha256": "a", "groups": groups, "scores": {"model": scores}}
    return {"probes": {"tokens": about}}


def build(folder: Path, rows: list[dict[str, Any]], headline: tuple[str, ...] = ()) -> str:
    write_results(
        folder, rows, match="gpu-seconds", ancestors=[], environment={}, command=["x"], references=[], headline=headline
    )
    build_comparison(folder)
    return (folder / "RESULTS.md").read_text()


def lead(text: str) -> str:
    return text.splitlines()[2]


def test_the_report_begins_with_what_is_told_apart(tmp_path: Path) -> None:
    shares = {"mlm": 0.6, "minilmv2": 0.8, "tinybert": 0.605, "logit_kd": 0.4}
    rows = [right(label, seed, share) for label, share in shares.items() for seed in (0, 1, 2)]
    text = build(tmp_path, rows)
    first, second, rest = lead(text).split("; ")
    assert first.startswith("minilmv2 is better than scratch on probe, +") and ", P(better) over 0.999" in first
    assert second.startswith("logit_kd is worse than scratch on probe, -")
    assert rest == "nothing else is told apart from scratch."
    numbers = Page(tmp_path / "report.html").numbers
    results = read_results(tmp_path)
    mine, base = (next(arm for arm in results.arms if arm.label == label) for label in ("minilmv2", "mlm"))
    difference = mine.difference(base, "probe")
    assert (difference.seeds, difference.items) == (3, N)
    key = "minilmv2/gpu-seconds/900.0"
    assert numbers[f"{key}.difference.scratch.probe"] == difference.mean == pytest.approx(20, abs=3)
    assert numbers[f"{key}.half_width.scratch.probe"] == difference.half_width
    assert numbers[f"{key}.p_better.scratch.probe"] == difference.p_better
    assert f"{key}.difference.best.probe" not in numbers  # it is the best
    assert numbers["mlm/gpu-seconds/900.0.difference.best.probe"] == -difference.mean
    assert f"Intervals over {N} items and 3 seeds; comparisons: 3 with scratch, 3 with the best." in text
    assert "from scratch" in Page(tmp_path / "report.html").text.split("<h2>")[0]


def test_a_row_is_named_once_for_all_its_scores(tmp_path: Path) -> None:
    rows = [
        row(label, seed, {"x": level + seed, "y": 9 * level + seed * (2 if level else 1), "a loss": 5 + level + 0.1 * seed})
        for label, level in (("mlm", 0.0), ("a", 50.0)) for seed in (0, 1, 2)
    ]  # fmt: skip
    rows[4]["scores"] |= {"x": 51.01, "a loss": 55.101}
    better, worse, rest = lead(build(tmp_path, rows, ("x", "y", "a loss"))).split("; ")
    assert better.startswith("a is better than scratch on x, +") and ", and on y, +" in better
    assert (
        worse.startswith("a is worse than scratch on a loss, +") and rest == "nothing else is told apart from scratch."
    )


def test_one_seed_with_items_says_what_its_intervals_leave_out(tmp_path: Path) -> None:
    text = build(tmp_path, [right("mlm", 0, 0.6), right("minilmv2", 0, 0.8)])
    said = "one seed: differences between seeds are not in this interval"
    assert (
        lead(text).endswith(f"({said}).")
        and f"Intervals over {N} items and 1 seed; comparisons: 1 with scratch, 1 with the best; {said}." in text
    )


def test_one_seed_without_items_has_no_intervals(tmp_path: Path) -> None:
    text = build(tmp_path, [row("mlm", 0, {"x": 50.0}), row("minilmv2", 0, {"x": 60.0})])
    assert lead(text) == (
        "Nothing is told apart from scratch: one seed a row and no scores item by item, so chance cannot be told; "
        "give --seeds 2 or more."
    )
    assert "No intervals: " in text and "| minilmv2 | 1 | +10.00 |" in text and "95% interval" not in text


def test_two_seeds_of_a_loss_have_an_interval_and_lower_is_better(tmp_path: Path) -> None:
    losses = {"mlm": (5.70, 5.74), "minilmv2": (5.20, 5.25), "tinybert": (5.8, 5.6)}
    rows = [row(label, seed, {MLM_LOSS: loss}) for label, pair in losses.items() for seed, loss in enumerate(pair)]
    text = build(tmp_path, rows)
    assert lead(text).startswith(f"minilmv2 is better than scratch on {MLM_LOSS}, -0.495 ± 0.064 (95%), P(better) 0.99")
    assert "Intervals over 2 seeds; comparisons: 2 with scratch, 2 with the best." in text


def test_a_claim_holds_only_if_it_does_among_all_that_were_tried(tmp_path: Path) -> None:
    """Two-sided p 0.037: told apart where one row is compared with scratch, not where seven are."""
    mlm = [row("mlm", seed, {"x": 50.0 + seed}) for seed in (0, 1)]
    better = [row("minilmv2", 0, {"x": 54.0}), row("minilmv2", 1, {"x": 55.5})]
    others = [row(f"other{i}", seed, {"x": 50.0 + seed * (2 + i)}) for i in range(6) for seed in (0, 1)]
    assert "minilmv2 is better" in lead(build(tmp_path, [*mlm, *better]))
    text = build(tmp_path, [*mlm, *better, *others])
    assert (
        lead(text)
        == "Nothing is told apart from scratch: all 7 differences are within what chance does among so many (Holm's correction)."
    )


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([], "Nothing is told apart: no row has a score yet."),
        ([row("minilmv2", 0, {"x": 1.0})], "Nothing is told apart from scratch: no row is scratch training (mlm)."),
        ([row("mlm", 0, {"x": 1.0}), row("a", 1, {"x": 2.0})], "no other row shares a seed and a score with it."),
        (
            [row(label, seed, {"x": 1.0}) for label in ("mlm", "a") for seed in (0, 1)],
            "all seeds differ by the same amount, so chance",
        ),
    ],
)
def test_why_nothing_is_told_apart(rows: list[dict[str, Any]], why: str, tmp_path: Path) -> None:
    assert why in lead(build(tmp_path, rows))


def test_the_best_row_is_that_of_the_same_budget_and_direction(tmp_path: Path) -> None:
    rows = [row(label, 0, {"x": x, "a loss": 9 - x}, budget=budget) for label, budget, x in
            (("mlm", 1.0, 3.0), ("minilmv2", 1.0, 5.0), ("mlm", 2.0, 8.0), ("minilmv2", 2.0, 6.0))]  # fmt: skip
    text = build(tmp_path, rows)
    results = read_results(tmp_path)
    for score in ("x", "a loss"):
        best = [claims.base_of(results, arm, "best", score) for arm in results.arms]
        assert [(arm.label, arm.budget) for arm in best] == [("minilmv2", 1.0)] * 2 + [("mlm", 2.0)] * 2
    assert "| minilmv2 | 2 GPU-s | 1 | -2.000 | -2.000 |" in text and "| mlm | 1 GPU-s | 1 | scratch | -2.000 |" in text
    assert "| minilmv2 | 1 GPU-s | 1 | +2.000 | best |" in text


def test_which_scores_are_losses() -> None:
    assert lower_is_better(MLM_LOSS) and lower_is_better("perplexity")
    assert not any(map(lower_is_better, (MLM_ACCURACY, "RTE accuracy", "MRPC f1", "lossless", "")))


# ---- items ---------------------------------------------------------------------------------------------------


def test_a_row_may_name_the_file_of_its_items(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [right(label, seed, share) for label, share in (("mlm", 0.5), ("a", 0.7)) for seed in (0, 1)]
    for each in rows:
        each["scores"] = {TITLE: each["scores"]["probe"]}
        each["items"] = {TITLE: each["items"]["probe"]}
    shown = build(tmp_path / "inline", rows)
    for place, each in enumerate(rows):
        name = f"rows/{place}/probes.json"
        (tmp_path / "files" / name).parent.mkdir(parents=True)
        (tmp_path / "files" / name).write_text(json.dumps(probed(each["items"][TITLE], [1] * N)))
        each["items"] = name
    assert build(tmp_path / "files", rows) == shown and "items and 2 seeds" in shown
    assert '"items": "rows/3/probes.json"' in (tmp_path / "files" / "results.json").read_text()
    other = tmp_path / "files" / "rows/1/probes.json"
    other.write_text(other.read_text().replace('"items_sha256": "a"', '"items_sha256": "b"'))
    with caplog.at_level(logging.WARNING):
        build(tmp_path / "files", rows)
    assert f"the items of {TITLE!r} are not those of other rows: left out" in caplog.text


def test_a_text_is_what_is_drawn_not_its_items() -> None:
    right, sizes = np.array([1, 0, 0, 1, 1, 1]), [2, 1, 3]
    (shares,) = items_of(probed(right.tolist(), sizes)).values()
    assert shares.tolist() == pytest.approx([1 / 2, 1 / 3, 7 / 6]) and shares.mean() == pytest.approx(4 / 6)
    assert shares.std(ddof=1) / 3**0.5 == pytest.approx(standard_error(right, sizes)), "long texts are not good ones"


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ({"probe": [1, 0, 0, 0]}, "the mean of the items of 'probe' is not its score"),
        ({"probe": [1, None]}, "is not its score"),
        ({"probe": "right"}, "is not its score"),
        ({"another": [1, 0]}, ""),
        ("missing.json", "missing.json is not there"),
        ("damaged.json", "damaged.json is damaged"),
        ("../elsewhere.json", "is not in this folder"),
    ],
    ids=str,
)
def test_items_that_do_not_fit_are_left_out(items: Any, said: str, tmp_path: Path, caplog) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "damaged.json").write_text("[1")
    (tmp_path / "elsewhere.json").write_text('{"items": {"probe": [1, 0]}}')
    rows = [row("mlm", 0, {"probe": 50.0}, items={"probe": [1, 0]}), row("a", 0, {"probe": 50.0}, items=items)]
    with caplog.at_level(logging.WARNING):
        assert "No intervals" in build(folder, rows)
    assert said in caplog.text and bool(said) == bool(caplog.records)


def test_items_of_other_tests_are_no_pairs(tmp_path: Path) -> None:
    rows = [right("mlm", 0, 0.5), right("minilmv2", 0, 0.5, n=N + 2)]
    assert "No intervals" in build(tmp_path, rows)


def test_results_without_items_are_those_of_before(tmp_path: Path) -> None:
    build(tmp_path, [row("mlm", 0, {"x": 1.0}), row("a", 0, {"x": 2.0})])
    path = tmp_path / "results.json"
    content = json.loads(path.read_text())
    for each in content["rows"]:
        del each["items"]
    path.write_text(json.dumps(content))
    before = (tmp_path / "RESULTS.md").read_text()
    build_comparison(tmp_path)
    assert (tmp_path / "RESULTS.md").read_text() == before
