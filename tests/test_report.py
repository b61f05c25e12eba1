"""report.html: every number is the run folder's, and whatever is missing leaves a page."""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from made_run import PHASES, PLAN, event_line, make_run, step_line, write_lines
from report_page import Page

from fastkd.reports.descriptions import warning_of
from fastkd.reports.model_card import model_card
from fastkd.reports.run_report import build_report
from fastkd.reports.tables import Table, numeric
from fastkd.run_folder import read_run

pytestmark = pytest.mark.usefixtures("in_full")

# ---- numbers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(build_report(make_run(tmp_path_factory.mktemp("runs") / "finished", joules=True)))


@pytest.fixture(scope="module")
def ledger() -> dict[str, Any]:
    """Sums over the same run's lines, made here without the code under test."""
    seconds = [1.0 + 0.003 * (step % 7) for step in range(1, 58)]
    return {"seconds": sum(seconds), "last": step_line(57, sum(seconds) + 0.64, seconds[-1], 310.5 * 57)}


def test_seconds_are_the_ledgers(finished: Page, ledger: dict[str, Any]) -> None:
    numbers, seconds = finished.numbers, ledger["seconds"]
    assert numbers["phase.teacher"] == pytest.approx(0.2 * seconds)
    assert numbers["phase.backward"] == pytest.approx(0.42 * seconds)
    assert numbers["each.phase.student"] == pytest.approx(0.2 * seconds / 57 * 1e3)
    assert numbers["event.validation"] == 0.41 and numbers["event.checkpoint"] == 0.23
    assert numbers["free.validation"] == 0.5 and numbers["free.setup"] == 6.4 and numbers["free.export"] == 0.9
    assert numbers["charged_s"] == numbers["ledger.charged_s"] == pytest.approx(seconds + 0.64)
    assert numbers["accounted_s"] == pytest.approx(numbers["ledger.charged_s"])
    assert abs(numbers["unaccounted_s"]) < 1e-9
    pieces = [value for name, value in numbers.items() if name.startswith(("phase.", "event."))]
    assert sum(pieces) == pytest.approx(numbers["charged_s"])
    shares = [v for name, v in numbers.items() if name.startswith(("share.phase.", "share.event."))]
    assert sum(shares) == pytest.approx(1.0)


def test_arithmetic_and_energy_are_the_ledgers(finished: Page, ledger: dict[str, Any]) -> None:
    numbers, last = finished.numbers, ledger["last"]
    for part, value in last["flops"].items():
        assert numbers[f"flops.{part}"] == value
        assert numbers[f"flops_each.{part}"] == pytest.approx(value / last["tokens"]["real"])
        assert numbers[f"flops_rate.{part}"] == pytest.approx(value / ledger["seconds"])
    assert numbers["flops"] == numbers["flops.all"] == sum(last["flops"].values())
    assert numbers["joules"] == last["joules"]
    assert numbers["joules_per_token"] == pytest.approx(last["joules"] / last["tokens"]["real"])
    assert numbers["watts"] == pytest.approx(last["joules"] / ledger["seconds"])
    assert numbers["sm_clock_mhz"] == pytest.approx(1500 + (1 + 10 + 20 + 30 + 40 + 50) / 6)
    assert numbers["throttled.power cap"] == pytest.approx(1 / 6) and numbers["throttled.thermal"] == 0
    assert numbers["peak_memory_bytes"] == 10**9 + 50
    rate = sum(last["flops"].values()) / ledger["seconds"]
    assert numbers["matmul_share"] == pytest.approx(rate / 5e11)
    assert numbers["mfu"] == pytest.approx(rate / 1e12)  # the plan's 2.4e11 FLOP/s were 24% of the peak


def test_plan_stands_beside_what_happened(finished: Page, ledger: dict[str, Any]) -> None:
    numbers, last, seconds = finished.numbers, ledger["last"], ledger["seconds"]
    tokens = last["tokens"]["real"]
    happened = {"charged_s": seconds + 0.64, "steps": 57, "tokens": tokens, "epochs": last["epoch"],
                "tokens_per_s": tokens / seconds, "step_seconds": seconds / 57, "teacher_seconds_share": 0.2,
                "flops_per_token.student": last["flops"]["student"] / tokens}  # fmt: skip
    planned = {**PLAN, "charged_s": 72.0, "flops_per_token.student": 5.2e7}
    for name, value in happened.items():
        assert numbers[f"planned.{name}"] == planned[name]
        assert numbers[f"happened.{name}"] == pytest.approx(value)
        assert numbers[f"difference.{name}"] == pytest.approx(value / planned[name] - 1)


def test_validations_are_the_metrics(finished: Page) -> None:
    numbers = finished.numbers
    assert (numbers["validation.0.loss"], numbers["validation.30.loss"]) == (4.7, 2.9)
    assert numbers["validation.30.accuracy"] == 0.231 and "validation.0.accuracy" not in numbers
    assert numbers["validation.30.tokens"] == 4_091 * 30
    assert numbers["heldout_loss"] == 2.9


