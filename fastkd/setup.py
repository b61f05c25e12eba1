"""From a command line's meaning to checked, loaded parts. Everything that can be refused is refused here, unspent.

The shards' cache is all that this writes, and only after models, method and corpus have been found to fit.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fastkd import methods, quickstart
from fastkd.budget import StepCost
from fastkd.config import Resolved
from fastkd.data import corpus
from fastkd.data.batches import Batch, BatchStream, SpecialIds, pack_size, validation_batches
from fastkd.data.hub_requests import HubUnreachable
from fastkd.data.progress import Progress, Shown
from fastkd.data.recipe import FIRST_TOKENS
from fastkd.data.shards import Shards, build_shards, cache
from fastkd.data.unknown import require_ordinary, unknown_remark, unknown_share
from fastkd.device import memory
from fastkd.device.peaks import fastest_dtype
from fastkd.distributed import World, any_rank, barrier, on_main, smallest
from fastkd.methods import Method
from fastkd.models import float8, flops, hf
from fastkd.models import student as students
from fastkd.models.attention import Setting
from fastkd.models.encoder import Encoder, EncoderConfig, Needs
from fastkd.models.teacher import Teacher, check_teacher
from fastkd.run_config import BFLOAT16_STREAM, RunConfig

log = logging.getLogger(__name__)

VALIDATION_STEPS = 8  # held-out text is read up to the tokens of this many steps


@dataclass
class Parts:
    """All that a run is made of, on its device, before the first step."""

    config: RunConfig
    world: World
    dtype: torch.dtype
    attention: str  # the student's backend
    attention_remark: str | None  # why it is a slow one
    compile: bool
    tokenizer: PreTrainedTokenizerBase
    student: Encoder
    method: Method
    teacher: Teacher | None
    teacher_parameters: int  # of the whole checkpoint, of which only what is read is kept
    teacher_version: str | None  # sha256 of the teacher's files, or its commit on the hub
    shards: Shards
    lr: float
    micro_tokens: int = 0
    stream: BatchStream = field(init=False)
    validation: list[Batch] = field(default_factory=list)
    _counted: tuple[int, StepCost] | None = field(default=None, init=False)

    @property
    def inputs(self) -> dict[str, str | None]:
        """What was read from outside, by content: a run that is resumed must find the same."""
        return {"corpus_version": self.shards.version, "teacher_version": self.teacher_version}

    @property
    def pack_tokens(self) -> int:
        """What micro-batches are multiples of."""
        return pack_size(self.config.seq_length)

    def set_micro_batch(self, tokens: int) -> None:
        """Cut the training batches into micro-batches of ``tokens``; what a step holds does not depend on it."""
        config, world = self.config, self.world
        before, self.micro_tokens = self.micro_tokens, tokens
        if before:
            self.stream = self.stream.recut(tokens)
            return
        self.stream = BatchStream(
            self.shards,
            SpecialIds.of(self.tokenizer),
            seq_length=config.seq_length,
            batch_tokens=config.batch_tokens,
            micro_tokens=tokens,
            mask_rate=config.mask_rate,
            packing=config.packing,
            max_unique_tokens=config.unique_tokens,
            seed=config.seed,
            rank=world.rank,
            world=world.size,
            device=world.device,
        )

    def step_cost(self, step: int) -> StepCost:
        """FLOPs and tokens of a step over all ranks, from real lengths, known before it runs."""
        if self._counted is not None and self._counted[0] == step:  # asked when a step is decided and when it is issued
            return self._counted[1]
        count = self.stream.tokens_of(step)
        shape = {"tokens": self.config.batch_tokens, "pairs": count.pairs, "predicted": count.predicted}
        student = flops.forward_flops(self.student.config, self.method.student_needs, **shape)
        teacher = 0
        if self.teacher is not None:
            teacher = flops.forward_flops(self.teacher.config, self.teacher.needs, **shape)
        parts = {
            "student": student + flops.backward_flops(student),
            "teacher": teacher,
            "loss": self.method.loss_flops(**shape),
        }
        self._counted = step, StepCost(parts, count.real, count.predicted)
        return self._counted[1]

    def activation_bytes(self, tokens: int) -> int:
        """What a forward of ``tokens`` keeps for its backward."""
        return memory.activation_bytes(
            self.student.config,
            self.method.student_needs,
            tokens=tokens,
            predicted=round(self.config.mask_rate * tokens),
            itemsize=self.dtype.itemsize,
            residual_itemsize=getattr(torch, self.config.residual).itemsize,
            weight_pairs=tokens * self.config.seq_length if self._keeps_attention_weights else 0,
        )

    @property
    def _keeps_attention_weights(self) -> bool:
        return self.world.device.type == "cpu" and (self.dtype == torch.bfloat16 or self.config.dropout > 0)


def prepare(resolved: Resolved, world: World) -> Parts:
    """Load and check everything that a run needs.

    Raises:
        ValueError: in one line, what does not fit and what to do about it.
    """
    config = resolved.run
    wanted = {"teacher": (config.teacher, config.tokenizer), "text": config.corpus}
    quickstart.require(*(what for what, named in wanted.items() if quickstart.NAME in named))
    dtype = compute_dtype(config.dtype, world)
    if config.residual == "bfloat16" and dtype == torch.float32:
        raise ValueError(BFLOAT16_STREAM)
    with suppress(HubUnreachable):  # what was prepared of it may do; if not, the shards say so
        corpus.check(config.corpus, text_field=config.text_field)
    if config.teacher_dtype == "float8":
        float8.require(world.device)
    if config.teacher:
        log.info("loading the teacher %s", config.teacher)
    loaded = load_model(config.teacher) if config.teacher else None
    like, tokenizer = _tokenizer(config, loaded)
    student_config = students.student_config(config.student, like, tokenizer)
    setting = Setting.on(world.device, dtype, student_config.head_width, config.dropout, config.seq_length)
    attention = setting.choose(config.attention)
    memory.require_room(student_config, world.device)
    if config.seq_length > student_config.max_length:
        raise ValueError(
            f"--seq-length {config.seq_length} is beyond the model's {student_config.max_length} positions; lower it"
        )
    method = methods.load(config.method).METHOD(resolved.method, student_config, loaded.config if loaded else None)
    if loaded is not None:
        check_teacher(loaded, student_config, tokenizer, method.teacher_needs or Needs(), config.seq_length)
    student = Encoder(
        student_config, mlm_head=method.trains_mlm_head, attention=attention, residual=getattr(torch, config.residual),
        seed=config.seed,
    )  # fmt: skip
    method.initialise(torch.Generator().manual_seed(config.seed), world.device)
    if config.init_from_teacher:
        if loaded is None:
            raise ValueError("--init-from-teacher needs a teacher: give --teacher")
        students.init_from_teacher(student, loaded.encoder)
    use_compile = world.device.type == "cuda" if config.compile is None else config.compile
    teacher = None
    if loaded is not None and method.teacher_needs is not None:
        teacher = Teacher(
            loaded, method.teacher_needs, device=world.device, dtype=dtype, longest=config.seq_length,
            attention=config.attention, compile=use_compile, float8=config.teacher_dtype == "float8",
        )  # fmt: skip
    shards = _shards(config, tokenizer, world)
    student = student.to(world.device)
    lr = config.lr or method.default_lr
    teacher_parameters = sum(p.numel() for p in loaded.encoder.parameters()) if loaded else 0
    teacher_version = (loaded.sha256 or loaded.revision) if loaded else None
    parts = Parts(
        config, world, dtype, attention, setting.remark(attention), use_compile, tokenizer, student, method, teacher,
        teacher_parameters, teacher_version, shards, lr,
    )  # fmt: skip
    parts.set_micro_batch(_micro_batch(parts))
    parts.validation = _validation(parts)
    if loaded is not None and teacher is not None and config.teacher_dtype == "float8":
        float8.check(lambda name: _loss_of_teacher(parts, loaded, name), world)
    return parts


def _validation(parts: Parts) -> list[Batch]:
    """This rank's share of the held-out text."""
    config, world = parts.config, parts.world
    return validation_batches(
        parts.shards,
        SpecialIds.of(parts.tokenizer),
        seq_length=config.seq_length,
        micro_tokens=parts.micro_tokens,
        mask_rate=config.mask_rate,
        max_tokens=VALIDATION_STEPS * config.batch_tokens,
        rank=world.rank,
        world=world.size,
        device=world.device,
        packing=config.packing,
    )


