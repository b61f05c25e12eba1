"""Activation memory against what autograd keeps; micro-batches that fit; what happens where one does not."""

import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from packed_text import VOCAB, pack
from safetensors.torch import load_file

from fastkd import run
from fastkd.comparison.budgets import release_memory
from fastkd.config import resolve
from fastkd.device import memory
from fastkd.distributed import World
from fastkd.files import read_jsonl
from fastkd.ledger import surviving_steps
from fastkd.models import encoder
from fastkd.models.encoder import Encoder, EncoderConfig
from fastkd.models.needs import Needs
from fastkd.setup import prepare

PACK = 16 * 32  # tokens of a pack of the small run


def saved_bytes(options: dict) -> tuple[int, int]:
    """(what a student's forward keeps for its backward, what the closed form says), parameters left out."""
    setup = prepare(resolve(options), World())
    parameters = {p.untyped_storage().data_ptr() for p in setup.student.parameters()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(x)  # so that no address is used twice
        return x

    held: list[torch.Tensor] = []
    batch = setup.stream().step(0)[0]
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=setup.dtype == torch.bfloat16),
    ):
        setup.student(setup.method.text(batch), batch, setup.method.student_needs)
    return sum(kept.values()), setup.activation_bytes(setup.micro_tokens)


@pytest.mark.parametrize(
    ("dtype", "residual"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
@pytest.mark.parametrize("method", ["mlm", "minilmv2"])
def test_activation_bytes_are_what_autograd_keeps(method: str, dtype: str, residual: str, corpus_file: Path) -> None:
    options = {
        "preset": "quickstart", "corpus": [str(corpus_file)], "student": "2L-96H-12A", "seq_length": 64,
        "batch_tokens": 2048, "method": method, "dtype": dtype, "residual": residual, "budget_tokens": 1e6,
    }  # fmt: skip
    found, predicted = saved_bytes(options)
    assert 0.8 * found <= predicted <= 1.25 * found


@torch._dynamo.config.patch(recompile_limit=2)
def test_graphs_of_earlier_rows_do_not_count_against_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit of recompilations a whole graph is refused: each row of a comparison starts with none."""
    monkeypatch.setitem(encoder.GRAPH, "backend", "eager")
    text = pack((9, 7, 16))
    for width in (16, 24, 32, 40, 48):
        release_memory()
        student = Encoder(EncoderConfig("bert", VOCAB, width, 2, 4, 2 * width, max_positions=64), mlm_head=True)
        student.compile_graphs()
        for needs in (Needs(logits=True), Needs(qkv=(2,))):
            student(text.input_ids, text, needs)


@pytest.mark.parametrize(
    ("rank_tokens", "expected"), [(4096, 2048), (8192, 2048), (1536, 1536), (512, 512), (7168, 1024)]
)
def test_the_largest_micro_batch_divides_the_rank_s_share(rank_tokens: int, expected: int) -> None:
    assert memory.largest_micro_batch(1.0, rank_tokens, PACK, torch.device("cpu")) == expected


def test_smaller_micro_batches_end_at_one_pack() -> None:
    tokens, seen = 12 * PACK, []
    while (smaller := memory.smaller_micro_batch(tokens, PACK)) is not None:
        seen.append(smaller // PACK)
        tokens = smaller
    assert seen == [6, 3, 1]


FAULTS = """
import resource, sys, torch
from fastkd.device import memory
if sys.argv[1] == "keep":
    memory.keep_what_is_freed(torch.device("cpu"))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(12):
    before = faults()
    x = torch.ones(12 << 20)
    y = x.exp()
    z = x + y
    del x, y, z
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept() -> None:
    """A late step that makes three blocks of 48 MiB asks the system for no page."""
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "default")
    }
    assert faults["keep"] < 100 < faults["default"]


# A run in which rank VICTIM's device holds no forward of more than 512 tokens.
OUT_OF_MEMORY = """
import os, sys, torch
from fastkd import run
from fastkd.models.encoder import Encoder
if os.environ["RANK"] == os.environ["VICTIM"]:
    whole = Encoder.forward
    def forward(self, ids, *args, **kwargs):
        if len(ids) > 512 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, ids, *args, **kwargs)
    Encoder.forward = forward
sys.exit(run.main(sys.argv[1:]))
"""