def test_the_points_of_the_plots_average_the_ledger(finished: Page) -> None:
    points = [int(m[1]) for name in finished.numbers if (m := re.fullmatch(r"point\.(\d+)\.loss", name))]
    assert points[-1] == 57 and len(points) >= 20
    first = 1
    for last in points:
        losses = [4.6 - step / 20 for step in range(first, last + 1)]
        assert finished.numbers[f"point.{last}.loss"] == pytest.approx(sum(losses) / len(losses))
        assert finished.numbers[f"point.{last}.low"] == min(losses)
        assert finished.numbers[f"point.{last}.high"] == max(losses)
        first = last + 1


def test_the_text_of_a_number_is_its_value(finished: Page) -> None:
    cells = re.findall(r'<data data-name="phase\.[a-z]+" value="([^"]+)">([^<]+)</data>', finished.text)
    assert len(cells) == len(PHASES)
    for value, text in cells:
        assert float(text.replace(",", "")) == pytest.approx(float(value), abs=0.005)


def test_two_devices_are_charged_twice(tmp_path: Path) -> None:
    numbers = Page(build_report(make_run(tmp_path / "two", devices=2))).numbers
    seconds = sum(1.0 + 0.003 * (step % 7) for step in range(1, 58))
    assert numbers["phase.teacher"] == pytest.approx(2 * 0.2 * seconds)
    assert numbers["accounted_s"] == pytest.approx(numbers["charged_s"])
    assert numbers["tokens_per_s"] == pytest.approx(4_091 * 57 / seconds)  # of both together
    assert numbers["happened.step_seconds"] == pytest.approx(seconds / 57)


def test_lost_steps_count_once_as_the_crash(tmp_path: Path) -> None:
    folder = tmp_path / "crashed"
    folder.mkdir()
    lines = [step_line(step, float(step)) for step in (1, 2, 3, 4)]
    lines += [event_line("crash", 2.0, 2, True, 4.0)]
    lines += [step_line(step, step + 2.0) for step in (3, 4, 5)]
    write_lines(folder / "ledger.jsonl", lines)
    numbers = Page(build_report(folder)).numbers
    assert numbers["happened.steps"] == 5 and numbers["event.crash"] == 2.0
    assert numbers["accounted_s"] == pytest.approx(numbers["charged_s"]) == pytest.approx(7.0)


def test_seconds_that_no_phase_holds_are_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "ledger.jsonl", [step_line(1, 1.0), step_line(2, 2.5)])
    numbers = Page(build_report(tmp_path)).numbers
    assert numbers["accounted_s"] == pytest.approx(2.0) and numbers["unaccounted_s"] == pytest.approx(0.5)


@pytest.mark.parametrize(("unit", "spent"), [("flops", 57 * 296_600_000_011), ("tokens", 57 * 4_091)])
def test_curves_run_over_the_governing_unit(tmp_path: Path, unit: str, spent: float) -> None:
    plan = PLAN | {"budget": {"unit": unit, "amount": spent * 60 / 57}}
    page = Page(build_report(make_run(tmp_path / unit, plan=plan)))
    assert page.numbers["point.57.spent"] == pytest.approx(spent, rel=0.02)
    assert "planned.charged_s" not in page.numbers
    assert {"flops": "TFLOP spent", "tokens": "k tokens spent"}[unit] in page.text


# ---- the page -----------------------------------------------------------------------------------------------


def test_rebuilding_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    before = build_report(folder).read_bytes()
    command = [
        sys.executable,
        "-c",
        f"from fastkd.reports.run_report import build_report; build_report({str(folder)!r})",
    ]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "1"})
    assert (folder / "report.html").read_bytes() == before
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(folder, moved)
    assert build_report(moved).read_bytes() == before
    assert sorted(p.name for p in folder.iterdir() if "report" in p.name) == ["report.html"]


def test_a_page_needs_nothing_from_elsewhere(finished: Page) -> None:
    assert not finished.tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert finished.fetched == []
    assert not re.search(r"@import|url\((?!#)", finished.text)
    assert len(finished.ids) == len(set(finished.ids)) > 0
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', finished.text))
    assert used and used <= set(finished.ids)


def test_a_page_says_what_it_must(finished: Page) -> None:
    for text in ("python -m fastkd.run --teacher &#39;a b&#39;", "fine-tuned on NLI and paraphrase pairs",
                 "pretraining is not included", "method_options.relation_heads", "packages.torch", "finished",
                 "3 layers, 384 wide, 12 heads, 17.25 M parameters", "22.57 M parameters, 5 layers run"):  # fmt: skip
        assert text in finished.text
    assert finished.text.count('<svg class="plot"') == 6


@pytest.mark.parametrize(
    "missing", ["ledger.jsonl", "metrics.jsonl", "plan.json", "config.toml", "environment.json", "final"]
)
def test_whatever_is_missing_leaves_a_page(tmp_path: Path, missing: str) -> None:
    folder = make_run(tmp_path / "run")
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = Page(build_report(folder))
    assert "Where the GPU-seconds went" in page.text
    assert ("not finished: 95.0% of the budget at step 57" in page.text) == (missing == "final")
    assert ("No step yet." in page.text) == (missing == "ledger.jsonl")
    assert ("No validation yet." in page.text) == (missing == "metrics.jsonl")


