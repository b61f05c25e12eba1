"""A run whose numbers stop being finite says what is the likely cause, counts what it skipped and keeps its healthy state."""

import contextlib
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_run import PLAN, make_run, step_line, write_lines
from report_page import Page
from safetensors.torch import load_file, save_file

from fastkd import checkpoint, cli
from fastkd.config import parse
from fastkd.distributed import World
from fastkd.files import read_jsonl
from fastkd.health import Diverged
from fastkd.loop import SKIPS_TOLERATED, Loop
from fastkd.methods import MethodLoss
from fastkd.models import hf
from fastkd.monitor import Monitor
from fastkd.reports.run_report import build_report
from fastkd.setup import prepare
from fastkd.train import Trainer


def train(options: list[str], traced: Callable[[Trainer], None] = lambda trainer: None) -> Loop:
    """A run without its plan and validations."""
    resolved = parse(options)
    setup = prepare(resolved, World())
    trainer, budget = Trainer(setup), setup.config.budget
    with (
        contextlib.closing(setup.shards),
        Monitor(
            resolved.output_dir, budget.amount, budget.unit, resume=True, log_every=setup.config.log_every
        ) as monitor,
    ):
        loop = Loop(trainer, resolved.output_dir, monitor, [0.01])
        with contextlib.closing(loop.ledger):
            loop.run(lambda: traced(trainer))
            loop.save_the_end()
    return loop


SAVING = ["--checkpoint-minutes", "0"]  # after each step
SHORT = ["--batch-tokens", "512", "--student", "1L-48H-12A", "--budget-tokens", "13500", "--validations", "0"]


@pytest.fixture
def mlm(from_scratch: list[str], tmp_path: Path) -> list[str]:
    """Options of 26 steps of a few milliseconds."""
    return [*from_scratch, *SHORT, "--method", "mlm", "--output-dir", str(tmp_path / "run")]


@pytest.fixture
def minilmv2(light: list[str], tmp_path: Path) -> list[str]:
    """The same with a teacher."""
    return [*light, *SHORT, "--method", "minilmv2", "--output-dir", str(tmp_path / "run")]


def poison(monkeypatch: pytest.MonkeyPatch, spoilt: Callable[[int], bool]) -> None:
    """Make the loss NaN in each step, counted from 1 in this process, of which ``spoilt`` is true."""
    plain, steps = Trainer.micro_step, 0

    def micro_step(self: Trainer, batch: object, weight: float) -> MethodLoss:
        nonlocal steps
        out = plain(self, batch, weight)  # type: ignore[arg-type]
        rehearsal = not hasattr(self, "optimizer")
        steps += not rehearsal
        return out * (math.nan if not rehearsal and spoilt(steps) else 1.0)

    monkeypatch.setattr(Trainer, "micro_step", micro_step)


def test_a_rate_that_is_too_high_is_named_and_the_options_that_are_given_instead_work(
    mlm: list[str], tmp_path: Path
) -> None:
    with pytest.raises(Diverged, match=r"the likely cause is the learning rate 10: give --lr") as caught:
        train([*mlm, *SAVING, "--lr", "10", "--weight-decay", "1", "--warmup", "0", "--budget-tokens", "40000"])
    assert caught.value.cause == "rate" and not isinstance(caught.value, ValueError)
    found = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert found is not None and f"the last healthy state is {found.folder}" in str(caught.value)
    for name in ("model", "optimizer"):
        assert all(x.isfinite().all() for x in load_file(found.folder / f"{name}.safetensors").values())
    given = re.search(r"give (--lr \S+ --output-dir \S+);", str(caught.value))
    assert given is not None
    loop = train([*mlm, "--weight-decay", "1", "--warmup", "0", *shlex.split(given[1])])
    assert loop.totals.skipped == 0 and loop.folder != tmp_path / "run"


