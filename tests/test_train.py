"""The train step: out of memory it goes on in smaller parts; on a GPU nothing waits, and a compiled teacher is the same."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import made_model
import pytest
import torch

from fastkd import methods, planning
from fastkd.config import resolve
from fastkd.data.batches import Batch
from fastkd.distributed import World
from fastkd.ledger import surviving_steps
from fastkd.loop import Loop
from fastkd.models import encoder
from fastkd.models.teacher import Teacher
from fastkd.monitor import SilentMonitor
from fastkd.setup import Setup, load_model, prepare
from fastkd.train import Trainer

GPU = World(device=torch.device("cuda", 0))


@pytest.fixture
def setup_of(made_corpus: Path, made_teacher: Path) -> Callable[..., Setup]:
    """A run's setup, on text and with a teacher that no package carries."""

    def make(method: str, world: World = GPU, **options: object) -> Setup:
        uses_teacher = methods.load(method).METHOD.uses_teacher
        values = {
            "preset": "quickstart", "method": method, "corpus": [str(made_corpus)], "student": "2L-96H-12A",
            "teacher" if uses_teacher else "tokenizer": str(made_teacher), "seq_length": 64, "batch_tokens": 4096,
            "budget_tokens": 4096 * 40, "compile": False, "log_every": 1000, "validations": 0, **options,
        }  # fmt: skip
        return prepare(resolve(values), world)

    return make


def test_held_out_text_is_masked_alike_whatever_the_rate_of_training(setup_of: Callable[..., Setup]) -> None:
    usual, denser = (setup_of("mlm", World(), dtype="float32", mask_rate=rate) for rate in (0.15, 0.3))
    for mine, theirs in zip(usual.validation(), denser.validation(), strict=True):
        assert torch.equal(mine.masked_ids, theirs.masked_ids) and torch.equal(mine.labels, theirs.labels)
        assert len(mine.predicted) == pytest.approx(0.15 * len(mine.input_ids), rel=0.01)  # rounded in each pack
    assert len(denser.stream().step(0)[0].predicted) > 1.9 * len(usual.stream().step(0)[0].predicted)


@pytest.mark.parametrize("method", methods.available())
def test_a_step_is_the_same_in_micro_batches_of_any_size(
    method: str, setup_of: Callable[..., Setup], tmp_path: Path
) -> None:
    """Loss and gradient are means over the step, though some micro-batches have more to predict than others."""
    (tmp_path / "scarce.txt").write_text(made_model.scarce(made_model.texts(100)))
    own = {"student": "2L-192H-12A", "cosine_weight": 1.0} if method == "logit_kd" else {}
    sizes = {"seq_length": 32, "batch_tokens": 2048, "micro_batch": "2048", "mask_rate": 0.6}
    setup = setup_of(method, World(), corpus=[str(tmp_path / "scarce.txt")], dtype="float32", **sizes, **own)
    trainer = Trainer(setup)

    def measured() -> tuple[float, torch.Tensor]:
        batches = trainer.stream.step(0)
        losses = [trainer.micro_step(batch, 1 / len(batches)).loss.item() for batch in batches]
        gradient = torch.cat([p.grad.flatten() for p in trainer.trained])
        trainer.objective.zero_grad()
        return sum(losses) / len(losses), gradient

    loss, gradient = measured()
    trainer.set_micro_batch(512)
    assert len({int((batch.labels >= 0).sum()) for batch in trainer.stream.step(0)}) > 1
    cut_loss, cut_gradient = measured()
    assert cut_loss == pytest.approx(loss, rel=1e-6)
    assert float((cut_gradient - gradient).norm()) <= 1e-5 * float(gradient.norm())


def short_of_memory(monkeypatch: pytest.MonkeyPatch, *, after: int) -> list[int]:
    """From now on, so many steps fit; later ones run out of memory above 2,048 tokens a micro-batch. Returns the sizes taken."""
    plain, taken = Trainer.step, list[int]()

    def limited(self: Trainer, batches: list[Batch], lr: float) -> object:
        if len(taken) >= after and len(batches[0].input_ids) > 2048:
            raise torch.OutOfMemoryError("what a device says")
        taken.append(len(batches[0].input_ids))
        return plain(self, batches, lr)

    monkeypatch.setattr(Trainer, "step", limited)
    return taken


