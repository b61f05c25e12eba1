"""A run of several stages: one student and ledger, each stage's method, schedule and cost, the teacher as long as it is read."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForMaskedLM

from fastkd import compare, pipeline, plan, run
from fastkd.config import parse, resolve
from fastkd.data.batches import StepTokens
from fastkd.distributed import World
from fastkd.ledger import surviving_steps
from fastkd.loop import Loop
from fastkd.monitor import SilentMonitor
from fastkd.reports.descriptions import warning_of
from fastkd.run_folder import Run, read_run
from fastkd.schedule import learning_rate
from fastkd.setup import Setup, prepare
from fastkd.train import Trainer

RECIPE = "minilmv2:0.8>mlm"
FLOPS = 2.4e10


@pytest.fixture(scope="module")
def folder(light: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by relations, then by words, on a budget of FLOPs."""
    folder = tmp_path_factory.mktemp("stages") / "run"
    options = ["--method", RECIPE, "--budget-flops", str(FLOPS), "--log-every", "1", "--checkpoint-minutes", "0"]
    assert run.main([*light, *options, "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def done(folder: Path) -> Run:
    return read_run(folder)


@pytest.fixture
def setup_of(made_corpus: Path, made_teacher: Path) -> Callable[..., Setup]:
    def make(method: str, **options: object) -> Setup:
        values = {
            "preset": "quickstart", "method": method, "corpus": [str(made_corpus)], "student": "2L-48H-12A",
            "teacher" if method != "mlm" else "tokenizer": str(made_teacher), "seq_length": 32, "batch_tokens": 1024,
            "budget_tokens": 1e5,
            "dtype": "float32", **options,
        }  # fmt: skip
        return prepare(resolve(values), World())

    return make


def test_each_stage_gets_its_share_to_a_step(done: Run) -> None:
    first, second = done.stage_sums
    assert [first.method, second.method] == ["minilmv2", "mlm"]
    a_step = first.flops / first.steps
    assert 0.8 * FLOPS - 1.3 * a_step <= first.flops <= 0.8 * FLOPS
    assert first.flops + second.flops == sum(done.last["flops"].values()) <= FLOPS
    assert second.flops / second.steps < a_step, "the second stage pays no teacher"


def test_the_ledger_adds_up_by_stage(done: Run) -> None:
    by_stage = sum(stage.seconds for stage in done.stage_sums)
    charged = sum(event.seconds for event in done.event_sums if event.charged)
    assert by_stage + charged == pytest.approx(done.charged_s, rel=1e-9)
    assert [event["stage"] for event in done.events if event["event"] == "stage"] == [1]
    assert sum(stage.steps for stage in done.stage_sums) == len(done.steps)
    assert sum(stage.tokens for stage in done.stage_sums) == done.last["tokens"]["real"]
    taught = [step["phase_s"]["teacher"] > 0 for step in done.steps]
    assert taught == [step["stage"] == 0 for step in done.steps]


def test_each_stage_has_its_peak_and_all_have_one_schedule(done: Run) -> None:
    peaks, spans = {0: 6e-4, 1: 1e-3}, {0: (0.0, 0.8), 1: (0.8, 1.0)}
    for step in done.steps:
        start, end = spans[step["stage"]]
        assert start < step["progress"] <= end
        assert step["lr"] == pytest.approx(learning_rate(step["progress"], peaks[step["stage"]], 0.06))
    ends = [last["progress"] for last, first in itertools.pairwise(done.steps) if last["stage"] != first["stage"]]
    assert ends == [0.8] and done.steps[-1]["progress"] == 1.0


def test_plan_report_and_card_tell_the_stages(done: Run, folder: Path) -> None:
    stages = done.plan["stages"]
    assert [stage["method"] for stage in stages] == ["minilmv2", "mlm"]
    assert sum(stage["steps"] for stage in stages) == done.plan["steps"] == pytest.approx(len(done.steps), abs=1)
    assert stages[0]["teacher_share"] > 0.1 and stages[1]["teacher_share"] == 0
    report = (folder / "report.html").read_text("utf-8")
    assert "1: minilmv2" in report and "2: mlm" in report and "0.0006 &gt; 0.001" in report
    card = (folder / "final" / "README.md").read_text("utf-8")
    assert "Before mlm, it was trained by minilmv2." in card and "was trained: `AutoModelForMaskedLM`" in card
    assert done.validations[0]["stage"] == 0 and done.last_validations[-1]["accuracy"] is not None


def test_the_student_has_the_head_that_a_stage_trained(folder: Path) -> None:
    model = AutoModelForMaskedLM.from_pretrained(folder / "final")
    assert model.cls.predictions.bias.detach().abs().max() > 0


def test_a_replayed_ledger_repeats_it(light: list[str], folder: Path, done: Run, tmp_path: Path) -> None:
    options = ["--method", RECIPE, "--budget-flops", str(FLOPS), "--replay", str(folder / "ledger.jsonl")]
    assert run.main([*light, *options, "--output-dir", str(tmp_path / "again")]) == 0
    again = surviving_steps(tmp_path / "again" / "ledger.jsonl")
    assert [(step["stage"], step["progress"], step["lr"]) for step in again] == [
        (step["stage"], step["progress"], step["lr"]) for step in done.steps
    ]


def test_a_step_costs_what_its_method_does(setup_of: Callable[..., Setup]) -> None:
    counts = StepTokens(real=1024, predicted=154, pairs=30_000)
    both = setup_of("minilmv2:0.3>logit_kd")
    for number, method in enumerate(("minilmv2", "logit_kd")):
        assert both.step_cost(counts, number) == setup_of(method).step_cost(counts)


def test_the_teacher_goes_when_no_later_stage_reads_it(setup_of: Callable[..., Setup]) -> None:
    trainer = Trainer(setup_of("mlm:0.2>minilmv2:0.3>mlm"))
    stages = trainer.setup.stages
    for number in (0, 1, 2, 0):  # as for a plan
        trainer.enter(number, for_good=False)
        assert (stages.teacher is not None) == (number == 1)
    trainer.enter(0)
    kept = weakref.ref(stages.last_teacher.encoder)
    trainer.enter(1)
    assert stages.teacher is not None and kept() is stages.teacher.encoder, "the teacher is not loaded twice"
    trainer.enter(2)
    gc.collect()
    assert stages.teacher is None and kept() is None


def test_stages_train_what_their_losses_reach_and_begin_a_new_optimiser(setup_of: Callable[..., Setup]) -> None:
    trainer = Trainer(setup_of("minilmv2:0.3>mlm"))
    head = trainer.setup.student.head.dense.weight
    before = head.clone()
    trainer.step(trainer.stream.step(0), 1e-3)
    assert torch.equal(head, before) and not head.requires_grad
    first = trainer.optimizer
    trainer.enter(1)
    assert trainer.optimizer is not first and not trainer.optimizer.state
    trainer.step(trainer.stream.step(1), 1e-3)
    assert not torch.equal(head, before)


def test_a_time_without_the_teacher_keeps_the_optimiser_and_costs_what_scratch_does(
    setup_of: Callable[..., Setup],
) -> None:
    setup = setup_of("logit_kd", kd_until=0.2)
    counts = StepTokens(real=1024, predicted=154, pairs=30_000)
    assert setup.step_cost(counts, 1) == setup_of("mlm").step_cost(counts)
    trainer = Trainer(setup)
    _, _, taught = trainer.step(trainer.stream.step(0), 1e-3)
    first = trainer.optimizer
    trainer.enter(1)
    assert trainer.optimizer is first and trainer.setup.stages.last_teacher is None
    _, _, alone = trainer.step(trainer.stream.step(1), 1e-3)
    assert taught.keys() == {"kl", "ce"} and alone.keys() == {"ce"}


def test_the_weight_of_the_kl_can_follow_the_learning_rate(setup_of: Callable[..., Setup]) -> None:
    trainer = Trainer(setup_of("logit_kd", kl_schedule="lr", kl_weight=2.0, ce_weight=1.0, lr=1e-3))
    for rate in (1e-3, 2.5e-4):
        loss, _, terms = trainer.step(trainer.stream.step(0), rate)
        temperature = 2.0
        expected = 2.0 * rate / 1e-3 * float(terms["kl"]) + float(terms["ce"])
        assert float(loss) == pytest.approx(expected, rel=1e-5), temperature
    again = [trainer.validate().loss for _ in range(2)]
    assert again[0] == again[1]


def test_a_divergence_has_its_own_name_in_the_log(setup_of: Callable[..., Setup]) -> None:
    trainer = Trainer(setup_of("logit_kd", divergence="mse", kl_weight=2.0, ce_weight=1.0))
    loss, _, terms = trainer.step(trainer.stream.step(0), 1e-3)
    assert terms.keys() == {"mse", "ce"} and float(terms["mse"]) > 0
    assert float(loss) == pytest.approx(2.0 * float(terms["mse"]) + float(terms["ce"]), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "minilmv2:0.0001>mlm"], "its share of the budget is"),
        (["--method", "minilmv2:0.3>logit_kd", "--teacher", "quickstart"], "has no MLM head"),
        (["--method", "mlm:0.3>minilmv2", "--relation-heads", "5"], "does not divide"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    options: list[str], said: str, light: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run.main([*light, "--budget-tokens", "50000", *options, "--output-dir", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert code in (2, 3) and said in error and error.count("error:") == 1
    assert not (tmp_path / "run").exists()


def test_the_plan_prints_a_line_for_each_stage(light: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([*light, "--method", RECIPE, "--budget-flops", str(FLOPS)]) == 0
    printed = capsys.readouterr().out
    assert f"{RECIPE}, learning rate 0.0006 > 0.001" in printed and "  mlm            20.0% of the budget" in printed


def test_a_row_of_a_comparison_is_a_recipe(light: list[str], tmp_path: Path) -> None:
    options = ["--methods", f"mlm,{RECIPE}", "--match", "flops", "--budget-flops", "6e9", "--seeds", "1"]
    assert compare.main([*light, *options, "--output-dir", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["label"] for row in rows] == ["mlm", RECIPE] and {row["status"] for row in rows} == {"ok"}
    assert (tmp_path / "rows" / "minilmv2-0.8-mlm-6e09-seed0").is_dir()


def test_a_stage_without_a_step_is_said_and_its_head_is_not_exported(light: list[str], tmp_path: Path) -> None:
    """Validations of a loop that charges them may leave less than a step."""
    folder = tmp_path / "run"
    resolved = parse(
        [*light, "--method", "minilmv2:0.8>mlm", "--budget-flops", str(FLOPS), "--output-dir", str(folder)]
    )
    trainer = Trainer(prepare(resolved, World()))
    trainer.enter(0)
    folder.mkdir()
    loop = Loop(trainer, folder, SilentMonitor(folder, FLOPS, "flops"), [0.01, 0.01])
    with contextlib.closing(loop.ledger):
        seconds, cost = {"student": 1.0}, trainer.step_cost(0)
        loop.ledger.step(cost, seconds, progress=0.8, epoch=0.0, unique=1, joules=None, lr=1e-3, loss=1.0, stage=0)
        loop.ledger.end()
    (folder / "plan.json").write_text(json.dumps({"stages": [{"method": "minilmv2"}, {"method": "mlm"}]}))
    (folder / "config.toml").write_text(resolved.to_toml())
    assert "the budget was spent before mlm took a step" in warning_of(read_run(folder))
    pipeline.export(trainer.setup, folder)
    assert "**not** trained" in (folder / "final" / "README.md").read_text()


def test_a_rescue_at_a_boundary_is_of_the_stage_that_begins(light: list[str], tmp_path: Path) -> None:
    """Of a method with modules of its own, an older stage could not be restored from."""
    folder = tmp_path / "run"
    options = ["--method", "tinybert:0.9>mlm", "--budget-flops", str(3 * FLOPS), "--checkpoint-minutes", "60"]
    resolved = parse([*light, *options, "--output-dir", str(folder)])
    trainer = Trainer(prepare(resolved, World()))
    folder.mkdir()
    loop = Loop(trainer, folder, SilentMonitor(folder, 3 * FLOPS, "flops"), [0.01, 0.01])
    stop = RuntimeError("a peer is gone")

    def fail(number: int) -> None:
        Trainer.enter(trainer, number)
        trainer.step = raising(stop)

    trainer.enter = fail
    with contextlib.closing(loop.ledger), pytest.raises(RuntimeError, match="a peer is gone"):
        loop.run()
    again = Trainer(prepare(resolved, World()))
    resumed = Loop(again, folder, SilentMonitor(folder, 3 * FLOPS, "flops", resume=True), [0.01, 0.01])
    resumed.ledger.close()
    assert again.setup.stages.number == 1 and not again.objective.method


def raising(error: Exception) -> Callable[..., object]:
    def call(*given: object) -> object:
        raise error

    return call
