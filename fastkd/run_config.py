"""RunConfig: every option of a run, once, with its help text, unit and range."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from fastkd import methods
from fastkd.budget import Budget, Charge
from fastkd.data.sizes import check_sizes, pack_size
from fastkd.ledger import replayed_progress
from fastkd.loggers import check_loggers
from fastkd.models import shape
from fastkd.probes import names
from fastkd.schedule import Schedule
from fastkd.terminal import LOST

# The range of each number, both ends included. It does not hold for None.
RANGES: dict[str, tuple[float, float]] = {
    "warmup": (0, 0.99),
    "dropout": (0, 0.99),
    "mask_rate": (0.01, 0.9),
    "seq_length": (8, 8192),
    "clip_norm": (0, 1e9),
    "lr": (1e-9, 10),
    "weight_decay": (0, 1),
    "adam_beta2": (0, 0.99999),
    "unique_tokens": (1, 1e15),
    "log_every": (1, 1e9),
    "checkpoint_minutes": (0, 1e9),
    "validations": (0, 1e6),
    "trace": (0, 1000),
    "seed": (0, 2**63 - 1),
}
BFLOAT16_STREAM = "--residual bfloat16 needs --dtype bfloat16: the products of a float32 run would round their inputs"
# Options that change what is shown, scored or written where, but not what is trained. A run's name leaves them out.
PRESENTATION = ("output_dir", "push_to_hub", "log_to", "log_every", "trace", "probes", "probe_data")
METHODS = "; ".join(f"{name} ({line})" for name, line in methods.descriptions().items()).replace("%", "%%")
BUDGETS = ("budget_gpu_hours", "budget_flops", "budget_tokens")
FREE_TO_CHANGE = (*PRESENTATION, "checkpoint_minutes")  # when a run goes on


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RunConfig:
    """One run under one budget."""

    preset: str = option("auto", "auto (paper-6l with a CUDA device, else quickstart), or a file of fastkd/presets/")
    method: str = option(
        "minilmv2",
        f"a file of fastkd/methods/: {METHODS}. Or several, each but the last with its share of the budget, in quotes: "
        "'minilmv2:0.3>mlm'",
    )
    teacher: str | None = option(
        None, "hub id, Hugging Face folder or finished run folder; 'quickstart' names the packaged one"
    )
    tokenizer: str | None = option(None, "hub id or folder of the student's tokenizer; default: the teacher's")
    student: str = option("3L-384H-12A", "layers, width, heads and optionally intermediate width: 6L-768H-12A[-3072I]")
    corpus: list[str] = option(
        ["quickstart"],
        "hub datasets (id[@revision][:config[:split]]), text, jsonl and parquet files, folders and globs (.gz too), or one "
        "folder of shards; "
        "+join at a name's end joins its rows into running text",
    )
    unique_tokens: int | None = option(None, "use only this many tokens of the corpus")
    text_field: str = option("text", "field or column that holds a document in jsonl, parquet and hub datasets")
    budget_gpu_hours: float | None = option(None, "budget in GPU-hours, summed over devices")
    budget_flops: float | None = option(None, "budget in FLOPs of student, teacher and loss")
    budget_tokens: float | None = option(None, "budget in tokens read")
    charge: Charge = option(
        "loop", "what costs GPU-seconds: loop (first to last step, all included), compute (only the steps), all"
    )
    seed: int = option(0, "seed of initialisation, data order and masks")
    output_dir: str | None = option(
        None, "run folder; default runs/PRESET-METHOD-BUDGET, the same for the same command"
    )
    init_from_teacher: bool = option(
        False,
        "start the student from the teacher: its layers, every other one for half its depth, and where the student is narrower "
        "the most active neurons",
    )
    lr: float | None = option(None, "peak learning rate; default: each method's")
    warmup: float = option(0.06, "share of the budget over which the learning rate rises")
    schedule: Schedule = option(
        "linear",
        "the learning rate after its rise: linear falls to 1%% of the peak at the end; wsd stays at the peak and falls over the "
        "last 20%% of the budget",
    )
    optimizer: Literal["adamw", "muon"] = option(
        "adamw",
        "muon orthogonalises the updates of the layers' matrices; embeddings, head and vectors keep adamw, with the same --lr",
    )
    weight_decay: float = option(0.01, "weight decay of matrices")
    adam_beta2: float = option(0.98, "AdamW's second-moment decay")
    clip_norm: float = option(1.0, "largest 2-norm of the gradient; 0 does not clip")
    dropout: float = option(0.0, "student's dropout probability (0.1 in the paper)")
    seq_length: int = option(128, "tokens in a sequence at most, [CLS] and [SEP] included")
    mask_rate: float = option(0.15, "share of positions that are predicted in training; held-out text always has 15%%")
    packing: Literal["documents", "full-sentences"] = option(
        "documents", "full-sentences lets documents share a sequence"
    )
    batch_tokens: int = option(4096, "tokens in a step, over all devices")
    micro_batch: str = option("auto", "tokens in one forward on one device, or auto: as many as memory takes")
    dtype: Literal["auto", "bfloat16", "float32"] = option(
        "auto", "compute dtype; auto: bfloat16 where it is faster than float32 (a CPU is measured)"
    )
    residual: Literal["float32", "bfloat16"] = option(
        "float32",
        "dtype of the student's residual stream; bfloat16 (only with bfloat16 products) moves fewer bytes and rounds after "
        "every layer",
    )
    teacher_dtype: Literal["auto", "float8"] = option(
        "auto", "the teacher's; float8 (torchao): refused if it moves the loss by 1%% more than bfloat16 does"
    )
    attention: Literal["triton", "flash_attn", "varlen_attn", "sdpa"] | None = option(
        None,
        "backend; default: for student and teacher the fastest that takes their heads and lengths",
    )
    compile: bool | None = option(None, "torch.compile student and teacher; default: on CUDA only")
    checkpoint_minutes: float = option(10.0, "minutes between checkpoints; 0 saves after every step")
    validations: int = option(10, "validations over the budget; fewer where they would cost over 2%% of it")
    replay: str | None = option(
        None, "ledger.jsonl of a finished run: take each step's progress from it instead of the clock"
    )
    push_to_hub: str | None = option(
        None,
        "at the end, push the student to the Hugging Face hub as NAME or OWNER/NAME; a finished run is pushed again",
    )
    log_to: list[str] = option([], "also log to tensorboard, wandb or trackio")
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    trace: int = option(0, "write a torch.profiler trace of this many steps")
    probes: str | None = option(
        None,
        "probes of the finished student, not charged: tokens, pos, blimp (comma-separated) or none; default: tokens, and what "
        "--probe-data has files for",
    )
    probe_data: list[str] = option(
        [], "CoNLL-U files (pos), BLiMP's zip or folder (blimp), or a folder that holds any of them"
    )

    @property
    def budget(self) -> Budget:
        """The one budget that is set.

        Raises:
            ValueError: none, several, or one that is not above zero.
        """
        hours, flops, tokens = self.budget_gpu_hours, self.budget_flops, self.budget_tokens
        given = [value for value in (hours, flops, tokens) if value is not None]
        if len(given) != 1:
            raise ValueError("give exactly one budget: --budget-gpu-hours, --budget-flops or --budget-tokens")
        if not 0 < given[0] < float("inf"):
            raise ValueError(f"a budget must be above zero and finite, got {given[0]:g}")
        if hours is not None:
            return Budget("gpu-seconds", hours * 3600)
        return Budget("flops", flops) if flops is not None else Budget("tokens", cast(float, tokens))

    def check(self, *, needs_budget: bool = True) -> None:
        """Refuse values outside their range, and a run without a budget if ``needs_budget``.

        Raises:
            ValueError: naming the option, its value and its range.
        """
        if needs_budget or any(getattr(self, name) is not None for name in BUDGETS):
            _ = self.budget
        check_texts(dataclasses.asdict(self))
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be between {low:g} and {high:g}, got {value:g}")
        if self.residual == "bfloat16" and self.dtype == "float32":
            raise ValueError(BFLOAT16_STREAM)
        if self.init_from_teacher and self.teacher is None:
            raise ValueError("--init-from-teacher needs a teacher: give --teacher")
        shape.parse(self.student)
        check_loggers(self.log_to)
        names.check(self.probes)
        self._check_batch()
        if self.replay is not None:
            replayed_progress(Path(self.replay))

    def _check_batch(self) -> None:
        """Refuse sizes that no number of ranks could take."""
        pack, micro = pack_size(self.seq_length), self.micro_batch
        if micro != "auto" and (not micro.isdecimal() or int(micro) == 0):
            raise ValueError(f"--micro-batch takes auto or a positive multiple of {pack} tokens, got {micro!r}")
        check_sizes(self.batch_tokens, pack if micro == "auto" else int(micro), pack, world=1)


def check_texts(values: dict[str, Any]) -> None:
    """Refuse a path whose bytes are not UTF-8: config.toml could not hold it.

    Raises:
        ValueError: naming the option and the path.
    """
    for name, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and LOST.search(text):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {text!r} is no UTF-8 text: rename it, or name its folder or a pattern")