def test_an_empty_folder_leaves_a_page_and_no_folder_an_error(tmp_path: Path) -> None:
    assert "no step yet" in Page(build_report(tmp_path)).text
    with pytest.raises(ValueError, match="no run folder"):
        build_report(tmp_path / "nowhere")


def test_a_run_that_was_killed_leaves_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    shutil.rmtree(folder / "final")
    for name in ("ledger.jsonl", "metrics.jsonl"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-9])
    page = Page(build_report(folder))
    assert page.numbers["happened.steps"] == 57


def test_every_first_step_leaves_a_page(tmp_path: Path) -> None:
    write_lines(tmp_path / "ledger.jsonl", [step_line(1, 1.0) | {"loss": None}])
    page = Page(build_report(tmp_path))
    assert page.numbers["happened.steps"] == 1 and "point.1.loss" not in page.numbers


def test_energy_and_mfu_are_blank_where_they_are_not_known(tmp_path: Path) -> None:
    numbers = Page(build_report(make_run(tmp_path / "run"))).numbers
    assert not {"joules", "joules_per_token", "watts", "sm_clock_mhz", "throttled"} & set(numbers)
    no_peak = make_run(tmp_path / "no-peak", plan=PLAN | {"mfu": None})
    assert "mfu" not in Page(build_report(no_peak)).numbers


def test_the_teachers_note_is_shown_for_the_quickstart_teacher_alone(tmp_path: Path) -> None:
    made_from_it = PLAN | {"ancestors": ["runs/other", "quickstart"]}
    assert "paraphrase" in Page(build_report(make_run(tmp_path / "other", plan=made_from_it))).text
    another = PLAN | {"ancestors": ["google-bert/bert-base-uncased"]}
    assert "paraphrase" not in Page(build_report(make_run(tmp_path / "bert", plan=another))).text


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (4.7, ""),
        (4.8, "was 4.700 at the start and is 4.800 now: give a smaller --lr than 0.0006"),
        (None, "and is not finite now: give a smaller --lr than 0.0006"),
    ],
)
def test_a_held_out_loss_above_its_start_is_warned_of(end: float | None, words: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as metrics:
        line = {"event": "validation", "step": 57, "progress": 1.0, "charged_s": 58.0, "tokens": 233_187, "loss": end}
        metrics.write(json.dumps(line | {"accuracy": None}) + "\n")
    warning = warning_of(read_run(folder))
    assert warning.endswith(words) and bool(warning) == bool(words)
    for text in (build_report(folder).read_text(), model_card(folder, mlm_head=True)):
        assert warning in text and ("Warning" in text) == bool(words)


def test_a_phase_nobody_foresaw_is_shown(tmp_path: Path) -> None:
    line = step_line(1, 2.0)
    line["phase_s"]["rewinding"] = 1.0
    write_lines(tmp_path / "ledger.jsonl", [line, event_line("fetch", 0.5, 1, True, 2.5)])
    numbers = Page(build_report(tmp_path)).numbers
    assert numbers["phase.rewinding"] == 1.0 and numbers["event.fetch"] == 0.5
    assert numbers["accounted_s"] == pytest.approx(2.5)


def test_names_are_escaped(tmp_path: Path) -> None:
    plan = PLAN | {"method": "<script>alert(1)</script>", "preset_reason": 'a"b<c>&'}
    page = Page(build_report(make_run(tmp_path / "a&b", plan=plan)))
    assert "script" not in page.tags and "&lt;script&gt;" in page.text and "a&amp;b" in page.text


def test_a_long_run_is_drawn_with_few_points(tmp_path: Path) -> None:
    write_lines(tmp_path / "ledger.jsonl", [step_line(step, float(step)) for step in range(1, 3001)])
    bins = read_run(tmp_path).bins()
    assert len(bins) <= 120 and bins[0].steps[0] == 1 and bins[-1].steps[1] == 3000
    assert all(before.steps[1] + 1 == after.steps[0] for before, after in pairwise(bins))
    assert len(build_report(tmp_path).read_bytes()) < 600_000


# ---- tables -------------------------------------------------------------------------------------------------


def test_a_table_is_the_same_in_markdown() -> None:
    table = Table(("method", "loss"), [("a|b", numeric("x", 1.5)), ("c\nd", numeric("y", None))])
    assert table.markdown() == "| method | loss |\n| --- | ---: |\n| a\\|b | 1.500 |\n| c d | – |\n"


def test_a_rounded_residual_stream_is_told(tmp_path: Path) -> None:
    rounded = build_report(make_run(tmp_path / "rounded", plan=PLAN | {"residual": "bfloat16"}))
    plain = build_report(make_run(tmp_path / "plain", plan=PLAN | {"residual": "float32"}))
    assert "bfloat16 residual stream" in rounded.read_text() and "residual" not in plain.read_text()