def test_a_teacher_whose_numbers_overflow_is_refused_before_the_first_step(
    minilmv2: list[str], made_teacher: Path, tmp_path: Path
) -> None:
    teacher = shutil.copytree(made_teacher, tmp_path / "teacher")
    weights = load_file(teacher / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.0.intermediate.dense.weight"))
    save_file(weights | {name: weights[name] * 1e38}, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"not finite before the first step because of teacher .* give another --teacher"
    ):
        train([*minilmv2, "--teacher", str(teacher)])
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def test_a_teacher_that_fails_later_is_named(minilmv2: list[str]) -> None:
    def spoil(trainer: Trainer) -> None:
        assert trainer.setup.teacher is not None
        with torch.inference_mode():
            next(trainer.setup.teacher.encoder.parameters()).fill_(3e38)

    with pytest.raises(Diverged, match=r"the likely cause is the teacher .*: give another --teacher") as caught:
        train(minilmv2, spoil)
    assert caught.value.cause == "teacher"


def test_a_text_that_alone_gives_no_finite_loss_is_named(minilmv2: list[str]) -> None:
    def spoil(trainer: Trainer) -> None:
        """Words that are in this text, and not in the held-out one, overflow."""
        held_out = torch.cat([batch.input_ids for batch in trainer.validation])
        only_here = torch.ones(trainer.setup.student.config.vocab_size, dtype=torch.bool)
        only_here[torch.cat([held_out, torch.arange(5)])] = False
        with torch.no_grad():
            trainer.setup.student.word_embeddings.weight[only_here] = 3e38

    with pytest.raises(Diverged, match=r"the likely cause is the text: .* give --seed 1 --output-dir") as caught:
        train(minilmv2, spoil)
    assert caught.value.cause == "data"


def test_a_skipped_step_is_counted_in_the_ledger_the_metrics_and_the_line(
    mlm: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, lambda step: step in (3, 4, 9))
    loop = train([*mlm, "--log-every", "1", "--budget-tokens", "6000"])
    assert loop.totals.skipped == 3 and loop.totals.skipped_in_a_row == 0
    for name in ("ledger", "metrics"):
        lines = [line for line in read_jsonl(tmp_path / "run" / f"{name}.jsonl") if "event" not in line]
        assert [line["skipped"] for line in lines[:10]] == [0, 0, 1, 2, 2, 2, 2, 2, 3, 3]
        assert [line["step"] for line in lines if line["loss"] is None] == [3, 4, 9]
    assert "tokens/s · 3 steps skipped" in capsys.readouterr().out


def test_skipped_steps_are_in_the_report(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", plan=PLAN)
    write_lines(folder / "ledger.jsonl", [step_line(n, n * 1.0) | {"skipped": n // 20} for n in range(1, 58)])
    assert Page(build_report(folder)).numbers["happened.skipped"] == 2


def test_skips_in_a_row_survive_a_resume_and_the_weights_before_them_are_kept(
    mlm: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(KeyboardInterrupt):
        pass

    def stop(trainer: Trainer) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stop

    left, ledger = 12, tmp_path / "run" / "ledger.jsonl"
    poison(monkeypatch, lambda step: step > 4)
    with pytest.raises(Stop):
        train([*mlm, *SAVING], stop)
    monkeypatch.undo()
    poison(monkeypatch, lambda step: True)
    with pytest.raises(Diverged, match=f"finite in {SKIPS_TOLERATED} steps in a row"):
        train(mlm)
    steps = [line["step"] for line in read_jsonl(ledger) if "event" not in line]
    assert steps[-1] == 4 + SKIPS_TOLERATED
    for _ in range(2):  # the same command says it again, and no step more is spent
        found = checkpoint.newest(tmp_path / "run" / "checkpoints")
        assert found is not None and found.state["totals"]["skipped_in_a_row"] == SKIPS_TOLERATED
        moments = load_file(found.folder / "optimizer.safetensors")
        assert {float(x) for name, x in moments.items() if name.endswith(".step")} == {4.0}, "no skipped step counts"
        with pytest.raises(Diverged):
            train(mlm)
    assert [line["step"] for line in read_jsonl(ledger) if "event" not in line] == steps


def test_a_short_run_whose_steps_were_all_skipped_is_no_success(
    mlm: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda step: True)
    with pytest.raises(Diverged, match="in 9 steps in a row"):
        train([*mlm, "--budget-tokens", "4700"])


def test_weights_that_break_in_the_last_step_are_not_saved(mlm: list[str], tmp_path: Path) -> None:
    count = 0

    def spoil(trainer: Trainer) -> None:
        nonlocal count
        count += 1
        if count == 5:
            with torch.no_grad():
                trainer.setup.student.word_embeddings.weight[7, 3] = math.nan

    with pytest.raises(
        Diverged, match=r"student\.word_embeddings\.weight is not finite; the likely cause is the learning"
    ):
        train([*mlm, *SAVING, "--budget-tokens", "2600"], spoil)
    found = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert found is not None and found.state["step"] == 4


def test_a_student_that_is_not_finite_is_not_exported(made_teacher: Path, tmp_path: Path) -> None:
    loaded = hf.load(str(made_teacher))
    with torch.no_grad():
        loaded.encoder.word_embeddings.weight[7, 3] = math.inf
    with pytest.raises(Diverged, match=r"word_embeddings\.weight is not finite"):
        hf.export(loaded.encoder, loaded.tokenizer, tmp_path / "final", card="", mlm_head=True)
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_run_is_no_bad_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise Diverged("what it says")

    assert cli.answer(work) == cli.EXIT_FAILED
    assert capsys.readouterr().err == "error: what it says\n"


def test_a_checkpoint_of_an_older_version_has_skipped_nothing(mlm: list[str], tmp_path: Path) -> None:
    loop = train([*mlm, "--budget-tokens", "1100"])
    state = next((tmp_path / "run" / "checkpoints").glob("step-*/state.json"))
    totals = json.loads(state.read_text())["totals"]
    assert (totals.pop("skipped"), totals.pop("skipped_in_a_row")) == (0, 0)
    assert type(loop.totals)(**totals).skipped == 0
