"""A method is one file: put beside the others, it trains, is planned, compared, benched, tested and described."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import processes
import pytest

from fastkd.run_folder import read_run

ROOT = Path(__file__).parents[1]
FITNET = '''
"""fitnet: one layer of the student is led to that of the teacher.

    loss = MSE(W h_s^m, h_t^n),  n = ⌊m·L_t/L_s⌋, W learned

Source: Romero et al. 2015 (FitNets, arXiv 1412.6550), eq. 3, with a linear regressor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastkd.methods import FusedLosses, Method, MethodLoss, Padded, require_teacher
from fastkd.models.needs import Needs, Outputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fastkd.data.batches import Batch
    from fastkd.models.encoder import EncoderConfig


@dataclass(frozen=True)
class Config:
    """Options of fitnet."""

    guided_layer: int | None = field(default=None, metadata={"help": "student layer that is led; default: the last"})


class METHOD(Method):
    """Hidden states of one layer of each model."""

    name = "fitnet"
    default_lr = 1e-3

    def __init__(self, config: Config, student: EncoderConfig, teacher: EncoderConfig | None) -> None:
        super().__init__(config, student, teacher)
        teacher = require_teacher(self.name, teacher)
        self.layer = config.guided_layer or student.num_layers
        if self.layer > student.num_layers:
            raise ValueError(f"--guided-layer {self.layer} is not among the student's layers 1 to {student.num_layers}")
        self.teacher_layer = self.layer * teacher.num_layers // student.num_layers
        self.widths = student.hidden_size, teacher.hidden_size
        self.student_needs, self.teacher_needs = Needs(hidden=(self.layer,)), Needs(hidden=(self.teacher_layer,))

    def initialise(self, generator: torch.Generator, device: torch.device) -> None:
        from torch import nn

        regressor = nn.Linear(*self.widths, bias=False)
        nn.init.normal_(regressor.weight, std=self.student_config.initializer_range, generator=generator)
        self.modules["regressor"] = regressor.to(device)

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> MethodLoss:
        from fastkd.kernels.hidden_mse import hidden_mse

        assert teacher is not None
        led = self.modules["regressor"](student.hidden[self.layer])
        return MethodLoss(hidden_mse(led, teacher.hidden[self.teacher_layer]))

    def loss_flops(self, *, tokens: int, pairs: int, predicted: int) -> int:
        d_s, d_t = self.widths
        return 3 * 2 * tokens * d_s * d_t

    def fused_losses(self) -> FusedLosses:
        return [("hidden_mse", {"projected": True})]

    def plain(self, student: Padded, teacher: Padded | None, labels: Tensor, mask: Tensor) -> Tensor:
        assert teacher is not None
        led = self.modules["regressor"](student.hidden[self.layer])
        errors = (led.float() - teacher.hidden[self.teacher_layer].float()).square().mean(-1)
        return (errors * mask).sum() / mask.sum()

    @classmethod
    def card_note(cls, options: Mapping[str, Any]) -> str:
        led = options.get("guided_layer")
        return "" if led is None else f"Nothing above layer {led} of the student was trained."
