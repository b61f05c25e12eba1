"""One way to train, built and timed in a process of its own: what ``bench.throughput`` starts for each row.

    python -m bench.variants '{"variant": "fastkd", …}'        (the fields of Spec; prints one line of JSON)

A step is one batch of ``sequences`` × ``seq_length`` positions, from text to updated parameters. ``fastkd`` fills every
position with text (unpadded packs); ``trainer`` and ``trainer-compile`` cut joined documents into full blocks, as
transformers' run_mlm does; ``paper`` and ``bertdistiller`` pad each document's pieces, as their authors do.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from transformers import logging as hf_logging

from bench.eager_methods import EagerStep
from fastkd import methods
from fastkd.config import resolve
from fastkd.data.assembly import SpecialIds
from fastkd.data.sequences import Text, permutation
from fastkd.data.shards import build_shards, cache
from fastkd.device.clock import PhaseClock
from fastkd.distributed import World
from fastkd.models import hf
from fastkd.models import student as students
from fastkd.setup import Setup, prepare
from fastkd.train import Trainer

LEARNING_RATE = 5e-4
MASK_RATE = 0.15
ADAMW = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01}


@dataclass(frozen=True)
class Spec:
    """What to run and for how long."""

    variant: str  # a key of VARIANTS
    method: str
    student: str  # 3L-384H-12A
    teacher: str  # folder with a teacher of transformers' BertForMaskedLM and the tokenizer
    corpus: list[str]
    device: str
    dtype: str  # bfloat16 or float32
    sequences: int
    seq_length: int
    warmup: int  # steps before the clock starts
    steps: int
    options: dict[str, Any] = field(default_factory=dict)  # of fastkd.run, beside those above


class Clock:
    """Times the steps after the warm-up. Of a GPU it waits at both ends only, so that the host may run ahead."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.device = spec, torch.device(spec.device)
        self.done, self.tokens, self.seconds = 0, 0.0, 0.0
        self._started = 0.0

    def step(self, tokens: float) -> None:
        """A step over ``tokens`` tokens of text (padding not counted) was issued."""
        self.done += 1
        if self.done > self.spec.warmup:
            self.tokens += tokens
        if self.done in (self.spec.warmup, self.total):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds, self._started = time.perf_counter() - self._started, time.perf_counter()

    @property
    def total(self) -> int:
        """Steps, the warm-up included."""
        return self.spec.warmup + self.spec.steps


