"""A comparison: matched budgets, rows that resume, failures that stay single, what else differs."""

import json
import signal
import time
from pathlib import Path

import processes
import pytest
from report_page import Page

from fastkd import compare, run
from fastkd.comparison import claims, differences
from fastkd.comparison.report import build_comparison
from fastkd.comparison.results import read_results
from fastkd.comparison.rows import ROW_OPTIONS, Row, base_row, parse_row, teachers
from fastkd.comparison.scores import Scorer
from fastkd.comparison.tuning import candidates, searched, tune
from fastkd.distributed import World
from fastkd.files import read_jsonl
from fastkd.health import Diverged
from fastkd.opening import alone_in
from fastkd.run_folder import read_run


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def do(light: list[str], folder: Path, *options: str) -> int:
    return compare.main([*light, *options, "--output-dir", str(folder)])


def errors(folder: Path) -> list[str | None]:
    """What ended each row; None where nothing did."""
    return [row.get("error") for row in results(folder)["rows"]] if (folder / "results.json").exists() else []


ROWS = ("--methods", "mlm,minilmv2", "--batch-tokens", "512")
SECONDS_MATCHED = (*ROWS, "--budget-gpu-hours", "0.0005", "--seeds", "2")
FLOPS_MATCHED = (*ROWS, "--match", "flops", "--budget-flops", "6e9", "--seeds", "1")


