"""report.html and the model card: every number is the run folder's, and whatever is missing leaves a page."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from fastkd.reports.run_report import build_report, loss_warning, model_card
from fastkd.reports.tables import Table, numeric
from fastkd.run_folder import ancestors, made_from, read_run

PHASES = ("data", "teacher", "student", "loss", "backward", "optimizer", "communication", "other")
PLAN = {
    "device": "A processor, 2 cores", "devices": 1, "preset": "quickstart",
    "preset_reason": "no CUDA device is at hand",
    "method": "minilmv2",
    "student": {"layers": 3, "width": 384, "heads": 12, "vocabulary": 30522, "parameters": 17_248_506,
                "spec": "3L-384H-12A"},
    "teacher": {"layers": 6, "width": 384, "heads": 12, "vocabulary": 30522, "parameters": 22_565_376,
                "source": "quickstart", "layers_run": 5},
    "ancestors": ["quickstart"],
    "corpus": {"sources": ["quickstart"], "documents": 10_033, "unique_tokens": 1_134_022},
    "budget": {"unit": "gpu-seconds", "amount": 72.0}, "charge": "loop", "tokens_per_s": 3400.0, "step_seconds": 1.2,
    "steps": 60, "tokens": 240_000.0, "epochs": 0.21,
    "flops_per_token": {"student": 5.2e7, "teacher": 2.0e7, "loss": 4.0e5}, "teacher_share": 0.43,
    "teacher_seconds_share": 0.19, "flops_per_s": 2.4e11, "matmul_flops_per_s": 5e11, "mfu": 0.24, "lr": 6e-4,
    "batch_tokens": 4096, "micro_batch": 2048,
    "attention": "sdpa", "dtype": "bfloat16", "compile": False, "activation_bytes": 412_000_000,
}  # fmt: skip


def step_line(step: int, charged_s: float, seconds: float = 1.0, joules: float | None = None) -> dict[str, Any]:
    parts = (0.01, 0.2, 0.2, 0.08, 0.42, 0.05, 0.0, 0.04)
    return {
        "step": step, "progress": step / 60, "charged_s": charged_s,
        "phase_s": {name: part * seconds for name, part in zip(PHASES, parts, strict=True)},
        "flops": {"student": 213_000_000_001 * step, "teacher": 82_000_000_003 * step, "loss": 1_600_000_007 * step},
        "tokens": {"real": 4_091 * step, "predicted": 614 * step, "unique": min(4_091 * step, 1_134_022)},
        "epoch": 4_091 * step / 1_134_022, "joules": joules, "lr": 6e-4 * (1 - step / 60), "loss": 4.6 - step / 20,
    }  # fmt: skip


def event_line(event: str, seconds: float, step: int, charged: bool, charged_s: float) -> dict[str, Any]:
    return {"event": event, "seconds": seconds, "step": step, "charged": charged, "charged_s": charged_s}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(folder: Path, *, devices: int = 1, joules: bool = False, plan: dict[str, Any] | None = None) -> Path:
    """A finished run of 57 steps with two validations and a checkpoint between them."""
    folder.mkdir(parents=True)
    ledger = [event_line("setup", 6.4, 0, False, 0.0), event_line("validation", 0.5, 0, False, 0.0)]
    metrics = [{"event": "validation", "step": 0, "progress": 0.0, "charged_s": 0.0, "tokens": 0, "loss": 4.7,
                "accuracy": None}]  # fmt: skip
    charged = 0.0
    for step in range(1, 58):
        seconds = 1.0 + 0.003 * (step % 7)
        charged += seconds * devices
        ledger.append(step_line(step, charged, seconds, 310.5 * step if joules else None))
        if step == 1 or step % 10 == 0:
            parts = {"query": 1.5 - step / 100, "key": 1.4 - step / 100, "value": 1.3 - step / 100}
            metrics.append({"step": step, "progress": step / 60, "charged_s": charged, "tokens": 4_091 * step,
                            "loss": 4.6 - step / 20, "parts": parts, "lr": 5e-4, "grad_norm": 1.0,
                            "tokens_per_s": 3412.3, "peak_memory_bytes": 10**9 + step,
                            "watts": 309.0 if joules else None, "sm_clock_mhz": 1500.0 + step if joules else None,
                            "throttle": ["power cap"] * (step == 10) if joules else None})  # fmt: skip
        if step == 30:
            for event, taken in (("validation", 0.41), ("checkpoint", 0.23)):
                charged += taken * devices
                ledger.append(event_line(event, taken, step, True, charged))
            metrics.append({"event": "validation", "step": step, "progress": 0.5, "charged_s": charged,
                            "tokens": 4_091 * step, "loss": 2.9, "accuracy": 0.231})  # fmt: skip
    ledger.append(event_line("export", 0.9, 57, False, charged))
    write_lines(folder / "ledger.jsonl", ledger)
    write_lines(folder / "metrics.jsonl", metrics)
    (folder / "plan.json").write_text(json.dumps((plan or PLAN) | {"devices": devices}))
    (folder / "config.toml").write_text('method = "minilmv2"\nseed = 3\n[method_options]\nrelation_heads = 48\n')
    environment = {"command": ["python", "-m", "fastkd.run", "--teacher", "a b"], "packages": {"torch": "2.13.0"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "final").mkdir()
    return folder


class Page(HTMLParser):
    """The named numbers of a page, the tags and the ids it uses, and what it would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text()
        self.numbers: dict[str, float] = {}
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.tags.add(tag)
        if tag == "data":
            assert values["data-name"] not in self.numbers
            self.numbers[values["data-name"]] = float(values["value"])
        if "id" in values:
            self.ids.append(values["id"])
        for key in ("src", "href", "xlink:href", "action", "poster", "data"):
            if not values.get(key, "#").startswith("#"):
                self.fetched.append(values[key])


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
    path.rmdir() if path.is_dir() else path.unlink()
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