def memory_bytes() -> tuple[int, int]:
    """(resident, most resident) bytes of this process. Not ru_maxrss, which a child inherits from its parent."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    resident, peak = (int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return resident, peak


# ---- fastkd -------------------------------------------------------------------------------------------------


def fastkd(spec: Spec, clock: Clock) -> dict[str, Any]:
    """fastkd's own step on its own stream, without a run's ledger and files. Also FLOPs a token."""
    setup = fastkd_setup(spec)
    trainer, tokens, cost = Trainer(setup), 0, 0
    with contextlib.closing(trainer.stream.prefetch(0)) as stream:
        for number in range(clock.total):
            trainer.clock = PhaseClock(trainer.device)
            trainer.step(next(stream), LEARNING_RATE)
            step = trainer.step_cost(number)
            tokens, cost = tokens + step.real, cost + sum(step.flops.values())
            clock.step(step.real)
    return {
        "flops_a_token": cost / tokens, "compile": setup.compile, "attention": setup.attention,
        "micro_tokens": trainer.micro_tokens,
    }  # fmt: skip


def fastkd_setup(spec: Spec) -> Setup:
    """What a run with these options is made of."""
    teacher = "teacher" if methods.load(spec.method).METHOD.uses_teacher else "tokenizer"
    options = {
        "preset": "quickstart", "method": spec.method, teacher: spec.teacher, "student": spec.student,
        "corpus": spec.corpus, "seq_length": spec.seq_length, "batch_tokens": spec.sequences * spec.seq_length,
        "dtype": spec.dtype, "budget_tokens": 1e15, **spec.options,
    }  # fmt: skip
    return prepare(resolve(options), World(device=torch.device(spec.device)))


# ---- peers --------------------------------------------------------------------------------------------------


def paper(spec: Spec, clock: Clock) -> dict[str, Any]:
    """`EagerStep` on padded batches; static masks; torch's AdamW without clipping."""
    device, method = torch.device(spec.device), method_of(spec)
    student = BertForMaskedLM._from_config(student_config(spec), attn_implementation="eager").to(device).train()
    teacher = None
    if method.uses_teacher:
        teacher = BertForMaskedLM.from_pretrained(spec.teacher, trust_remote_code=False, attn_implementation="eager")
        teacher = nn.Module.to(teacher, device).eval()
    method.initialise(torch.Generator().manual_seed(0), device)
    step = EagerStep(method, student, teacher)
    trained = [*student.parameters(), *nn.ModuleDict(method.modules).parameters()]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, **ADAMW)  # type: ignore[arg-type]
    for batch in padded_batches(spec, clock.total):
        ids, masked, labels, mask = (tensor.to(device) for tensor in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=spec.dtype == "bfloat16"):
            loss = step(ids, masked, labels, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.step(int(batch[-1].sum()))
    return {}


def trainer(spec: Spec, clock: Clock, **options: Any) -> dict[str, Any]:
    """transformers' Trainer for masked language modelling, as run_mlm sets it up: full blocks, dynamic masks."""
    tokenizer = AutoTokenizer.from_pretrained(spec.teacher, trust_remote_code=False)
    blocks = sequences(spec, tokenizer, clock.total * spec.sequences, packing="full-sentences")
    with tempfile.TemporaryDirectory() as folder:
        transformers.Trainer(
            BertForMaskedLM._from_config(student_config(spec), attn_implementation="sdpa"),
            TrainingArguments(**trainer_options(spec, clock, folder), **options),
            train_dataset=[{"input_ids": ids} for ids in blocks],
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASK_RATE),
            callbacks=[_Timed(clock, sum(map(len, blocks)) / clock.total)],
        ).train()
    return {}


def trainer_compile(spec: Spec, clock: Clock) -> dict[str, Any]:
    """`trainer` with torch.compile."""
    return trainer(spec, clock, torch_compile=True)


def bertdistiller(spec: Spec, clock: Clock) -> dict[str, Any]:
    """The MiniLMTrainer of the bertdistiller package, as its README sets it up, on batches padded by its collator."""
    from bertdistiller import MiniLMTrainer, MiniLMTrainingArguments, create_student

    method: Any = method_of(spec)
    config = student_config(spec)
    tokenizer = AutoTokenizer.from_pretrained(spec.teacher, trust_remote_code=False)
    rows = sequences(spec, tokenizer, clock.total * spec.sequences, packing="documents")
    with tempfile.TemporaryDirectory() as folder:
        arguments = MiniLMTrainingArguments(
            teacher_layer=method.layer, student_layer=config.num_hidden_layers, student_hidden_size=config.hidden_size,
            student_attention_heads=config.num_attention_heads, num_relation_heads=method.relation_heads,
            **trainer_options(spec, clock, folder),
        )  # fmt: skip
        MiniLMTrainer(
            teacher_model=AutoModel.from_pretrained(spec.teacher, trust_remote_code=False),
            model=create_student(spec.teacher, arguments),
            args=arguments,
            train_dataset=[{"input_ids": ids} for ids in rows],
            data_collator=DataCollatorWithPadding(tokenizer, padding="max_length", max_length=spec.seq_length),
            callbacks=[_Timed(clock, sum(map(len, rows)) / clock.total)],
        ).train()
    return {}


class _Timed(TrainerCallback):
    """Tells the clock of each step of transformers' Trainer."""

    def __init__(self, clock: Clock, tokens: float) -> None:
        self._clock, self._tokens = clock, tokens

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._clock.step(self._tokens)