def _loss_of_teacher(parts: Parts, loaded: hf.Loaded, name: str) -> float:
    """The loss of a held-out batch and the untrained student with the teacher in float32, bfloat16 or float8."""
    device, batch, method, student = parts.world.device, parts.validation[0], parts.method, parts.student
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    assert method.teacher_needs is not None
    longest, float8 = parts.config.seq_length, name == "float8"
    teacher = Teacher(loaded, method.teacher_needs, device=device, dtype=dtype, longest=longest, float8=float8)
    taught = teacher(method.text(batch), batch)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=parts.dtype != torch.float32):
        out = student(method.text(batch), batch, method.student_needs)
        return float(method.compute(out, taught, batch, student, teacher).loss)


def compute_dtype(name: str, world: World) -> torch.dtype:
    """The dtype that was asked for; for ``auto`` bfloat16 where every rank's device is faster in it, else float32."""
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    slow = any_rank(world, fastest_dtype(world.device) != torch.bfloat16)
    return torch.float32 if slow else torch.bfloat16


def model_folder(source: str) -> str | Path:
    """Where a model is: a hub id or folder as it is, and the packaged folder for the name ``quickstart``.

    Raises:
        ValueError: the package is not installed.
    """
    return quickstart.folder() if source == quickstart.NAME else source


