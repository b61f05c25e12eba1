"""results.json, RESULTS.md and report.html of a comparison: means, spreads and every number."""

import json
import math
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from made_run import make_run
from report_page import Page

from fastkd.comparison.report import build_comparison
from fastkd.comparison.results import read_results, row_from_run, write_results
from fastkd.reports import forest, plots

pytestmark = pytest.mark.usefixtures("in_full")
FLOPS = {"mlm": (2e14, 0.0, 1e12), "minilmv2": (1.5e14, 1.2e14, 4e12)}
SCORES = {"mlm": (54.0, 55.5), "minilmv2": (58.25, 58.75)}


def row(method: str, seed: int, **changes: Any) -> dict[str, Any]:
    student, teacher, loss = FLOPS[method]
    seconds = 899.5 - 0.25 * seed
    fields = {
        "method": method, "seed": seed, "match": "gpu-seconds", "budget": 900.0, "status": "ok",
        "charged_s": seconds, "flops": {"student": student, "teacher": teacher, "loss": loss},
        "tokens": 8_000_000 + seed, "epochs": 8.125, "tokens_per_s": 8_900.0 + seed, "mfu": None, "joules": None,
        "teacher_share": 0.25 if teacher else 0.0,
        "phase_s": {"data": 4.0, "teacher": 0.25 * seconds if teacher else 0.0, "student": 200.0, "backward": 400.0},
        "scores": {"average": SCORES[method][seed], "rte": 50.0 + seed, "sst2": 80.0 - seed, "mrpc": 70.0},
        "curves": [(100.0 * i, 1e13 * i, 1_000_000 * i, 5.0 - 0.3 * i) for i in range(1, 9)],
        "confounds": ["inputs: plain text"] if teacher else [],
    }  # fmt: skip
    return fields | changes