def trainer_options(spec: Spec, clock: Clock, folder: str) -> dict[str, Any]:
    """Arguments of transformers' Trainer: the paper's optimiser, nothing saved, nothing logged."""
    return {
        "output_dir": folder, "per_device_train_batch_size": spec.sequences, "max_steps": clock.total,
        "learning_rate": LEARNING_RATE, "adam_beta2": ADAMW["betas"][1], "adam_epsilon": ADAMW["eps"],  # type: ignore[index]
        "weight_decay": ADAMW["weight_decay"], "bf16": spec.dtype == "bfloat16", "use_cpu": spec.device == "cpu",
        "save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": spec.device == "cuda",
    }  # fmt: skip


# ---- what peers are fed -------------------------------------------------------------------------------------


def method_of(spec: Spec) -> methods.Method:
    """fastkd's method with its defaults for these two models."""
    module, like = methods.load(spec.method), hf.load(spec.teacher)
    student = students.student_config(spec.student, like.config, like.tokenizer)
    return module.METHOD(module.Config(), student, like.config if module.METHOD.uses_teacher else None)


def student_config(spec: Spec) -> Any:
    """transformers' configuration of the student, without dropout."""
    like = hf.load(spec.teacher)
    config = hf.to_hf(students.student_config(spec.student, like.config, like.tokenizer))
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return config


def sequences(spec: Spec, tokenizer: PreTrainedTokenizerBase, count: int, packing: str) -> list[list[int]]:
    """Token ids of ``count`` sequences of the corpus in random order, with [CLS] and [SEP]; again from the start if short."""
    shards = build_shards(spec.corpus, tokenizer, cache(), tokens=count * spec.seq_length)
    tokens, offsets = shards.documents("train")
    special = SpecialIds.of(tokenizer)
    text = Text(
        tokens, offsets, seq_length=spec.seq_length, packing=packing, separator=special.sep, max_tokens=None
    )  # fmt: skip
    chosen = itertools.islice(itertools.cycle(permutation(len(text.start), 0).tolist()), count)
    contents = (text.ids(text.start[number] + np.arange(text.length[number])).tolist() for number in chosen)
    return [[special.cls, *content, special.sep] for content in contents]


def padded_batches(spec: Spec, count: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Batches (ids, masked ids, labels, attention mask), each [B, S], of sequences that end with their document."""
    tokenizer = AutoTokenizer.from_pretrained(spec.teacher, trust_remote_code=False)
    special = SpecialIds.of(tokenizer)
    rows = sequences(spec, tokenizer, count * spec.sequences, packing="documents")
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(spec.seq_length) < lengths[:, None]
    ids = torch.full(mask.shape, special.pad)
    ids[mask] = torch.tensor(list(itertools.chain.from_iterable(rows)))
    chosen = (torch.rand(ids.shape) < MASK_RATE) & mask
    everything = ids, ids.masked_fill(chosen, special.mask), ids.masked_fill(~chosen, -100), mask
    return list(zip(*(tensor.split(spec.sequences) for tensor in everything), strict=True))


VARIANTS: dict[str, Callable[[Spec, Clock], dict[str, Any]]] = {
    "fastkd": fastkd,
    "paper": paper,
    "trainer": trainer,
    "trainer-compile": trainer_compile,
    "bertdistiller": bertdistiller,
}


def main() -> None:
    """Run the variant that the argument describes and print what was measured."""
    spec = Spec(**json.loads(sys.argv[1]))
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    torch.manual_seed(0)
    before, _ = memory_bytes()
    clock = Clock(spec)
    facts = VARIANTS[spec.variant](spec, clock)
    positions = spec.steps * spec.sequences * spec.seq_length
    peak = torch.cuda.max_memory_allocated() if spec.device == "cuda" else memory_bytes()[1] - before
    measured = {"tokens_per_s": clock.tokens / clock.seconds, "step_s": clock.seconds / spec.steps,
                "text_share": clock.tokens / positions, "peak_memory_bytes": peak}  # fmt: skip
    print(json.dumps(measured | facts))


if __name__ == "__main__":
    main()
