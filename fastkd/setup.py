"""From a command line's meaning to a checked, loaded `Setup`. All that can be refused is refused here, before anything is spent.

Only the shards' cache is written, and only once models, method and corpus are known to fit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from fastkd import methods, micro_batch, muon, quickstart, recipe
from fastkd.budget import StepCost
from fastkd.config import Resolved
from fastkd.data import corpus
from fastkd.data.batches import Batch, BatchStream, SpecialIds, StepTokens, pack_size, validation_batches
from fastkd.data.hub_requests import HubUnreachable
from fastkd.data.progress import Progress, Shown
from fastkd.data.recipe import FIRST_TOKENS
from fastkd.data.shards import Shards, build_shards, cache
from fastkd.data.unknown import require_ordinary, unknown_remark, unknown_share
from fastkd.device import memory
from fastkd.device.clock import now
from fastkd.device.peaks import fastest_dtype
from fastkd.distributed import World, any_rank, barrier, on_main
from fastkd.files import file_sha256
from fastkd.methods import Method
from fastkd.models import float8, flops, hf, importance, subcloning, weights
from fastkd.models import student as students
from fastkd.models import tokenizer as tokenizers
from fastkd.models.attention import Setting
from fastkd.models.encoder import Encoder, EncoderConfig
from fastkd.models.needs import Needs
from fastkd.models.teacher import Teacher, check_teacher
from fastkd.recipe import Stage
from fastkd.run_config import BFLOAT16_STREAM, RunConfig
from fastkd.stages import Stages

log = logging.getLogger(__name__)

VALIDATION_STEPS = 8  # held-out text is read up to the tokens of this many steps
IMPORTANCE_PACKS = 8  # a teacher's neurons are ranked on this many packs of the training text
VALIDATION_MASK_RATE = 0.15  # whatever --mask-rate trains with: held-out losses of all runs are about the same task


@dataclass(frozen=True)
class Setup:
    """All that a run is made of, checked and on its device, before the first step."""

    config: RunConfig
    world: World
    dtype: torch.dtype
    attention: str  # the student's backend
    attention_remark: str | None  # why it is a slow one
    compile: bool
    tokenizer: PreTrainedTokenizerBase
    student: Encoder
    stages: Stages
    teacher_parameters: int  # of the whole checkpoint: `teacher` keeps only what is read
    teacher_sha256: str | None  # of its configuration and numbers, however they are stored
    teacher_revision: str | None  # its commit on the hub
    start_remark: str | None  # what of its teacher the student starts from, if it is not all of it
    shards: Shards
    micro_tokens: int  # of the first micro-batch; a `Trainer` that runs out of memory takes smaller ones

    @property
    def method(self) -> Method:
        """The method of the stage that the run is in."""
        return self.stages.method

    @property
    def teacher(self) -> Teacher | None:
        """What that method reads, None where it reads none."""
        return self.stages.teacher

    @property
    def lr(self) -> float:
        """The peak learning rate of that stage."""
        return self.rate(self.stages.number)

    def rate(self, stage: int) -> float:
        """The peak learning rate of a stage."""
        return self.config.lr or self.stages.methods[stage].default_lr

    @property
    def inputs(self) -> dict[str, str | None]:
        """Versions of what was read from outside, by content: a resumed run must find the same (see ``run_folder.INPUTS``)."""
        return {
            "corpus_version": self.shards.version,
            "teacher_sha256": self.teacher_sha256,
            "tokenizer_sha256": tokenizers.digest(self.tokenizer),
            "student_sha256": weights.config_digest(self.student.config),
            "replay_sha256": file_sha256(Path(self.config.replay)) if self.config.replay else None,
        }

    def stream(self) -> BatchStream:
        """The training batches of this rank. What a step holds does not depend on the size of its micro-batches."""
        return self._stream(self.config.batch_tokens, self.micro_tokens, self.world)

    def first_packs(self, count: int) -> list[Batch]:
        """The packs that training reads first, each a micro-batch: the same on every rank, of however many."""
        pack = pack_size(self.config.seq_length)
        stream = self._stream(count * pack, pack, World(device=self.world.device))
        stream.wait(0)
        return stream.step(0)

    def _stream(self, batch_tokens: int, micro_tokens: int, world: World) -> BatchStream:
        config = self.config
        return BatchStream(
            self.shards,
            SpecialIds.of(self.tokenizer),
            seq_length=config.seq_length,
            batch_tokens=batch_tokens,
            micro_tokens=micro_tokens,
            mask_rate=config.mask_rate,
            packing=config.packing,
            max_unique_tokens=config.unique_tokens,
            seed=config.seed,
            rank=world.rank,
            world=world.size,
            device=world.device,
        )

    def validation(self) -> list[Batch]:
        """This rank's share of the held-out text."""
        config, world = self.config, self.world
        return validation_batches(
            self.shards,
            SpecialIds.of(self.tokenizer),
            seq_length=config.seq_length,
            micro_tokens=self.micro_tokens,
            mask_rate=VALIDATION_MASK_RATE,
            max_tokens=VALIDATION_STEPS * config.batch_tokens,
            rank=world.rank,
            world=world.size,
            device=world.device,
            packing=config.packing,
        )

    def step_cost(self, count: StepTokens, stage: int | None = None, optimizer_flops: int = 0) -> StepCost:
        """FLOPs and tokens of a step over all ranks, from real lengths, known before it runs.

        The optimiser's products, if it has any, are the student's: they are made of its gradients.

        Args:
            stage: the present one unless given.
            optimizer_flops: of a step, over all ranks.
        """
        shape = {"tokens": self.config.batch_tokens, "pairs": count.pairs, "predicted": count.predicted}
        method, teacher = self.stages.methods[self.stages.number if stage is None else stage], 0
        student = flops.forward_flops(self.student.config, method.student_needs, **shape)
        if method.teacher_needs is not None:
            assert method.teacher_config is not None
            teacher = flops.forward_flops(method.teacher_config, method.teacher_needs, **shape)
        by_model = {
            "student": student + flops.backward_flops(student) + optimizer_flops,
            "teacher": teacher,
            "loss": method.loss_flops(**shape),
        }
        return StepCost(by_model, count.real, count.predicted)

    def activation_bytes(self, tokens: int) -> int:
        """What a forward of ``tokens`` keeps for its backward."""
        return micro_batch.activation_bytes(
            self.config, self.student.config, self.stages.methods, self.dtype, self.world.device, tokens
        )


