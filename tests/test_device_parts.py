"""Four parts of bench.device, run for real in tiny sizes: training, kernels, blocks, comparison; and what they stand on."""

import importlib
import json
import math
import os
import tempfile
from pathlib import Path

import pytest
import torch

from bench.contenders import relative_error
from bench.device import (
    alone,
    blocks,
    comparison,
    kernels,
    material,
    part,
    tile_search,
    timed_step,
    train_step,
    training,
    worker,
)
from bench.device.part import Context, Recorder, Row
from bench.device.timer import Timer
from bench.variants import Spec, fastkd_setup
from fastkd import methods
from fastkd.kernels import tiling
from fastkd.models import hf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("in_full")
PARTS = {"training": training, "kernels": kernels, "blocks": blocks, "comparison": comparison}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(autouse=True)
def own_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock of the test's own: what runs on this machine otherwise is not waited for."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def context(name: str, out: Path, scratch: Path) -> Context:
    return Context(name, str(out), DEVICE, 300.0, True, None, str(scratch))


def rows_of(name: str, out: Path, scratch: Path) -> list[Row]:
    """Run a part, show what it found, and return its rows."""
    module, given = PARTS[name], context(name, out, scratch)
    module.run(given, Recorder(given))
    rows = part.read(out / f"{name}.jsonl")
    module.draw(rows, out / f"{name}.png")
    assert (out / f"{name}.png").stat().st_size > 5000
    return rows


@pytest.mark.parametrize("name", PARTS)
def test_a_part_without_rows_has_a_table_and_a_picture(name: str, tmp_path: Path) -> None:
    assert PARTS[name].markdown([]).startswith("No ")
    PARTS[name].draw([], tmp_path / "none.png")
    assert (tmp_path / "none.png").exists()
    assert PARTS[name].SECONDS > 0


# ---- a worker -------------------------------------------------------------------------------------------------

HANGS = "import threading\nprint('noise')\nprint('{\"row\": 1}', flush=True)\nthreading.Event().wait()\n"
FAILS = "print('{\"row\": 1}', flush=True)\nraise ValueError('no such thing')\n"
NOISY = "print('{0: no JSON}')\nprint('{\"bad\": 1}')\nprint('{\"row\": 1}')\nprint('{' * 1_000_000)\nraise SystemExit('end')\n"


@pytest.mark.parametrize(
    ("source", "seconds", "reason"),
    [
        (HANGS, 5.0, "cut off after 5 s"),
        (FAILS, 60.0, "exit status 1: ValueError: no such thing"),
        (NOISY, 60.0, "exit status 1: end"),
    ],
    ids=["hangs", "fails", "makes noise"],
)
def test_rows_that_arrived_stay_however_a_worker_ends(source: str, seconds: float, reason: str, tmp_path: Path) -> None:
    (tmp_path / "ends_badly.py").write_text(source)
    found: list[Row] = []

    def take(row: Row) -> None:
        found.append({"row": row["row"]})

    assert worker.run(["ends_badly"], seconds, take, {"PYTHONPATH": str(tmp_path)}) == reason
    assert found == [{"row": 1}]


# ---- material -------------------------------------------------------------------------------------------------


def test_models_and_text_are_made_once(tmp_path: Path) -> None:
    given = context("training", tmp_path, tmp_path)
    like = material.like(given, tmp_path / "like")
    teacher = material.teacher("2L-48H-4A", tmp_path / "teacher", like)
    made = teacher.stat().st_mtime_ns
    loaded = hf.load(teacher)
    assert (loaded.config.num_layers, loaded.config.vocab_size, len(loaded.tokenizer)) == (2, 30_522, 30_522)
    assert loaded.encoder.head is not None
    (path,) = material.corpus(given, tmp_path / "text")
    ids = loaded.tokenizer(Path(path).read_text().split("\n\n")[0])["input_ids"]
    assert loaded.tokenizer.unk_token_id not in ids
    assert material.teacher("2L-48H-4A", teacher, like).stat().st_mtime_ns == made
    assert material.text(given) == "generated"


def test_a_bundle_gives_its_teacher_and_its_text(tmp_path: Path) -> None:
    given = Context("training", str(tmp_path), DEVICE, 60.0, True, str(tmp_path / "bundle"))
    assert material.like(given, tmp_path) == tmp_path / "bundle" / "teacher"
    assert material.corpus(given, tmp_path) == [str(tmp_path / "bundle" / "shards")]
    assert material.text(given) == "bundle"


# ---- whose turn it is -----------------------------------------------------------------------------------------


def test_what_is_timed_waits_until_nobody_else_computes() -> None:
    with alone.beside_others(), alone.beside_others():
        assert not alone.is_free()
        with alone.alone(0.0) as quiet:
            assert not quiet
    with alone.alone(60.0) as quiet:
        assert quiet and not alone.is_free()
    assert alone.is_free()


