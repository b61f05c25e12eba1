"""metrics.jsonl, the progress display and the optional loggers."""

import contextlib
import io
import json
import os
import pty
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any

import processes
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkd.files import cut_jsonl, read_jsonl, to_line, with_sum
from fastkd.monitor import Monitor


def step_line(step: int, **changes: Any) -> dict[str, Any]:
    line = {
        "step": step, "progress": step / 100, "charged_s": 0.72 * step, "tokens": 2048 * step, "loss": 5.0 - step / 50,
        "parts": {"kl": 1.5, "ce": 3.5}, "lr": 5e-4, "grad_norm": 1.2, "tokens_per_s": 3412.3,
        "peak_memory_bytes": 10**9,
    }  # fmt: skip
    return line | changes


def validation_line(step: int, **changes: Any) -> dict[str, Any]:
    line = {"step": step, "progress": step / 100, "charged_s": 1.0, "tokens": 5, "loss": 2.5, "accuracy": 0.125}
    return line | changes


def monitor(folder: Path, stream: Any = None, **options: Any) -> Monitor:
    return Monitor(folder, 72.0, "gpu-seconds", stream=stream or io.StringIO(), **options)


# ---- JSON lines ---------------------------------------------------------------------------------------------


@given(cut=st.integers(0, 200))
def test_a_file_torn_at_any_byte_gives_the_whole_lines_before(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    lines = [to_line({"step": step, "text": "ä" * step}).encode() for step in range(1, 7)]
    content = b"".join(lines)[:cut]
    path.write_bytes(content)
    whole = content.count(b"\n")
    # A last line that lacks nothing but its line break is whole too.
    complete = {sum(map(len, lines[: n + 1])) - 1: n + 1 for n in range(len(lines))}.get(len(content), whole)
    assert [record["step"] for record in read_jsonl(path)] == list(range(1, complete + 1))


def test_no_file_is_no_record(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_jsonl(path)


def test_a_cut_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def fails_at_the_second(record: dict[str, Any]) -> bool:
        return bool(record["step"] == 1 or 1 / 0)

    with pytest.raises(ZeroDivisionError):
        cut_jsonl(path, fails_at_the_second)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    cut_jsonl(path, lambda record: record["step"] == 1)
    assert path.read_text() == '{"step": 1}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


# ---- metrics ------------------------------------------------------------------------------------------------


def test_metrics_hold_what_was_recorded(tmp_path: Path) -> None:
    with monitor(tmp_path) as shown:
        shown.step(step_line(1))
        shown.validation(validation_line(1))
    written = [with_sum(step_line(1)), with_sum({"event": "validation", **validation_line(1)})]
    assert read_jsonl(tmp_path / "metrics.jsonl") == written


def test_a_loss_that_is_not_finite_is_null_in_strict_json(tmp_path: Path) -> None:
    stream = io.StringIO()
    with monitor(tmp_path, stream) as shown:
        shown.step(step_line(1, loss=float("nan"), parts={"kl": float("inf")}))
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert line["loss"] is None and line["parts"] == {"kl": None}
    assert "loss not finite" in stream.getvalue()


def test_a_new_run_starts_its_metrics_again_and_a_resumed_one_keeps_them(tmp_path: Path) -> None:
    for resume, kept in ((False, [1]), (True, [1, 1]), (False, [1])):
        with monitor(tmp_path, resume=resume) as shown:
            shown.step(step_line(1))
        assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == kept


def test_a_resume_cuts_what_is_beyond_its_checkpoint(tmp_path: Path) -> None:
    with monitor(tmp_path) as shown:
        for step in (10, 20, 30):
            shown.step(step_line(step))
            shown.validation(validation_line(step))
    with monitor(tmp_path, resume=True) as shown:
        shown.rewind(20)
        shown.step(step_line(30, loss=1.0))
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(line["step"], "event" in line) for line in lines] == [
        (10, False), (10, True), (20, False), (20, True), (30, False),
    ]  # fmt: skip
    assert lines[-1]["loss"] == 1.0


def test_metrics_survive_kill_9_and_a_resume_goes_on_after_them(tmp_path: Path) -> None:
    code = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_monitor import monitor, step_line
        with monitor(Path({str(tmp_path)!r})) as shown:
            for step in range(1, 10**9):
                shown.step(step_line(step))
                if step == 50:
                    print("fifty", flush=True)
    """
    (tmp_path / "shown.py").write_text(textwrap.dedent(code))
    process = processes.Command(str(tmp_path / "shown.py"))
    assert process.stdout.readline() == "fifty\n"
    process.kill()
    assert process.finish().returncode == -signal.SIGKILL
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1000000000, "pro')  # the worst that a kill can leave
    before = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in before] == list(range(1, len(before) + 1)) and len(before) >= 50
    with monitor(tmp_path, resume=True) as shown:
        shown.rewind(40)
        shown.step(step_line(41))
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, 42))


def test_a_resume_writes_on_after_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    with monitor(tmp_path, resume=True) as shown:
        shown.step(step_line(2))
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(("log_every", "due"), [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 1, 3, 6])])
def test_due_is_the_first_step_and_every_nth(tmp_path: Path, log_every: int, due: list[int]) -> None:
    shown = monitor(tmp_path, log_every=log_every)
    assert [step for step in range(7) if shown.due(step)] == due


def test_an_unknown_unit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'hours'"):
        Monitor(tmp_path / "run", 1.0, "hours")
    assert not (tmp_path / "run").exists()


# ---- what is shown ------------------------------------------------------------------------------------------


def test_off_a_terminal_lines_are_few_plain_and_end_with_the_last_step(tmp_path: Path) -> None:
    stream = io.StringIO()
    with monitor(tmp_path, stream) as shown:
        for step in range(1, 101):
            shown.step(step_line(step))
        shown.validation(validation_line(100))
    first, validation, last = stream.getvalue().splitlines()
    assert first.startswith("step 1 · 1.0% · 0.7200 of 72.00 GPU-s · 71.28 GPU-s left")
    assert validation == "step 100 · validation loss 2.5000 · accuracy 12.50%"
    assert last == "step 100 · 100.0% · 72.00 of 72.00 GPU-s · loss 3.0000 · lr 5.00e-04 · 3,412 tokens/s"


def test_without_a_step_nothing_is_shown_but_what_is_said(tmp_path: Path) -> None:
    stream = io.StringIO()
    with monitor(tmp_path, stream) as shown:
        shown.say("resumed at step 0 [not markup]")
        shown.advance(0.5)
    assert stream.getvalue() == "resumed at step 0 [not markup]\n"


def test_on_a_terminal_a_bar_is_drawn_and_taken_down(tmp_path: Path) -> None:
    code = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_monitor import monitor, step_line
        with monitor(Path({str(tmp_path)!r}), sys.stdout) as shown:
            for step in range(1, 101):
                shown.step(step_line(step))
            shown.say("said above")
    """
    ours, theirs = pty.openpty()
    (tmp_path / "shown.py").write_text(textwrap.dedent(code))
    process = processes.Command(str(tmp_path / "shown.py"), output=theirs, TERM="xterm", COLUMNS="100")
    os.close(theirs)
    screen = _read_all(ours)
    assert process.finish().returncode == 0
    assert "━" in screen and "72.00 of 72.00 GPU-s" in screen and "said above" in screen
    assert "loss 3.0000 · lr 5.00e-04 · 3,412 tokens/s" in screen
    assert screen.count("tokens/s") < 20  # redrawn a few times a second, not at every step
    assert screen.rstrip().endswith("\x1b[?25h")  # the cursor is back


def _read_all(terminal: int) -> str:
    pieces = []
    with contextlib.suppress(OSError):  # how Linux says that the other side has closed
        while piece := os.read(terminal, 65536):
            pieces.append(piece)
    os.close(terminal)
    return b"".join(pieces).decode()


def test_a_closed_pipe_does_not_stop_a_run(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w")
    with monitor(tmp_path, stream) as shown:
        for step in (1, 2):
            shown.step(step_line(step))
            shown.validation(validation_line(step))
    with contextlib.suppress(OSError):
        stream.close()
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 4


def test_a_stream_that_lacks_a_character_gets_another(tmp_path: Path) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with monitor(tmp_path, stream) as shown:
        shown.say("16384 → 8192")
    assert stream.buffer.getvalue() == b"16384 ? 8192\n"  # type: ignore[attr-defined]


# ---- loggers ------------------------------------------------------------------------------------------------


def test_an_unknown_logger_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown logger 'mlflow': --log-to takes tensorboard, wandb, trackio"):
        monitor(tmp_path / "run", log_to=("tensorboard", "mlflow"))
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is optional")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monitor(tmp_path, log_to=("tensorboard",)) as shown:
        shown.step(step_line(10))
        shown.validation(validation_line(10))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/loss")[0].step == 10
    assert events.Scalars("train/parts/kl")[0].value == 1.5
    assert events.Scalars("validation/accuracy")[0].value == 0.125


def test_a_logger_that_cannot_start_is_told_once_and_left_out(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is optional")
    (tmp_path / "tensorboard").write_text("a file where the logger wants its folder")
    stream = io.StringIO()
    with monitor(tmp_path, stream, log_to=("tensorboard",)) as shown:
        for step in range(1, 4):
            shown.step(step_line(step))
    assert stream.getvalue().count("warning: --log-to tensorboard is off for the rest of this run") == 1
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.parametrize("fails_in", ["init", "log", "finish", "import"])
def test_a_logger_that_breaks_at_any_time_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_in: str
) -> None:
    # A package of that name that breaks at the given moment, as a server that goes away makes the real one do.
    body = {
        name: "raise RuntimeError('gone away')" if name == fails_in else "return self" for name in ("log", "finish")
    }
    (tmp_path / "trackio.py").write_text(
        ("raise RuntimeError('gone away')\n" if fails_in == "import" else "")
        + "class Run:\n"
        + "".join(f"    def {name}(self, *a, **k):\n        {line}\n" for name, line in body.items())
        + "def init(**k):\n"
        + ("    raise RuntimeError('gone away')\n" if fails_in == "init" else "    return Run()\n")
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    stream = io.StringIO()
    with monitor(tmp_path / "run", stream, log_to=("trackio",)) as shown:
        for step in range(1, 4):
            shown.step(step_line(step))
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    assert stream.getvalue().count("RuntimeError: gone away") == 1
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 3


def test_a_logger_that_is_not_installed_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    stream = io.StringIO()
    with monitor(tmp_path, stream, log_to=("wandb",)) as shown:
        shown.step(step_line(1))
    assert stream.getvalue().count("wandb is not installed (pip install wandb)") == 1
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1