@pytest.fixture(scope="module")
def seconds_matched(light: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small steps, of which a machine that is busy with other things makes a few in the budget, too."""
    folder = tmp_path_factory.mktemp("compare") / "seconds"
    assert do(light, folder, *SECONDS_MATCHED) == 0, errors(folder)
    return folder


def test_charged_seconds_agree_within_a_step(seconds_matched: Path) -> None:
    found = results(seconds_matched)
    assert found["match"] == "gpu-seconds" and len(found["rows"]) == 4
    fields = {"method", "seed", "charged_s", "flops", "tokens", "tokens_per_s", "mfu", "joules", "scores", "confounds"}
    for row in found["rows"]:
        assert fields <= set(row) and row["status"] == "ok"
        run = read_run(next((seconds_matched / "rows").glob(f"{row['method']}-*-seed{row['seed']}")))
        a_step = max(sum(step["phase_s"].values()) for step in run.steps)
        assert abs(0.0005 * 3600 - row["charged_s"]) <= 1.5 * a_step


def test_rows_differ_in_their_method_alone_but_for_what_is_listed(seconds_matched: Path) -> None:
    found = {row["method"]: row["confounds"] for row in results(seconds_matched)["rows"]}
    assert found["mlm"] == []
    assert found["minilmv2"] == ["learning rate 0.0006, mlm has 0.001"]


def test_scores_and_references_are_there(seconds_matched: Path) -> None:
    found = results(seconds_matched)
    scratch = next(row for row in found["rows"] if row["method"] == "mlm")
    assert scratch["scores"]["held-out MLM loss"] > 0
    assert {reference["label"] for reference in found["references"]} == {"teacher", "untrained student"}
    table = (seconds_matched / "RESULTS.md").read_text()
    assert "| minilmv2 |" in table and "GPU-seconds" in table


def test_the_report_says_what_the_ledgers_say(seconds_matched: Path) -> None:
    numbers = Page(seconds_matched / "report.html").numbers
    for place, row in enumerate(results(seconds_matched)["rows"]):
        folder = next((seconds_matched / "rows").glob(f"{row['method']}-*-seed{row['seed']}"))
        lines = [line for line in read_jsonl(folder / "ledger.jsonl") if "event" not in line]
        assert numbers[f"row.{place}.charged_s"] == row["charged_s"] == lines[-1]["charged_s"]
        assert numbers[f"row.{place}.flops"] == row["flops"] == sum(lines[-1]["flops"].values())
        assert numbers[f"row.{place}.tokens"] == row["tokens"] == lines[-1]["tokens"]["real"]
        assert numbers[f"row.{place}.epochs"] == row["epochs"] == lines[-1]["epoch"]
        seconds = sum(sum(line["phase_s"].values()) for line in lines)
        assert numbers[f"row.{place}.tokens_per_s"] == pytest.approx(row["tokens"] / seconds)
        assert sum(row["phase_s"].values()) == pytest.approx(row["charged_s"])
        assert row["budget"] == pytest.approx(0.0005 * 3600)
        held_out = [line for line in read_jsonl(folder / "metrics.jsonl") if line.get("event") == "validation"]
        if row["method"] == "mlm":
            assert numbers[f"row.{place}.score.held-out MLM loss"] == held_out[-1]["mlm_loss"]


def test_rebuilding_the_report_gives_the_same_bytes(seconds_matched: Path) -> None:
    files = [seconds_matched / "RESULTS.md", seconds_matched / "report.html", *seconds_matched.glob("plots/*.svg")]
    before = [path.read_bytes() for path in files]
    build_comparison(seconds_matched)
    assert [path.read_bytes() for path in files] == before


def test_finished_rows_are_not_repeated(seconds_matched: Path, light: list[str]) -> None:
    ledgers = {path: path.read_bytes() for path in seconds_matched.glob("rows/*/ledger.jsonl")}
    assert do(light, seconds_matched, *SECONDS_MATCHED) == 0, errors(seconds_matched)
    assert {path: path.read_bytes() for path in ledgers} == ledgers


def test_flops_agree_within_a_step(light: list[str], tmp_path: Path) -> None:
    assert do(light, tmp_path / "c", *FLOPS_MATCHED) == 0, errors(tmp_path / "c")
    for row in results(tmp_path / "c")["rows"]:
        steps = read_run(next((tmp_path / "c" / "rows").glob(f"{row['method']}-*"))).steps
        assert len(steps) >= 4
        assert 0 <= 6e9 - row["flops"] <= 1.1 * row["flops"] / len(steps)


def test_kill_9_then_the_same_command_finishes_the_rest(light: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "c"
    options = [*light, *FLOPS_MATCHED, "--output-dir", str(folder)]
    process = processes.Command("fastkd.compare", *options)
    while not list(folder.glob("rows/minilmv2-*/ledger.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)  # between two looks at the folder
    process.kill()
    assert process.finish().returncode == -signal.SIGKILL
    first = next(folder.glob("rows/mlm-*/ledger.jsonl")).read_bytes()
    assert processes.run("fastkd.compare", *options).returncode == 0, errors(folder)
    assert next(folder.glob("rows/mlm-*/ledger.jsonl")).read_bytes() == first
    assert [row["status"] for row in results(folder)["rows"]] == ["ok", "ok"]


def test_a_row_that_fails_is_reported_and_the_others_go_on(light: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "c"
    blocked = folder / "rows" / "mlm-6e09-seed0"
    blocked.mkdir(parents=True)
    (blocked / "something else").write_text("")
    assert do(light, folder, *FLOPS_MATCHED) == compare.EXIT_ROWS == 4
    rows = {row["method"]: row for row in results(folder)["rows"]}
    assert rows["mlm"]["status"] == "failed" and "not empty" in rows["mlm"]["error"]
    assert rows["minilmv2"]["status"] == "ok"
    (blocked / "something else").unlink()
    assert do(light, folder, *FLOPS_MATCHED) == 0, errors(folder)
    assert [row["status"] for row in results(folder)["rows"]] == ["ok", "ok"]


# However fast the machine is: 42 steps of a scratch run are in 0.0007 GPU-hours, by the clock of rank 0.
TIMED = """
import os, sys
from fastkd import compare, planning

begin, seconds = planning.Measurement.__init__, 0.03 * (1 + int(os.environ["RANK"]))
planning.Measurement.__init__ = lambda self, **took: begin(self, **took | {"step_seconds": seconds})
sys.exit(compare.main())
"""


def test_two_ranks_search_match_flops_and_agree(light: list[str], seconds_matched: Path, tmp_path: Path) -> None:
    (tmp_path / "timed.py").write_text(TIMED)
    folder, teacher = tmp_path / "c", next((seconds_matched / "rows").glob("mlm-*-seed0"))
    methods = f"logit_kd@{teacher},mlm"  # the row that others are set against comes last: its search, too
    options = ["--methods", methods, "--match", "flops", "--budget-gpu-hours", "0.0007", "--tune", "2",
               "--epochs-cap", "10", "--validations", "0", "--seeds", "1", "--output-dir", str(folder)]  # fmt: skip
    done = processes.ranks(str(tmp_path / "timed.py"), *light, *options)
    assert done.returncode == 0, done.stderr + str(errors(folder))
    assert done.stdout.count("table ") == 1
    rows, scratch = results(folder)["rows"], json.loads((folder / "scratch.json").read_text())
    budget = scratch['{"budget_gpu_hours": 0.0007}']["flops"]
    for row in rows:
        assert row["status"] == "ok" and row["budget"] == budget
        assert any("chosen among 2" in text for text in row["confounds"])
        run = read_run(next((folder / "rows").glob(f"{row['method']}-*")))
        assert run.devices == 2 and 0 <= budget - row["flops"] <= 1.1 * row["flops"] / len(run.steps)
        assert run.config["lr"] == searched(next((folder / "tuning").glob(f"{row['method']}-*"))).lr
        assert run.config["unique_tokens"] == int(scratch[json.dumps({"budget_flops": budget})]["tokens"] / 10)
    for path in folder.rglob("*.jsonl"):  # written by one rank: no step stands twice
        steps = [line["step"] for line in read_jsonl(path) if "event" not in line]
        assert steps == sorted(set(steps))


def test_scores_are_those_of_the_tasks_and_rows_asked_for(light: list[str], tmp_path: Path) -> None:
    folder, data = tmp_path / "c", tmp_path / "glue" / "RTE"
    data.mkdir(parents=True)
    rows = "".join(f"{i}\tIt rains.\tIt is {i}.\t{['', 'not_'][i % 2]}entailment\n" for i in range(24))
    for name in ("train", "dev"):
        (data / f"{name}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + rows)
    options = ["--methods", "mlm,minilmv2", "--match", "flops", "--budget-flops", "2e9", "--glue", str(data.parent),
               "--batch-tokens", "512", "--seeds", "1"]  # fmt: skip
    assert do(light, folder, *options, "--glue-tasks", "rte", "--glue-train-rows", "rte=2") == 0
    scored = [folder / "references" / "teacher", folder / "references" / "untrained", *(folder / "rows").iterdir()]
    assert [len(list(place.glob("glue/*.json"))) for place in scored] == [1, 1, 1, 1]
    first = results(folder)
    assert all("RTE accuracy" in row["scores"] for row in first["rows"] + first["references"])

    assert do(light, folder, *options, "--glue-tasks", "rte", "--glue-train-rows", "rte=4") == 0
    shown = [row["scores"]["RTE accuracy"] for row in results(folder)["references"]]
    cells = [json.loads(path.read_text()) for place in scored[:2] for path in place.glob("glue/*.json")]
    assert shown == [cell["metrics"]["accuracy"] for cell in cells if cell["rows"]["train"] == 4]
    assert [len(list(place.glob("glue/*.json"))) for place in scored] == [2, 2, 2, 2]
    finished = {path: path.stat().st_mtime_ns for place in scored for path in place.glob("glue/*.json")}
    assert do(light, folder, *options, "--glue-tasks", "rte", "--glue-train-rows", "rte=2") == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    again = results(folder)
    assert [row["scores"] for row in again["rows"]] == [row["scores"] for row in first["rows"]]
    assert again["references"] == first["references"] and again["ancestors"] == [light[light.index("--teacher") + 1]]


def test_earlier_scores_are_not_shown_among_those_asked_for(tmp_path: Path) -> None:
    earlier = {"rte": {"accuracy": {"mean": 50.0, "std": 0.0, "seeds": [0], "values": [50.0]}}}
    (tmp_path / "glue.json").write_text(json.dumps(earlier))
    assert Scorer(None, None, None, 1).of(tmp_path) == {"RTE accuracy": 50.0}
    assert Scorer(str(tmp_path), "rte", "rte=4", 1).of(tmp_path) == {}


def test_plan_only_writes_nothing(light: list[str], tmp_path: Path, capsys) -> None:
    options = ("--methods", "mlm,minilmv2", "--budget-gpu-hours", "0.001", "--plan-only", "--json")
    assert do(light, tmp_path / "c", *options) == 0
    answer, shown = capsys.readouterr()
    assert "mlm: " in shown and "minilmv2: " in shown and "tokens" in shown
    assert "4 runs: 2 rows, 2 seeds each, about " in shown  # --seeds is 2 unless it is given
    found = json.loads(answer)
    assert [planned["row"] for planned in found["plans"]] == ["mlm", "minilmv2"]
    assert found["folder"] is found["failed"] is found["results"] is None
    assert not (tmp_path / "c").exists()


def test_a_search_that_its_budget_does_not_pay_for_is_refused(light: list[str], tmp_path: Path, capsys) -> None:
    """Before the first row, not by each: a rate gets a tenth of three steps."""
    options = ("--methods", "mlm", "--match", "flops", "--batch-tokens", "512", "--budget-flops", "4e8", "--tune", "2")
    assert do(light, tmp_path / "c", *options) == 3
    error = capsys.readouterr().err
    assert "--tune tries each rate with 10% of the budget: one step takes" in error and error.count("\n") == 1
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--methods", "mlm,nope"], ("nope", "minilmv2")),
        (["--methods", "mlm+as-released"], ("mlm takes +init-from-teacher, ", "not +as-released")),
        (["--methods", "mlm@x"], ("mlm", "without a teacher")),
        (["--init-from-teacher"], ("+init-from-teacher", "--methods")),
        (["--methods", "mlm,mlm"], ("twice", "--seeds")),
        (["--methods", ","], ("--methods",)),
        (["--seeds", "0"], ("--seeds",)),
        (["--tune", "1"], ("--tune",)),
        (["--tune", "99999"], ("--tune", "20", "99999")),
        (["--budget-flops", "1e9"], ("--match flops",)),
        (["--budget-tokens", "1e9"], ("--budget-tokens",)),
        (["--charge", "all"], ("--charge",)),
        (["--epochs-cap", "0"], ("--epochs-cap",)),
        (["--epochs-cap", "0.001"], ("--epochs-cap", "corpus")),
        (["--glue", "missing"], ("missing", "--glue")),
        (["--glue-tasks", "sst2"], ("--glue",)),
        (["--glue", "hub", "--glue-train-rows", "0"], ("--glue-train-rows", "'0'")),
        (["--glue", "hub", "--glue-train-rows", "²"], ("--glue-train-rows", "'²'")),
        (["--micro-batch", "0"], ("--micro-batch", "auto", "512")),
        (["--frobnicate"], ("--frobnicate",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(options: list[str], words: tuple[str, ...], light: list[str], tmp_path: Path, capsys) -> None:
    assert do(light, tmp_path / "c", "--budget-gpu-hours", "0.001", *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "c").exists()


def test_a_folder_that_cannot_hold_a_comparison(light: list[str], tmp_path: Path, capsys) -> None:
    file, damaged = tmp_path / "file", tmp_path / "damaged"
    file.write_text("")
    (damaged / "scratch.json").mkdir(parents=True)
    for folder, words in ((file, "--output-dir"), (file / "c", "--output-dir"), (damaged, "scratch.json")):
        assert do(light, folder, "--budget-gpu-hours", "0.001") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error, error
    with alone_in(tmp_path / "other"):
        assert do(light, tmp_path / "other", "--budget-gpu-hours", "0.001") == 2
    assert "another process trains in" in capsys.readouterr().err


def test_a_row_is_written_in_one_word() -> None:
    row = parse_row("minilmv2+init-from-teacher@runs/big")
    assert row == Row("minilmv2", ("init_from_teacher",), "runs/big")
    assert row.label == "minilmv2 +init-from-teacher @big"


def test_scratch_may_start_from_a_teacher_and_is_then_no_baseline() -> None:
    rows = [parse_row(spec) for spec in ("mlm+init-from-teacher", "minilmv2+init-from-teacher", "mlm")]
    assert base_row(rows) == Row("mlm")
    shared = {"preset": "quickstart"}
    assert [row.resolved(shared, budget_tokens=1).run.teacher for row in rows] == ["quickstart", "quickstart", None]
    assert differences.of_options(rows[0], rows, shared, [1e-3], [1e-3]) == [ROW_OPTIONS["init_from_teacher"]]
    assert parse_row("mlm+init-from-teacher@runs/big").teacher == "runs/big"
    with pytest.raises(ValueError, match="trains without a teacher"):
        parse_row("mlm@runs/big")


def test_every_difference_is_named() -> None:
    rows = [
        parse_row(spec) for spec in ("mlm", "minilmv2", "tinybert", "logit_kd@runs/big", "minilmv2+init-from-teacher")
    ]
    shared = {"preset": "quickstart"}
    assert differences.of_options(rows[0], rows, shared, [1e-3], [1e-3]) == []
    assert differences.of_options(rows[3], rows, shared, [5e-4], [1e-3]) == [
        "learning rate 0.0005, mlm has 0.001",
        "teacher runs/big, other rows have quickstart",
    ]
    assert any(
        "starts from teacher layers" in text for text in differences.of_options(rows[4], rows, shared, [1e-3], [1e-3])
    )


def test_rates_are_tried_around_the_default() -> None:
    assert candidates(1e-3, 3) == [5e-4, 1e-3, 2e-3]
    assert candidates(1e-3, 2) == [1e-3, 2e-3]


def test_a_row_of_another_teacher_keeps_the_student_of_the_others(mlm_run: Path) -> None:
    shared = {"preset": "quickstart"}
    rows = [Row("mlm"), Row("minilmv2"), Row("logit_kd", (), str(mlm_run)), Row("tinybert")]
    assert [row.run_options(shared).get("tokenizer") for row in rows] == [None, None, "quickstart", None]
    assert teachers(rows, shared) == ["quickstart", str(mlm_run)]
    assert teachers(rows[:1], shared) == []


def test_another_device_and_slowed_clocks_are_differences(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("mlm", "minilmv2")]
    for folder, device in zip(folders, ("A", "B"), strict=True):
        folder.mkdir()
        facts = {"device": device, "packages": {"torch": "2"}, "command": [device]}
        (folder / "environment.json").write_text(json.dumps(facts))
        plan = {"dtype": {"A": "float32", "B": "bfloat16"}[device], "attention": "sdpa", "tokens": device}
        (folder / "plan.json").write_text(json.dumps(plan))
    lines = [{"step": step, "throttle": ["thermal"] if step == 1 else []} for step in (1, 2, 3, 4)]
    (folders[1] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert differences.of_surroundings(folders[0], folders[0], Row("mlm")) == []
    assert differences.of_surroundings(folders[1], folders[0], Row("mlm")) == [
        "device B, mlm had A",
        "dtype bfloat16, mlm had float32",
        "clocks held down by thermal in 25% of readings",
    ]


def train(options: list[str], rate: float, where: Path) -> int:
    """A scratch run with a learning rate."""
    more = ("--method", "mlm", "--lr", str(rate), "--budget-tokens", "9000", "--output-dir", str(where))
    return run.main([*options, *more])


def test_a_search_is_done_once_and_takes_the_lowest_loss(from_scratch: list[str], tmp_path: Path) -> None:
    tried: list[float] = []

    def try_rate(rate: float, where: Path) -> None:
        tried.append(rate)
        assert train(from_scratch, rate, where) == 0

    found = tune(1e-3, 2, try_rate, tmp_path, World())
    assert (found.lr, tried) == (2e-3, [1e-3, 2e-3])  # so few steps reward the larger rate
    assert found.charged_s > 0
    assert tune(1e-3, 2, try_rate, tmp_path, World()) == searched(tmp_path) == found
    assert len(tried) == 2
    path = tmp_path / "tuning.json"
    for damaged in (path.read_text().replace('"loss": ', '"loss": 1', 1), path.read_text()[:50]):
        path.write_text(damaged)  # another rate would win
        assert tune(1e-3, 2, try_rate, tmp_path, World()) == found
    assert {path.name for path in tmp_path.glob("tuning.json.*")} == {"tuning.json.damaged", "tuning.json.damaged-2"}


def test_a_rate_that_diverges_is_passed_over(from_scratch: list[str], tmp_path: Path) -> None:
    def try_rate(rate: float, where: Path) -> None:
        assert train(from_scratch, rate, where) == 0
        if rate > 1e-3:
            raise Diverged("not finite")

    assert tune(1e-3, 2, try_rate, tmp_path / "a", World()).lr == 1e-3
    with pytest.raises(ValueError, match="no learning rate"):
        tune(1e-2, 2, try_rate, tmp_path / "b", World())
    assert searched(tmp_path / "b") is None and searched(tmp_path / "c") is None


def test_a_search_ends_where_the_teacher_is_to_blame(tmp_path: Path) -> None:
    def try_rate(rate: float, where: Path) -> None:
        tried.append(rate)
        raise Diverged("not finite", "teacher")

    tried: list[float] = []
    with pytest.raises(Diverged):
        tune(1e-3, 2, try_rate, tmp_path, World())
    assert len(tried) == 1


def test_every_row_and_reference_is_probed(seconds_matched: Path) -> None:
    found, reports = results(seconds_matched), seconds_matched.glob("rows/*/report.html")
    scored = [*found["rows"], *found["references"]]
    assert all(0 <= each["scores"]["token probe"] <= 100 for each in scored) and len(scored) == 6
    assert found["headline"][0] == "token probe" and "held-out MLM loss" in found["headline"]
    assert ['data-name="probe.tokens.model"' in report.read_text() for report in reports] == [True] * 4
    assert all((seconds_matched / row["items"]).is_file() for row in found["rows"])
    compared = [claim.difference for claim in claims.against(read_results(seconds_matched), "scratch", "token probe")]
    assert [difference.seeds for difference in compared] == [2] and compared[0].items > 1