def make(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    environment = {"device": "A processor", "packages": {"torch": "2"}}
    command = ["python", "-m", "fastkd.compare", "--methods", "mlm,minilmv2"]
    known = {"match": "gpu-seconds", "ancestors": ["some/teacher"], "environment": environment, "command": command}
    write_results(folder, rows, **known, **options)
    return build_comparison(folder)


def four_rows() -> list[dict[str, Any]]:
    return [row(method, seed) for method in FLOPS for seed in (0, 1)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    references = [{"label": "teacher", "scores": {"average": 70.125}}]
    make(folder, four_rows(), references=references, headline=["average", "rte"])
    return folder


def table(text: str, title: str) -> list[list[str]]:
    """The rows of the first Markdown table after a heading."""
    section = text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# ---- numbers ------------------------------------------------------------------------------------------------


def test_results_json_holds_what_others_read(built: Path) -> None:
    content = json.loads((built / "results.json").read_text())
    assert content["match"] == "gpu-seconds" and content["environment"]["device"] == "A processor"
    assert len(content["rows"]) == 4
    first = content["rows"][0]
    needed = {"method", "seed", "charged_s", "flops", "tokens", "tokens_per_s", "mfu", "joules", "scores", "confounds"}
    assert needed <= set(first)
    assert first["flops"] == 2e14 + 1e12 == sum(first["flops_by_part"].values())
    assert first["label"] == "mlm" and first["mfu"] is None


def test_the_main_table_holds_means_and_sample_deviations(built: Path) -> None:
    numbers = Page(built / "report.html").numbers
    for method in FLOPS:
        key = f"{method}/gpu-seconds/900.0"
        assert numbers[f"{key}.charged_s"] == mean([899.5, 899.25])
        assert numbers[f"{key}.flops"] == sum(FLOPS[method])
        assert numbers[f"{key}.tokens_per_s"] == 8_900.5
        assert numbers[f"{key}.score.average"] == mean(SCORES[method])
        assert f"{key}.mfu" not in numbers and f"{key}.joules" not in numbers
    assert numbers["teacher.score.average"] == 70.125
    rows = table((built / "RESULTS.md").read_text(), "What each method made of its budget")
    assert rows[0] == ["method", "seeds", "GPU-seconds", "FLOPs", "tokens", "epochs", "tokens/s", "MFU", "joules",
                       "teacher's share", "average", "rte"]  # fmt: skip
    assert rows[2] == ["mlm", "2", "899.4", "2.010e+14", "8.000 M", "8.12", "8,900", "–", "–", "0.0%",
                       f"54.75 ± {stdev(SCORES['mlm']):.2f}", "50.50 ± 0.71"]  # fmt: skip
    assert rows[4][0] == "teacher" and rows[4][-2:] == ["70.12", "–"]


def test_every_row_stands_as_it_ran(built: Path) -> None:
    numbers = Page(built / "report.html").numbers
    for place, source in enumerate(four_rows()):
        assert numbers[f"row.{place}.charged_s"] == source["charged_s"]
        assert numbers[f"row.{place}.flops"] == sum(source["flops"].values())
        assert numbers[f"row.{place}.tokens"] == source["tokens"]
        assert numbers[f"row.{place}.teacher_share"] == source["teacher_share"]
        assert numbers[f"row.{place}.score.average"] == source["scores"]["average"]


def test_differences_to_scratch_are_of_the_same_seed(built: Path) -> None:
    own = [a - b for a, b in zip(SCORES["minilmv2"], SCORES["mlm"], strict=True)]
    numbers = Page(built / "report.html").numbers
    assert numbers["minilmv2/gpu-seconds/900.0.difference.scratch.average"] == mean(own)
    text = (built / "RESULTS.md").read_text()
    rows = table(text.replace("### rte", "## rte"), "Which differences hold")
    half = 12.7062 * stdev(own) / 2**0.5  # Student's t with one degree of freedom
    assert [line[0] for line in rows[2:]] == ["mlm", "minilmv2"]
    assert rows[3][2:5] == [f"+{mean(own):.2f}", f"{mean(own) - half:.2f} to +{mean(own) + half:.2f}", "0.96"]
    assert "| minilmv2 | 2 | 0.00 | 0.00 |" in text  # rte: both seeds differ by the same, which tells nothing


def test_a_missing_seed_of_scratch_leaves_the_pairs_that_are_there(tmp_path: Path) -> None:
    rows = [row("mlm", 1), row("minilmv2", 0), row("minilmv2", 1)]
    numbers = Page(make(tmp_path, rows)).numbers
    assert numbers["minilmv2/gpu-seconds/900.0.difference.scratch.average"] == 58.75 - 55.5


def test_seconds_by_phase_are_means_over_seeds(built: Path) -> None:
    numbers = Page(built / "report.html").numbers
    assert numbers["minilmv2/gpu-seconds/900.0.phase.teacher"] == 0.25 * 899.375
    assert numbers["mlm/gpu-seconds/900.0.phase.student"] == 200.0


def test_rows_agree_in_what_was_matched(built: Path, tmp_path: Path) -> None:
    assert "4 rows between 899.2 and 899.5 GPU-seconds, 0.03% apart" in (built / "RESULTS.md").read_text()
    make(tmp_path, [*four_rows(), row("mlm", 0, match="flops"), row("minilmv2", 0, match="flops")])
    text = (tmp_path / "RESULTS.md").read_text()
    assert "Matched on gpu-seconds: 4 rows" in text
    assert "Matched on flops: 2 rows between 2.01e+14 and 2.74e+14 FLOP, 26.64% apart" in text


def test_a_row_is_what_its_runs_ledger_says(tmp_path: Path) -> None:
    found = row_from_run(make_run(tmp_path / "run", joules=True))
    seconds = [1.0 + 0.003 * (step % 7) for step in range(1, 58)]
    assert found["method"] == "minilmv2" and found["seed"] == 3 and found["status"] == "ok"
    assert found["charged_s"] == pytest.approx(sum(seconds) + 0.64) == pytest.approx(sum(found["phase_s"].values()))
    assert found["flops"]["teacher"] == 82_000_000_003 * 57 and found["tokens"] == 4_091 * 57
    assert found["tokens_per_s"] == pytest.approx(4_091 * 57 / sum(seconds))
    assert found["mfu"] == pytest.approx(sum(found["flops"].values()) / sum(seconds) / 1e12)
    assert found["joules"] == 310.5 * 57 and found["teacher_share"] == pytest.approx(0.2)
    assert found["curves"][-1][:3] == (pytest.approx(sum(seconds) + 0.64), sum(found["flops"].values()), 4_091 * 57)
    page = Page(make(tmp_path / "compared", [found | {"scores": {"average": 60.0}}]))
    assert page.numbers["row.0.charged_s"] == found["charged_s"]


def test_a_run_without_a_step_is_no_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no step yet"):
        row_from_run(tmp_path)


# ---- what goes wrong ----------------------------------------------------------------------------------------


def test_a_failed_row_is_named_and_leaves_the_means_alone(tmp_path: Path) -> None:
    failed = {"method": "mlm", "seed": 1, "budget": 900.0, "status": "failed", "error": "out of memory | here\nthere"}
    page = Page(make(tmp_path, [row("mlm", 0), failed, row("minilmv2", 0)]))
    assert page.numbers["mlm/gpu-seconds/900.0.score.average"] == 54.0
    text = (tmp_path / "RESULTS.md").read_text()
    assert table(text, "Failed rows")[2] == ["mlm", "1", "out of memory \\| here there"]
    assert table(text, "What each method made of its budget")[2][:2] == ["mlm", "1, 1 failed"]
    assert "54.00 |" in text  # one seed left: no deviation


def test_rows_without_scores_or_curves_leave_a_page(tmp_path: Path) -> None:
    bare = [{"method": "mlm", "seed": 0, "status": "failed", "error": "stopped"}]
    assert "No scores yet." in Page(make(tmp_path / "bare", bare)).text
    assert "No scores yet." in Page(make(tmp_path / "none", [])).text
    unscored = [row("mlm", 0, scores={}, curves=[], phase_s={})]
    assert "No scores yet." in Page(make(tmp_path / "unscored", unscored)).text


def test_a_score_that_is_not_finite_is_a_blank(tmp_path: Path) -> None:
    rows = [row("mlm", 0, scores={"average": math.nan}), row("minilmv2", 0)]
    page = Page(make(tmp_path, rows))
    assert "mlm/gpu-seconds/900.0.score.average" not in page.numbers
    assert "NaN" not in (tmp_path / "results.json").read_text()


def test_without_results_there_is_an_error_that_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fastkd\.compare"):
        build_comparison(tmp_path)


# ---- the page -----------------------------------------------------------------------------------------------


def test_rebuilding_from_results_json_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    names = ["report.html", "RESULTS.md", *(f"plots/{path.name}" for path in sorted((built / "plots").iterdir()))]
    (tmp_path / "results.json").write_bytes((built / "results.json").read_bytes())
    build_comparison(tmp_path)
    for name in names:
        assert (tmp_path / name).read_bytes() == (built / name).read_bytes(), name


def test_a_page_needs_nothing_from_elsewhere(built: Path) -> None:
    page = Page(built / "report.html")
    assert not page.tags & {"script", "link", "img", "iframe"} and page.fetched == []
    assert len(page.ids) == len(set(page.ids)) > 0


def test_results_md_shows_the_plots_beside_it(built: Path) -> None:
    shown = re.findall(r"!\[[^]]*\]\((plots/[^)]+)\)", (built / "RESULTS.md").read_text())
    assert sorted(shown) == sorted(f"plots/{path.name}" for path in (built / "plots").iterdir())
    # Two scores in two units and as differences, two stacked bars, two methods' losses.
    assert len(shown) == 2 * 2 + 2 + 2 + 2


def test_plots_of_an_earlier_build_do_not_stay(tmp_path: Path) -> None:
    make(tmp_path, four_rows(), headline=["average", "rte"])
    make(tmp_path, four_rows(), headline=["average"])
    assert not (tmp_path / "plots" / "score-1-flops.svg").exists()


def test_confounds_are_listed_once_for_each_label(built: Path, tmp_path: Path) -> None:
    text = (built / "RESULTS.md").read_text()
    assert table(text, "What else differs between the rows")[2:] == [["minilmv2", "inputs: plain text"]]
    make(tmp_path, [row("mlm", 0)])
    assert "Nothing: the rows differ in their method alone." in (tmp_path / "RESULTS.md").read_text()


def test_several_budgets_make_a_curve_and_several_matches_a_column(tmp_path: Path) -> None:
    rows = [
        row(method, 0, budget=900.0 * factor, charged_s=899.0 * factor, match=match)
        for match in ("gpu-seconds", "flops") for factor in (1, 4, 16) for method in FLOPS
    ]  # fmt: skip
    make(tmp_path, rows)
    head = table((tmp_path / "RESULTS.md").read_text(), "What each method made of its budget")[0]
    assert head[:4] == ["method", "match", "budget", "seeds"]
    assert len(read_results(tmp_path).arms) == 12


def test_all_scores_have_their_table_where_the_headline_leaves_some_out(built: Path, tmp_path: Path) -> None:
    assert Page(built / "report.html").numbers["all/mlm/gpu-seconds/900.0.score.sst2"] == 79.5
    make(tmp_path, [row("mlm", 0, scores={"average": 50.0})])
    assert "All scores" not in (tmp_path / "report.html").read_text()


def test_the_quickstart_teacher_is_told(tmp_path: Path) -> None:
    for ancestors, told in ((["larger", "quickstart"], True), (["google-bert/bert-base-uncased"], False), ([], False)):
        write_results(tmp_path, four_rows(), match="gpu-seconds", ancestors=ancestors, environment={}, command=["x"])
        assert ("NLI and paraphrase" in build_comparison(tmp_path).read_text()) == told
        assert ("NLI and paraphrase" in (tmp_path / "RESULTS.md").read_text()) == told


def test_a_wide_interval_is_cut_and_does_not_hide_the_others() -> None:
    rows = [forest.Estimate("narrow", 2.0, 0.5, True), forest.Estimate("wide", 1.0, 90.0, False)]
    low, high = forest._limits(rows)
    assert low == pytest.approx(-4.32) and high == pytest.approx(4.32)  # twice the largest difference, and a margin
    assert forest._limits(rows[:1])[0] == pytest.approx(-0.1), "0 is on the axis"
    unknown = [forest.Estimate("equal", 0.0, None, False)]
    assert forest._limits(unknown)[0] < 0 < forest._limits(unknown)[1]
    drawn = forest.forest("d", rows, title="score", x_label="less scratch")
    assert drawn == forest.forest("d", rows, title="score", x_label="less scratch") and drawn.startswith("<svg")


def test_a_legend_is_as_wide_as_its_plot_and_no_two_rows_look_alike() -> None:
    assert plots._legend_columns(["mlm", "tinybert"], 4.7) == 3
    assert plots._legend_columns(["mlm", "minilmv2:0.3>mlm +init-from-teacher"], 4.7) == 1
    assert len({(colour, marker) for colour, _, marker in plots.LINE_STYLES}) == len(plots.LINE_STYLES) == 12