'''
RUN = """
import os, runpy, sys
import sitecustomize

os.chdir(ROOT)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
Do = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def do(tmp_path_factory: pytest.TempPathFactory) -> Do:
    """Runs a module in a process, and its children, that find fitnet.py among the methods."""
    folder = tmp_path_factory.mktemp("new")
    (folder / "methods").mkdir()
    (folder / "methods" / "fitnet.py").write_text(FITNET.lstrip())
    added = f"import fastkd.methods\n\nfastkd.methods.__path__.append({str(folder / 'methods')!r})\n"
    (folder / "sitecustomize.py").write_text(added)
    (folder / "run.py").write_text(RUN.replace("ROOT", repr(str(ROOT))).replace("import sitecustomize", added))
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])

    def run(*command: object, new: bool = False) -> subprocess.CompletedProcess[str]:
        """``new``: in a process that has not imported the texts of ``--help`` yet."""
        if new:
            argv, environment = [sys.executable, "-m", *map(str, command)], os.environ | {"PYTHONPATH": path}
            done = subprocess.run(argv, env=environment, cwd=ROOT, capture_output=True, text=True)
        else:
            done = processes.run(str(folder / "run.py"), *command, PYTHONPATH=path)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done

    return run


def test_it_is_trained_and_its_student_has_a_card(do: Do, light: list[str], tmp_path: Path) -> None:
    options = [*light, "--method", "fitnet", "--guided-layer", "1", "--budget-tokens", "20000"]
    do("fastkd.run", *options, "--output-dir", tmp_path / "run")
    run = read_run(tmp_path / "run")
    first, last = run.steps[0]["loss"], run.steps[-1]["loss"]
    assert 0 < last < first and all(step["flops"]["loss"] > 0 for step in run.steps)
    assert run.config["method_options"] == {"guided_layer": 1}
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "\nNothing above layer 1 of the student was trained.\n" in card and "| method | fitnet |" in card
    assert "head was **not** trained" in card


def test_it_is_planned_and_compared(do: Do, light: list[str], tmp_path: Path) -> None:
    assert "fitnet" in do("fastkd.plan", *light, "--method", "fitnet", "--budget-tokens", "20000").stdout
    rows = ["--methods", "mlm,fitnet", "--match", "flops", "--budget-flops", "1e10", "--seeds", "1"]
    do("fastkd.compare", *light, *rows, "--output-dir", tmp_path / "rows")
    compared = json.loads((tmp_path / "rows" / "results.json").read_text())["rows"]
    assert {row["method"]: row["status"] for row in compared} == {"mlm": "ok", "fitnet": "ok"}


def test_help_tells_of_it(do: Do) -> None:
    shown = " ".join(do("fastkd.run", "--help", "--method", "fitnet", new=True).stdout.split())
    assert "fitnet (Hidden states of one layer of each model)" in shown
    assert "student layer that is led; default: the last" in shown


@pytest.mark.exhaustive
def test_it_is_benched_beside_the_paper_s_way(do: Do, made_teacher: Path, made_corpus: Path, tmp_path: Path) -> None:
    tiny = ["--device", "cpu", "--sizes", "tiny", "--methods", "fitnet", "--dtypes", "float32", "--sequences", 16]
    given = ["--tokenizer", made_teacher, "--corpus", made_corpus, "--results", tmp_path]
    do("bench.throughput", *tiny, "--steps", 1, "--warmup", 1, "--rounds", 1, *given)
    (group,) = json.loads((tmp_path / "throughput.json").read_text())["groups"]
    assert set(group["rows"]) == {"fastkd", "paper", "scratch"}, group["skipped"]
    assert re.search(r"\| `fitnet` \| \d", do("bench.predictions").stdout)


def test_it_is_tested_as_the_others_are(do: Do) -> None:
    """Its FLOPs and gradient against its plain definition, its micro-batches, its predictions, its names."""
    files = ("flops", "throughput", "methods", "train", "predictions", "device", "config")
    chosen = "fitnet or every_option or needs_no_torch or has_what_the_command_prints"
    tests = do(
        "pytest", "-v", "-p", "no:cacheprovider", *(f"tests/test_{file}.py" for file in files), "-k", chosen, new=True
    )
    passed = {line.split("::")[1] for line in tests.stdout.splitlines() if "fitnet" in line and "PASSED" in line}
    assert {name.split("[")[0] for name in passed} == {
        "test_a_step_of_every_method",
        "test_the_eager_way_has_fastkd_s_loss_and_gradients",
        "test_a_method_names_the_fused_losses_that_it_calls",
        "test_a_step_is_the_same_in_micro_batches_of_any_size",
        "test_every_method_and_size_has_a_prediction",
        "test_more_tokens_take_longer_and_a_small_step_waits_for_the_host",
        "test_a_step_is_compared_with_the_same_in_float64",
    }
