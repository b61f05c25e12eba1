"""The throughput bench: peers train fastkd's objectives, its command runs end to end, its ratios are what they say."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BertForMaskedLM

from bench import throughput
from bench.eager_methods import EagerStep
from bench.variants import VARIANTS, Clock, Spec, fastkd_parts
from fastkd import methods
from fastkd.models import hf
from fastkd.models.encoder import Encoder
from fastkd.train import Trainer

SIZE = throughput.SIZES["tiny"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    throughput.write_teacher(SIZE.teacher, folder)
    return folder


@pytest.fixture
def spec(teacher: Path, corpus_file: Path) -> Spec:
    return Spec(
        "fastkd", "mlm", SIZE.student, str(teacher), [str(corpus_file)], "cpu", "float32",
        sequences=16, seq_length=SIZE.seq_length, warmup=1, steps=1,
    )  # fmt: skip


@pytest.mark.parametrize("method", methods.available())
def test_the_eager_way_has_fastkd_s_loss_and_gradients(method: str, spec: Spec) -> None:
    """All that fastkd leaves out changes nothing: the plain computation gives the same, to 1e-5 in float32."""
    parts = fastkd_parts(Spec(**vars(spec) | {"method": method}))
    torch.manual_seed(0)
    with torch.no_grad():  # away from the initialisation, where much is nearly zero
        for parameter in parts.student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = parts.stream.step(0)[0]
    trainer = Trainer(parts)
    expected = trainer.objective(batch, trainer.teach(batch), trainer.clock).loss
    expected.backward()

    student = hf.to_hf_model(parts.student, mlm_head=True) if parts.student.head else None
    if student is None:
        student = BertForMaskedLM(hf.to_hf(parts.student.config))
        student.bert.load_state_dict(hf.to_hf_model(parts.student, mlm_head=False).state_dict())
    models = [student, BertForMaskedLM.from_pretrained(spec.teacher) if parts.teacher else None]
    for model in filter(None, models):
        model.eval().set_attn_implementation("eager")
    rows = (batch.input_ids, batch.masked_ids, _labels(batch), torch.ones_like(batch.input_ids))
    padding = (0, 0, -100, 0)
    ids, masked, labels, mask = (
        pad_sequence(row.split(batch.lengths), batch_first=True, padding_value=value)
        for row, value in zip(rows, padding, strict=True)
    )
    found = EagerStep(parts.method, *models)(ids, masked, labels, mask.bool())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.backward()
    theirs = hf.from_hf_model(student, mlm_head=parts.student.head is not None)
    reached = 0
    for (name, mine), plain in zip(parts.student.named_parameters(), gradients(student, theirs), strict=True):
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


def test_the_command_writes_both_files_and_keeps_other_groups(corpus_file: Path, tmp_path: Path, capsys) -> None:
    before = {
        "size": "tiny",
        "dtype": "float32",
        "method": "zz",
        "rows": {},
        "skipped": {"paper": "no time"},
        "compared": {},
        "environment": {"device": "a CPU", "cpu_threads": 2, "packages": {"torch": "2.13"}, "date": "2026-11-24"},
    }
    (tmp_path / "throughput.json").write_text(json.dumps({"groups": [before]}))
    argv = [
        "--device",
        "cpu",
        "--sizes",
        "tiny",
        "--methods",
        "minilm",
        "--dtypes",
        "float32",
        "--corpus",
        str(corpus_file),
    ]
    throughput.main([*argv, "--steps", "1", "--rounds", "1", "--sequences", "16", "--results", str(tmp_path)])
    measured, kept = json.loads((tmp_path / "throughput.json").read_text())["groups"]
    assert kept == before
    assert set(measured["rows"]) == {"fastkd", "paper", "scratch"}
    assert all(row["tokens_per_s"] > 0 and row["peak_memory_bytes"] > 0 for row in measured["rows"].values())
    assert "| tiny | float32 | minilm | fastkd |" in (tmp_path / "throughput.md").read_text()
    assert "a CPU, 2 CPU threads, torch 2.13; commit unknown" in (tmp_path / "throughput.md").read_text()
    assert "left out: no time" in (tmp_path / "throughput.md").read_text()


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