def test_a_worker_says_that_it_is_ready_and_is_told_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(
        "import sys\nfrom bench.device import worker\nworker.say_ready()\nworker.hand_over({'told': sys.stdin.readline()})\n"
    )
    found: list[Row] = []
    process = worker.Worker(["waits"], found.append, {"PYTHONPATH": f"{tmp_path}{os.pathsep}{worker.ROOT}"})
    assert process.is_ready(60.0) and found == []
    process.tell("go on")
    assert process.wait(60.0) == "" and found == [{"told": "go on\n"}]


# ---- training -------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_training(tmp_path: Path, scratch: Path) -> None:
    rows = rows_of("training", tmp_path, scratch)
    methods = {row["method"]: row for row in rows if row["what"] == "method"}
    assert list(methods) == ["mlm", "minilmv2"]
    for row in methods.values():
        assert len(row["steps_s"]) == row["steps"] == 2
        assert row["host_s"] > 0 and row["tokens_per_s"] > 0
        assert row["flops_a_token"] < row["flops_a_token_whole"]
        assert set(row["phases"]) >= {"data", "teacher", "student", "loss", "backward", "optimizer"}
        kernels_of_it = (tmp_path / f"training-{row['method']}-kernels.txt").read_text().splitlines()
        assert 2 < len(kernels_of_it) <= 1 + timed_step.TOP
    assert methods["mlm"]["phases"]["teacher"] == 0 < methods["minilmv2"]["phases"]["teacher"]
    (tax,) = (row for row in rows if row["what"] == "tax")
    assert tax["tax"] == methods["mlm"]["tokens_per_s"] / methods["minilmv2"]["tokens_per_s"]
    assert math.isclose(tax["over"], tax["tax"] / tax["bound"])
    (peer,) = (row for row in rows if row["what"] == "peer")
    assert (peer["peer"], peer["method"], peer["size"]) == ("paper", "mlm", "tiny")
    table = training.markdown(rows)
    assert "| tiny | mlm |" in table and "the paper's way" in table


def test_a_row_without_time_is_left_out_with_its_reason(tmp_path: Path, scratch: Path) -> None:
    given = Context("training", str(tmp_path), DEVICE, 3.0, False, None, str(scratch))
    training.run(given, Recorder(given))
    rows = part.read(tmp_path / "training.jsonl")
    assert len(rows) == len(training.entries(tiny=False)) and all("s were left" in row["skipped"] for row in rows)
    assert "* paper-6l, mlm: left out" in training.markdown(rows)


def test_rows_come_in_the_order_of_their_worth_and_one_that_fails_costs_no_other(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = training.entries(tiny=False)
    every = {(size, method) for size in ("paper-6l", "quickstart", "paper-12l") for method in methods.available()}
    assert {(entry.size, entry.method) for entry in entries if entry.variant == "fastkd"} == every
    assert {(entry.size, entry.method) for entry in entries[: len(methods.available())]} == {
        ("paper-6l", name) for name in methods.available()
    }
    assert [entry.method for entry in entries[:2]] == ["mlm", "minilmv2"] and len(set(entries)) == len(entries) == len(
        every
    ) + 5
    groups = training.groups(entries)
    assert [entry for group in groups for entry in group] == entries
    assert all(len(group) == 1 for group in groups if group[0].variant != "fastkd")
    assert {len(group) for group in groups} == {1, training.TOGETHER}
    monkeypatch.setattr(train_step, "files", lambda *_: (_ for _ in ()).throw(OSError("no disk")))
    given = Context("training", str(tmp_path), DEVICE, 300.0, False, None, str(scratch))
    training.run(given, Recorder(given))
    rows = part.read(tmp_path / "training.jsonl")
    assert len(rows) == len(entries) and all(row["error"] == "OSError: no disk" for row in rows)


def test_whole_flops_run_the_last_layer_at_every_row(scratch: Path, tmp_path: Path) -> None:
    teacher, corpus = train_step.files(context("training", tmp_path, scratch), "2L-48H-4A")
    spec = Spec("fastkd", "mlm", "1L-48H-4A", teacher, corpus, "cpu", "float32", 16, 16, warmup=1, steps=1)
    setup = fastkd_setup(spec)
    count, tokens, width, inner = setup.stream().tokens_of(0), 256, 48, 192
    rest = (tokens - count.predicted) * 4 * (width**2 + width * inner)
    attention = 4 * width * count.pairs - 4 * width * count.pairs * count.predicted // tokens
    run = sum(setup.step_cost(count).flops.values())
    assert timed_step.whole_flops(setup, count) - run == 3 * (rest + attention)


# ---- kernels --------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_kernels(tmp_path: Path, scratch: Path) -> None:
    rows = [row for row in rows_of("kernels", tmp_path, scratch) if row["what"] == "kernel"]
    ours = [row for row in rows if row["contender"] == "fastkd"]
    assert {row["kernel"] for row in ours} >= {"linear_kd", "relation_kl", "score_mse"}
    for row in ours:
        assert row["device_s"] > 0 and row["gradient_error"] < 1e-2 and "error" not in row
        same = [each["contender"] for each in rows if (each["kernel"], each["case"]) == (row["kernel"], row["case"])]
        assert "reference" in same
    measured = {row["contender"] for row in rows}
    assert {"orda-kernel", "liger fused_linear_jsd"} <= measured  # measured, or a row that says why not
    assert "| linear_kd | ce 768 in miniature bfloat16 | fastkd |" in kernels.markdown(rows)


def test_an_error_beside_an_expected_zero_is_the_result_itself() -> None:
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0])) == 0.75
    assert relative_error(torch.tensor([3e-9, 4e-9]), torch.zeros(2)) == pytest.approx(5e-9)
    assert relative_error(torch.ones(4), torch.full((4,), 1e-17)) == 2.0