def test_running_out_of_memory_in_the_loop_halves_once(
    setup_of: Callable[..., Setup], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps after it, which were read ahead in the old size, take the new one too."""
    setup = setup_of("mlm", World(), dtype="float32", micro_batch="4096")
    trainer, taken = Trainer(setup), short_of_memory(monkeypatch, after=2)

    budget = setup.config.budget
    loop = Loop(trainer, tmp_path, SilentMonitor(tmp_path, budget.amount, budget.unit, log_every=1000), [0.01])
    with contextlib.closing(loop.ledger):
        loop.run()
    assert taken[:2] == [4096, 4096] and set(taken[2:]) == {2048} and trainer.micro_tokens == 2048
    steps = surviving_steps(tmp_path / "ledger.jsonl")
    assert [line["step"] for line in steps] == list(range(1, len(taken) + 1))


def test_running_out_of_memory_in_the_plans_steps_halves_too(
    setup_of: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(setup_of("mlm", World(), dtype="float32", micro_batch="4096"))
    taken = short_of_memory(monkeypatch, after=3)
    before = {name: value.clone() for name, value in trainer.objective.state_dict().items()}

    monkeypatch.setattr(planning, "MEASURED_STEPS", 3)
    assert planning.measure(trainer)[0].step_seconds > 0
    assert taken == [4096] * 3 + [2048] * 5 and trainer.micro_tokens == 2048
    assert all(torch.equal(value, before[name]) for name, value in trainer.objective.state_dict().items())
    assert not trainer.optimizer.state


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_inductors_step_is_the_plain_one(setup_of: Callable[..., Setup]) -> None:
    students = []
    for compiled in (False, True):
        torch.compiler.reset()
        setup = setup_of("mlm", World(), dtype="float32", compile=compiled, micro_batch="4096", student="1L-96H-12A")
        trainer = Trainer(setup)
        trainer.micro_step(trainer.stream.step(0)[0], 1.0)
        students.append(list(setup.student.parameters()))
    for ours, plain in zip(*students, strict=True):
        assert (ours.grad - plain.grad).norm() <= 1e-5 * plain.grad.norm()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layers_survive_a_halving(setup_of: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size is compiled for training, for validation and for the teacher; smaller ones start with a clean slate."""
    monkeypatch.setitem(encoder.GRAPH, "backend", "aot_eager")  # the limit is Dynamo's
    monkeypatch.setattr(torch._dynamo.config, "cache_size_limit", 8)
    setup = setup_of(
        "logit_kd", World(), dtype="float32", compile=True, micro_batch="4096", budget_tokens=1e6, student="1L-96H-12A"
    )
    trainer = Trainer(setup)
    trainer.validate()
    for _ in range(2):
        trainer.halve_micro_batch()
        trainer.step(trainer.stream.step(0), 1e-3)
        trainer.validate()


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("method", "optimizer"), [*((name, "adamw") for name in methods.available()), ("mlm", "muon")])
def test_no_step_waits_for_the_device(
    method: str, optimizer: str, compile: bool, setup_of: Callable[..., Setup], tmp_path: Path
) -> None:
    """From the fifth step on, whatever makes the host wait between two lines of the log raises."""
    trainer = Trainer(setup_of(method, compile=compile, optimizer=optimizer))
    budget = trainer.setup.config.budget
    loop = Loop(trainer, tmp_path, SilentMonitor(tmp_path, budget.amount, budget.unit, log_every=1000), [0.01])
    steps = 0

    def watch() -> None:
        nonlocal steps
        steps += 1
        torch.cuda.set_sync_debug_mode("error" if 5 <= steps < 30 else "default")

    try:
        loop.run(watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps >= 30


@pytest.mark.gpu
def test_a_compiled_teacher_teaches_the_same(setup_of: Callable[..., Setup], made_teacher: Path) -> None:
    setup = setup_of("tinybert")
    assert setup.teacher is not None
    compiled = Teacher(
        load_model(str(made_teacher)), setup.teacher.needs, device=GPU.device, dtype=torch.bfloat16,
        longest=setup.config.seq_length, attention=setup.attention, compile=True,
    )  # fmt: skip
    stream = setup.stream()
    for step in range(3):
        batch = stream.step(step)[0]
        plain, fast = setup.teacher(batch.input_ids, batch), compiled(batch.input_ids, batch)
        for layer, hidden in plain.hidden.items():
            error = (fast.hidden[layer] - hidden).norm() / hidden.norm()
            assert error < 1e-2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.gpu
def test_a_float8_teacher_teaches_nearly_the_same(setup_of: Callable[..., Setup]) -> None:
    pytest.importorskip("torchao")
    setup = setup_of("tinybert", teacher_dtype="float8")  # refused where the loss moves
    batch = setup.stream().step(0)[0]
    assert setup.teacher is not None
    out = setup.teacher(batch.input_ids, batch)
    assert all(hidden.isfinite().all() for hidden in out.hidden.values())