def test_all_ranks_take_a_smaller_micro_batch_where_one_runs_out_of_memory(
    from_scratch: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "out_of_memory.py"
    script.write_text(OUT_OF_MEMORY)
    options = [*from_scratch, "--batch-tokens", "2048", "--method", "mlm", "--budget-tokens", "8500"]
    assert run.main([*options, "--micro-batch", "512", "--output-dir", str(tmp_path / "alone")]) == 0
    result = processes.ranks(
        str(script), *options, "--micro-batch", "1024", "--output-dir", tmp_path / "two", VICTIM="1"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("out of memory: micro-batch 1024 → 512 tokens") == 2  # a line each
    assert len(read_jsonl(tmp_path / "two" / "ledger.jsonl")) == len(read_jsonl(tmp_path / "alone" / "ledger.jsonl"))
    alone, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("alone", "two"))
    assert max(float((alone[key] - two[key]).abs().max()) for key in alone) <= 1e-5


# A run in which rank 1's device gets so full before its fourth step that a whole micro-batch does not fit any more, or
# only its backward does not: then a part of the gradient has been exchanged. Or that is so while the plan times steps.
FULL_IN_THE_LOOP = """
import os, sys, threading, torch
from datetime import timedelta
torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1000  # so that the small student's gradient is in several buckets
from fastkd import distributed, run
from fastkd.loop import Loop
from fastkd.models.encoder import Encoder
from fastkd.train import Trainer

(where, *options), joined = sys.argv[1:], distributed.joined
distributed.joined = lambda: joined(timedelta(seconds=4))
if os.environ["RANK"] == "1":
    step, whole, loop, steps, tokens = Trainer.step, Encoder.forward, Loop.run, [], []
    loops, late = [], []

    def full(*gradient):
        if len(steps) == 4 and tokens[-1] > 512 and bool(loops) == (where != "plan"):
            late.append(where == "forward")
            raise torch.OutOfMemoryError("CUDA out of memory")

    def looped(self, *args):
        steps.clear()  # those of the plan
        loops.append(self)
        if where == "backward":
            next(self.trainer.objective.student.parameters()).register_hook(full)
        return loop(self, *args)

    def counted(self, batches, lr):
        steps.append(lr)
        return step(self, batches, lr)

    def forward(self, ids, *args, **kwargs):
        tokens.append(len(ids))
        if where != "backward" and torch.is_grad_enabled():
            full()
            if late and late.pop():  # it compiles for longer than the other rank would wait within a step
                threading.Event().wait(6)
        return whole(self, ids, *args, **kwargs)

    Loop.run, Trainer.step, Encoder.forward = looped, counted, forward
sys.exit(run.main(options))
"""


@pytest.mark.parametrize("where", ["forward", "backward", "plan"])
def test_all_ranks_repeat_a_step_in_which_one_runs_out_of_memory(
    where: str, from_scratch: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "full.py"
    script.write_text(FULL_IN_THE_LOOP)
    options = [*from_scratch, "--batch-tokens", "2048", "--method", "mlm", "--budget-tokens", "16000"]
    assert run.main([*options, "--micro-batch", "512", "--output-dir", str(tmp_path / "alone")]) == 0
    result = processes.ranks(str(script), where, *options, "--micro-batch", "1024", "--output-dir", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("out of memory: micro-batch 1024 → 512 tokens") == 2  # a line each
    alone, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("alone", "two"))
    assert max(float((alone[key] - two[key]).abs().max()) for key in alone) <= 1e-5
    steps = [surviving_steps(tmp_path / name / "ledger.jsonl") for name in ("alone", "two")]
    assert [line["tokens"] for line in steps[0]] == [line["tokens"] for line in steps[1]]


def test_one_pack_that_does_not_fit_is_refused(small: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    from fastkd.models.encoder import Encoder

    def forward(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Encoder, "forward", forward)
    argv = [*small, "--method", "mlm", "--budget-tokens", "8500", "--output-dir", str(tmp_path / "run")]
    assert run.main(argv) == 2
    assert "give a smaller --student or --seq-length" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