@pytest.mark.gpu
def test_a_call_that_waits_is_timed_by_events_and_spoils_no_later_graph() -> None:
    timer, x = Timer("cuda"), torch.ones(1 << 20, device="cuda")
    assert timer.seconds(lambda: float(x.sum()), 3)[1] == "events"
    seconds, timing = timer.seconds(lambda: x.mul_(1.0), 3)
    assert timing == "graph" and 0 < seconds < 1e-3


# ---- blocks ---------------------------------------------------------------------------------------------------


# Triton 3.6's interpreter, of numbers that a loop is bounded by.
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
def test_blocks(tmp_path: Path, scratch: Path) -> None:
    rows = rows_of("blocks", tmp_path, scratch)
    tiles = [row for row in rows if row["what"] == "tile"]
    assert [row["now"] for row in tiles] == [True, False]
    assert all(row["ok"] and row["difference"] <= 1e-5 for row in tiles)
    (proposed,) = (row for row in rows if row["what"] == "proposed")
    assert proposed["device_s"] <= tile_search.LEAST_GAIN * min(row["device_s"] for row in tiles)
    assert proposed["row"] in blocks.markdown(rows)


def test_tiles_can_be_compiled_by_a_process_of_their_own() -> None:
    failed: list[Row] = []
    named = json.dumps({"device": DEVICE, "tiny": True, "pairs": [[0, 0], [0, 1]]})
    env = {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}
    assert worker.run(["bench.device.tile_search", named], 300, failed.append, env) == ""
    assert failed == []


def test_searches_name_kernels_of_the_table() -> None:
    for search in tile_search.searches(tiny=False):
        now, *others = search.tiles(90)
        assert now == tiling.tile(search.kernel, width=search.width, length=search.length, arch=90)
        assert others


@pytest.mark.parametrize(
    "search", tile_search.searches(tiny=False), ids=lambda search: f"{search.kernel} {search.case.name}"
)
def test_a_proposed_rule_can_be_pasted_and_gives_the_fastest_right_tile(
    search: tile_search.Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = search.tiles(90)
    timed = [
        {"tile": list(tile), "now": number == 0, "ok": number != 1 or len(tiles) == 2, "device_s": 1 / (2 + number % 4)}
        for number, tile in enumerate(tiles)
    ]
    wanted = min((row for row in timed if row["ok"]), key=lambda row: row["device_s"])
    found = tile_search.proposal(search, timed, 90)
    assert found is not None and found["tile"] == wanted["tile"]
    column = eval("{" + found["row"] + "}", {"Rule": tiling.Rule, "Tile": tiling.Tile})
    monkeypatch.setitem(tiling.TABLE, search.kernel, {**tiling.TABLE[search.kernel], **column})
    assert tiling.tile(search.kernel, width=search.width, length=search.length, arch=90) == tuple(wanted["tile"])


# ---- comparison -----------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_comparison_and_its_resumption(tmp_path: Path, scratch: Path) -> None:
    first = rows_of("comparison", tmp_path, scratch)
    lanes = [row for row in first if row["match"] == "flops"]
    assert sorted((row["label"], row["seed"]) for row in lanes) == [
        (name, n) for name in ("minilmv2", "mlm") for n in (0, 1)
    ]
    assert len({row["budget"] for row in lanes}) == 1 and all(0 < row["flops"] <= row["budget"] for row in lanes)
    assert all((row["mlm_loss"] is None) == (row["label"] == "minilmv2") for row in lanes)
    (by_time,) = (row for row in first if row["match"] == "gpu-seconds")
    assert by_time["charged_s"] <= 1.2 * by_time["budget_s"] and by_time["mlm_loss"] > 0
    lines = comparison.markdown(first).splitlines()
    (averaged,) = (line for line in lines if line.startswith("| mlm | flops |"))
    assert "| 2 |" in averaged and " ± " in averaged
    again = rows_of("comparison", tmp_path, scratch)
    taken = ("match", "label", "seed", "flops", "tokens", "charged_s", "loss_last")
    found, before = (sorted([row[name] for name in taken] for row in each) for each in (again, first))
    assert found == before


def test_modules_of_parts_need_no_gpu_to_be_shown() -> None:
    for name in PARTS:
        assert importlib.import_module(f"bench.device.{name}") is PARTS[name]