def prepare(resolved: Resolved, world: World) -> Setup:
    """Load and check everything that a run needs.

    Raises:
        ValueError: in one line, what does not fit and what to do about it.
    """
    config = resolved.run
    dtype = _check_options(config, world)
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
    recipe_stages = recipe.stages(config.method, resolved.method)
    found = _methods(recipe_stages, student_config, loaded, tokenizer, config.seq_length)
    student = _student(config, student_config, found, attention, world.device)
    if config.init_from_teacher:
        assert loaded is not None  # RunConfig.check refuses it without a teacher
        students.check_start(student, loaded.encoder)
    use_compile = world.device.type == "cuda" if config.compile is None else config.compile
    stages = Stages(recipe_stages, found, partial(_teacher, config, loaded, world.device, dtype, use_compile))
    shards = _shards(config, tokenizer, world)
    setup = Setup(
        config=config,
        world=world,
        dtype=dtype,
        attention=attention,
        attention_remark=setting.remark(attention),
        compile=use_compile,
        tokenizer=tokenizer,
        student=student,
        stages=stages,
        teacher_parameters=sum(p.numel() for p in loaded.encoder.parameters()) if loaded else 0,
        teacher_sha256=loaded.sha256 if loaded else None,
        teacher_revision=loaded.revision if loaded else None,
        start_remark=subcloning.remark(student_config, loaded.config) if config.init_from_teacher and loaded else None,
        shards=shards,
        micro_tokens=micro_batch.first(config, student_config, found, dtype, world),
    )
    if config.init_from_teacher and loaded is not None:
        _start(setup, loaded)
    if loaded is not None and config.teacher_dtype == "float8":
        batch = setup.validation()[0]
        for method in filter(lambda each: each.teacher_needs, found):
            float8.check(partial(_loss_of_teacher, setup, method, loaded, batch), world)
    return setup