def test_the_quickstart_teacher_is_known_by_any_name_and_by_its_weights(
    quickstart_teacher: Path, tmp_path: Path
) -> None:
    assert ancestors(None) == [] and ancestors("google-bert/bert-base-uncased") == ["google-bert/bert-base-uncased"]
    assert ancestors("quickstart") == ["quickstart"]
    hub = "sentence-transformers/all-MiniLM-L6-v2"
    assert ancestors(hub) == [hub, "quickstart"]
    (tmp_path / "copy").symlink_to(quickstart_teacher)
    copy = str(tmp_path / "copy")
    assert ancestors(copy) == [copy, "quickstart"]
    student = make_run(tmp_path / "student", plan=PLAN | {"ancestors": [copy, "quickstart"]})
    (tmp_path / "final").symlink_to(student)
    for place in (student, student / "final", tmp_path / "final"):
        assert ancestors(str(place)) == [str(place), copy, "quickstart"]
    older = {name: value for name, value in PLAN.items() if name != "ancestors"}
    assert made_from(older) == ["quickstart"] and made_from(older | {"teacher": None}) == []


def test_names_that_are_no_folders_have_nothing_to_do_with_a_plan_that_lies_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text("[1, 2]")
    for name in ("quickstart", "bert-base-uncased"):
        assert ancestors(name) == [name]


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
    warning = loss_warning(read_run(folder))
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


# ---- tables and the card ------------------------------------------------------------------------------------


def test_a_table_is_the_same_in_markdown() -> None:
    table = Table(("method", "loss"), [("a|b", numeric("x", 1.5)), ("c\nd", numeric("y", None))])
    assert table.markdown() == "| method | loss |\n| --- | ---: |\n| a\\|b | 1.500 |\n| c d | – |\n"


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


def test_a_rounded_residual_stream_is_told(tmp_path: Path) -> None:
    rounded = build_report(make_run(tmp_path / "rounded", plan=PLAN | {"residual": "bfloat16"}))
    plain = build_report(make_run(tmp_path / "plain", plan=PLAN | {"residual": "float32"}))
    assert "bfloat16 residual stream" in rounded.read_text() and "residual" not in plain.read_text()