def load_model(source: str) -> hf.Loaded:
    """A model by hub id, folder, finished run, or the name ``quickstart``: the packaged one, its digest verified."""
    return hf.load(model_folder(source), sha256=quickstart.SHA256 if source == quickstart.NAME else None)


def _tokenizer(config: RunConfig, teacher: hf.Loaded | None) -> tuple[EncoderConfig, PreTrainedTokenizerBase]:
    """The student's tokenizer, and the model whose family, positions and vocabulary it shares."""
    if config.tokenizer is None and teacher is not None:
        return teacher.config, teacher.tokenizer
    if config.tokenizer is None:
        raise ValueError("a run without a teacher needs --tokenizer: a hub id or a folder (or 'quickstart')")
    return hf.shape(model_folder(config.tokenizer))


def build_corpus(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, tokens: int | None, progress: Progress
) -> Shards:
    """The corpus of a run, tokenised as far as ``tokens`` of its training split; None: all of it.

    Raises:
        ValueError: it cannot be read, or the tokenizer knows next to nothing of it.
    """
    build = partial(
        build_shards, config.corpus, tokenizer, cache(), text_field=config.text_field, progress=progress,
        first_tokens=FIRST_TOKENS,
    )  # fmt: skip
    first = build(tokens=1)
    ids, _ = first.first.documents()
    unknown_remark(unknown_share(ids, tokenizer.unk_token_id))  # before more is tokenised
    require_ordinary(ids, tokenizer.all_special_ids)
    return first if tokens == 1 else build(tokens=tokens)


def _shards(config: RunConfig, tokenizer: PreTrainedTokenizerBase, world: World) -> Shards:
    """The tokenised corpus: its first part is built by rank 0 of each node, which builds the others while it trains."""
    mine, first = None, int(os.environ.get("LOCAL_RANK", "0")) == 0
    if first:
        shown = Shown(log.info, FIRST_TOKENS) if world.is_main else Progress()
        with shown:
            mine = build_corpus(config, tokenizer, tokens=1, progress=shown)
    given = corpus.shard_folder(config.corpus)
    version = on_main(world, lambda: mine.version if mine else "")
    if mine is None:
        barrier(world)
        mine = build_corpus(config, tokenizer, tokens=1, progress=Progress()) if given else Shards(cache() / version)
    else:
        barrier(world)
    if mine.version != version:
        raise ValueError(f"the corpus is another on this node (rank {world.rank}) than on rank 0's: copy it again")
    return mine


def _micro_batch(parts: Parts) -> int:
    """The micro-batch that was asked for, or the largest that fits the device."""
    if parts.config.micro_batch != "auto":
        return int(parts.config.micro_batch)
    a_token = parts.activation_bytes(parts.pack_tokens) / parts.pack_tokens
    rank_tokens = parts.config.batch_tokens // parts.world.size
    fits = memory.largest_micro_batch(a_token, rank_tokens, parts.pack_tokens, parts.world.device)
    return int(smallest(parts.world, fits))