def _methods(
    stages: Sequence[Stage],
    student: EncoderConfig,
    loaded: hf.Loaded | None,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
) -> list[Method]:
    """Each stage's method, and that student and teacher fit it."""
    found: list[Method] = []
    for stage in stages:
        method = methods.load(stage.method).METHOD(stage.options, student, loaded.config if loaded else None)
        if loaded is not None:
            check_teacher(loaded, student, tokenizer, method.teacher_needs or Needs(), longest)
        found.append(method)
    return found


def _check_options(config: RunConfig, world: World) -> torch.dtype:
    """Refuse what the options, the packages and the device tell before a model is loaded; the compute dtype."""
    quickstart.require_named((config.teacher, config.tokenizer), config.corpus)
    dtype = compute_dtype(config.dtype, world)
    if config.residual == "bfloat16" and dtype == torch.float32:
        raise ValueError(BFLOAT16_STREAM)
    with suppress(HubUnreachable):  # shards that were prepared may be enough; if not, they say so
        corpus.check(config.corpus, text_field=config.text_field)
    if config.teacher_dtype == "float8":
        float8.require(world.device)
    if config.optimizer == "muon":
        muon.require()
    return dtype


def _student(
    config: RunConfig,
    shape: EncoderConfig,
    found: Sequence[Method],
    attention: str,
    device: torch.device,
) -> Encoder:
    """A random student; the methods' own weights too."""
    head = any(method.trains_mlm_head for method in found)
    student = Encoder(
        shape, mlm_head=head, attention=attention, residual=getattr(torch, config.residual), seed=config.seed
    )
    for method in found:
        method.initialise(torch.Generator().manual_seed(config.seed), device)
    return student.to(device)


def _start(setup: Setup, loaded: hf.Loaded) -> None:
    """Put the teacher's weights into the student. Where it is narrower, every rank finds the same important neurons on the same
    text; the data order does not change. A run that goes on does it again, before its checkpoint takes the place of them."""
    if not subcloning.is_cut(setup.student.config, loaded.config):
        students.init_from_teacher(setup.student, loaded.encoder)
        return
    began, teacher = now(), loaded.encoder.to(setup.world.device)
    packs = setup.first_packs(IMPORTANCE_PACKS)
    found = importance.measure(
        teacher, ((batch.input_ids, batch) for batch in packs)
    )  # plain text, whatever the method reads
    students.init_from_teacher(setup.student, teacher, found)
    loaded.encoder.to("cpu")  # the place that it was loaded to
    seconds = now() - began
    log.info("starting with %s, chosen on %d packs of text in %.1f s", setup.start_remark, IMPORTANCE_PACKS, seconds)


def _teacher(
    config: RunConfig, loaded: hf.Loaded | None, device: torch.device, dtype: torch.dtype, compile: bool, needs: Needs
) -> Teacher:
    """The teacher on the device, cut to what a method needs."""
    assert loaded is not None  # the method refuses to be made without
    return Teacher(
        loaded, needs, device=device, dtype=dtype, longest=config.seq_length, attention=config.attention,
        compile=compile, float8=config.teacher_dtype == "float8",
    )  # fmt: skip


def _loss_of_teacher(setup: Setup, method: Method, loaded: hf.Loaded, batch: Batch, name: str) -> float:
    """The loss of a held-out batch and the untrained student with the teacher in float32, bfloat16 or float8."""
    device, student = setup.world.device, setup.student
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    assert method.teacher_needs is not None
    longest, float8 = setup.config.seq_length, name == "float8"
    teacher = Teacher(loaded, method.teacher_needs, device=device, dtype=dtype, longest=longest, float8=float8)
    taught = teacher(method.text(batch), batch)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=setup.dtype != torch.float32):
        return float(method.loss(method.read(student, batch), taught, batch).loss)


def compute_dtype(name: str, world: World) -> torch.dtype:
    """The dtype that was asked for; for ``auto`` bfloat16 where every rank's device is faster in it, else float32."""
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    slow = any_rank(world, fastest_dtype(world.device) != torch.bfloat16)
    return torch.float32 if slow else torch.bfloat16


def model_folder(source: str) -> str | Path:
    """The place of a model: its hub id or folder; for the name ``quickstart`` the packaged folder.

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
        ValueError: it cannot be read, or the tokenizer knows almost none of its words.
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
