"""The one train step, and validation. ``loop.py`` repeats it until the budget is spent.

A step: batches → teacher forward → student forward → fused loss (its gradient made on the way) → backward → optimiser.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastkd import exchange, optim
from fastkd.data.sizes import pack_size
from fastkd.device import memory, waiting
from fastkd.device.clock import PhaseClock, now
from fastkd.distributed import any_in_step, any_rank, average, barrier, mean
from fastkd.muon import Muon, muon, step_flops

if TYPE_CHECKING:
    from fastkd.budget import StepCost
    from fastkd.data.batches import Batch
    from fastkd.methods import Method, MethodLoss
    from fastkd.models.encoder import Encoder
    from fastkd.models.needs import Outputs
    from fastkd.setup import Setup

log = logging.getLogger(__name__)
GRAPHS_A_STAGE = 8  # at most: training, validation and rehearsal, of student and teacher


class Objective(nn.Module):
    """Student and method as one module: all that is trained, and the loss of one micro-batch."""

    def __init__(self, student: Encoder, method: Method, dropout: float) -> None:
        super().__init__()
        self.student, self.method = student, nn.ModuleDict(method.modules)  # the names in checkpoints
        self._method, self._dropout = method, dropout

    def forward(self, batch: Batch, teacher: Outputs | None, clock: PhaseClock) -> MethodLoss:
        """A mean over the micro-batch; the student's forward and the loss are marked on ``clock``."""
        student = self._method.read(self.student, batch, self._dropout)
        clock.mark("student")
        out = self._method.loss(student, teacher, batch)
        clock.mark("loss")
        return out


@dataclass(frozen=True)
class Validation:
    """Means over held-out text; the last two where the method trains an MLM head."""

    loss: float
    mlm_loss: float | None
    accuracy: float | None


class Trainer:
    """The step that trains, and all that changes while it does: micro-batches, batches, parameters and optimiser."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.world, self.device = setup, setup.world, setup.world.device
        self.micro_tokens, self.stream = setup.micro_tokens, setup.stream()
        self.validation = setup.validation()
        self._last_cost: tuple[tuple[int, int], StepCost] | None = None
        self._reached: dict[int, set[str]] = {}  # by stage: the names of the parameters that its loss reaches
        if setup.compile:
            setup.student.compile_graphs(layerwise=setup.world.size > 1)  # ranks exchange gradients during a backward
            for method in setup.stages.methods:
                method.compile_graphs()
            if (count := len(setup.stages.all)) > 1:  # student and teacher of all stages share their code
                allowed = torch._dynamo.config
                allowed.recompile_limit = max(allowed.recompile_limit, GRAPHS_A_STAGE * count)
        memory.keep_what_is_freed(self.device)
        self.waiting = waiting.of_this_process() if self.device.type == "cpu" else None
        self.clock = PhaseClock(self.device)
        self._begin()

    def enter(self, number: int, *, for_good: bool = True) -> None:
        """Go over to a stage of the recipe; ``for_good``: no earlier one is entered again."""
        stages, before = self.setup.stages, self.setup.stages.number
        stages.enter(number, for_good=for_good)
        if number != before:
            self._begin(self.optimizer if stages.stage.goes_on and number == before + 1 else None)

    def _begin(self, optimizer: torch.optim.AdamW | Muon | None = None) -> None:
        """What a stage trains, tried once, and how; a fresh optimiser, or that of the stage before."""
        setup = self.setup
        self.objective = Objective(setup.student, setup.method, setup.config.dropout)
        self.model: nn.Module = self.objective
        self.rehearsal_seconds = 0.0
        if setup.stages.number not in self._reached:
            self._rehearse()
        elif setup.compile:
            self.teach(self.stream.step(0)[0])  # a new teacher is compiled here, not in a step
        reached = self._reached[setup.stages.number]
        for name, parameter in self.objective.named_parameters():
            parameter.requires_grad_(name in reached)
        self.optimizer = optimizer or self.new_optimizer()
        barrier(self.world)  # another rank may still load its teacher
        self._exchange_gradients()

    def _exchange_gradients(self) -> None:
        """Let backwards exchange gradients between ranks from now on, in a fresh way where one broke off."""
        if self.world.size > 1:
            self.model = self.objective
            gc.collect()  # the hooks of the one before go with it
            self.buckets = exchange.Buckets()
            self.model = exchange.parallel(self.objective, self.buckets)

    def new_optimizer(self) -> torch.optim.AdamW | Muon:
        """A fresh optimiser over what is trained."""
        config, parameters = self.setup.config, self.objective.named_parameters()
        settings: dict[str, Any] = {"betas": (0.9, config.adam_beta2), "eps": 1e-6, "weight_decay": config.weight_decay}
        if config.optimizer == "adamw":
            return optim.adamw(parameters, **settings)
        hidden = {f"student.{name}": count for name, count in self.setup.student.hidden_matrices.items()}
        return muon(parameters, hidden, **settings)

    def optimizer_flops(self, stage: int) -> int:
        """FLOPs of the optimiser's matrix products in a stage's step, over all ranks, each of which computes them all.

        0 for a stage that was not entered yet: which parameters it trains is not known.
        """
        if self.setup.config.optimizer == "adamw":
            return 0
        student, reached = self.setup.student, self._reached.get(stage, set())
        hidden = student.hidden_matrices.items()
        trained = [(student.get_parameter(name), count) for name, count in hidden if f"student.{name}" in reached]
        return step_flops(trained) * self.world.size

    def step_cost(self, number: int, stage: int | None = None) -> StepCost:
        """FLOPs and tokens of a step over all ranks, known before it runs; ``stage``: the present one unless given."""
        asked = number, self.setup.stages.number if stage is None else stage  # when it is decided and when it is issued
        if self._last_cost is None or self._last_cost[0] != asked:
            count, added = self.stream.tokens_of(number), self.optimizer_flops(asked[1])
            self._last_cost = asked, self.setup.step_cost(count, asked[1], added)
        return self._last_cost[1]

    # ---- one step -------------------------------------------------------------------------------------------

    def step(self, batches: list[Batch], lr: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One optimiser step over this rank's micro-batches. Returns the loss, the gradient's norm and the loss by
        term, all on the device; losses are means over the step, all ranks included.

        Raises:
            exchange.OutOfMemory: on every rank, where memory ran out on any of several: no parameter has changed.
            torch.OutOfMemoryError: memory ran out where there is one rank.
            OSError: memory ran out on one of several ranks where the others cannot know it.
        """
        self.setup.method.rate_share = lr / self.setup.lr
        out, losses = self._backward(batches) if self.world.size == 1 else self._backward_of_all(batches)
        try:
            loss, *terms = average(self.world, torch.stack(losses).mean(0))
            norm = optim.clip(self.trained, self.setup.config.clip_norm)
            self.skipped = optim.step_if_finite(self.optimizer, loss, norm, lr)
        except torch.OutOfMemoryError as error:
            if self.world.size == 1:
                raise
            raise OSError("out of memory when the weights were changed: free the device") from error
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.mark("optimizer")
        return loss, norm, dict(zip(out.terms, terms, strict=True))

    def _backward(self, batches: list[Batch]) -> tuple[MethodLoss, list[Tensor]]:
        """Add up the gradients; the last micro-batch's loss, and the losses by term of all of them."""
        losses = []
        for number, batch in enumerate(batches, start=1):
            with self._no_sync(number < len(batches)):
                out = self.micro_step(batch, 1 / len(batches))
            losses.append(torch.stack([x.detach().float() for x in (out.loss, *out.terms.values())]))
        return out, losses

    def _backward_of_all(self, batches: list[Batch]) -> tuple[MethodLoss, list[Tensor]]:
        """The same among ranks, which then vote: a word on the host, while devices still work on the backward."""
        self.buckets.step()
        found: tuple[MethodLoss, list[Tensor]] | None = None
        with contextlib.suppress(torch.OutOfMemoryError):
            found = self._backward(batches)
        if found is None:  # only here, where the error no longer holds what had been computed
            self._free()
            self.buckets.end_without_memory()
        if any_in_step(self.world, found is None):
            found = None
            self._free()
            self._exchange_gradients()
            raise exchange.OutOfMemory("out of memory on a rank")
        assert found is not None
        self.buckets.end()
        return found

    def _free(self) -> None:
        """Give back what a step that broke off holds."""
        self.objective.zero_grad(set_to_none=True)
        if self.setup.teacher is not None:
            self.setup.teacher.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def micro_step(self, batch: Batch, weight: float) -> MethodLoss:
        """Teacher forward, student forward, loss and backward of one micro-batch."""
        if self.waiting is not None:
            self.waiting.look()
        teacher = self.teach(batch)
        with self.autocast():
            out = self.model(batch, teacher, self.clock)
        (out.loss * weight).backward()
        self.clock.mark("backward")
        return out

    def teach(self, batch: Batch) -> Outputs | None:
        """What the method reads of the teacher, or None for scratch training."""
        if self.setup.teacher is None:
            return None
        out = self.setup.teacher(self.setup.method.text(batch), batch)
        self.clock.mark("teacher")
        return out

    def autocast(self) -> torch.autocast:
        """The compute dtype for matrix products; parameters stay float32."""
        enabled = self.setup.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _no_sync(self, active: bool) -> contextlib.AbstractContextManager[Any]:
        if active and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that get gradients."""
        return [p for p in self.objective.parameters() if p.requires_grad]

    def _rehearse(self) -> None:
        """One micro-batch forward and backward, before ranks depend on one another, while memory for the optimiser is reserved.

        Where any rank runs out of memory, every rank takes the next smaller micro-batch and tries again. Later steps
        need no more than this one: their shapes are the same. Parameters that the loss does not reach get no gradient.

        Raises:
            ValueError: not even one pack fits, or the loss is not finite though no step was taken yet.
        """
        started = now()
        self.objective.requires_grad_(True)
        compiling = ", compiling" if self.setup.compile else ""
        log.info("trying a micro-batch of %d tokens%s", self.micro_tokens, compiling)
        while any_rank(self.world, (loss := self._tried_with_optimizer()) is None):
            self.halve_micro_batch()
        self._require_finite(loss)
        reached = {name for name, parameter in self.objective.named_parameters() if parameter.grad is not None}
        self._reached[self.setup.stages.number], self._last_cost = reached, None
        self.objective.zero_grad(set_to_none=True)
        self.rehearsal_seconds = now() - started
        self.clock.lap()

    def _tried_with_optimizer(self) -> Tensor | None:
        """The loss of the first micro-batch, or None where it does not fit beside the optimiser that is still to come."""
        try:
            room = memory.optimizer_room(self.objective, self.device)
        except torch.OutOfMemoryError:
            return None
        loss = self._tried(self.stream.step(0)[0])
        del room
        return loss

    def _tried(self, batch: Batch) -> Tensor | None:
        """The loss of a micro-batch, or None where it does not fit."""
        try:
            return self.micro_step(batch, 1.0).loss.detach()
        except torch.OutOfMemoryError:
            return None

    def fits(self, batch: Batch) -> bool:
        """Whether a micro-batch of the size just taken fits on every rank; one rank alone learns it in its step.

        Several ranks try it before they wait for each other within a step: it is compiled anew, which may take one of them
        longer than the others would wait there.
        """
        if self.world.size == 1:
            return True
        self.model, exchanging = self.objective, self.model
        loss = self._tried(batch)
        self.model = exchanging
        self._free()
        return not any_rank(self.world, loss is None)

    def _require_finite(self, loss: Tensor | None) -> None:
        """Refuse a first loss that is not finite: no learning rate has moved the student yet."""
        if not any_rank(self.world, loss is not None and not bool(loss.isfinite())):
            return
        config = self.setup.config
        numerics = "" if self.setup.dtype == torch.float32 else "--dtype float32, or "
        if config.teacher is None:
            raise ValueError(
                f"the loss is not finite before the first step: give {numerics}another --student or --corpus"
            )
        raise ValueError(
            f"the loss is not finite before the first step because of teacher {config.teacher}: its numbers are too large; "
            f"give {numerics}another --teacher"
        )

    def halve_micro_batch(self) -> None:
        """Take the next smaller micro-batch after running out of memory.

        Raises:
            ValueError: it is one pack already.
        """
        before = self.micro_tokens
        smaller = memory.smaller_micro_batch(before, pack_size(self.setup.config.seq_length))
        if smaller is None:
            raise ValueError("out of memory with one pack a micro-batch: give a smaller --student or --seq-length")
        log.warning("out of memory: micro-batch %d → %d tokens", before, smaller)
        self.set_micro_batch(smaller)
        if self.setup.compile:
            torch.compiler.reset()  # graphs of the sizes that do not fit would count against the limit of recompilations
        self._free()

    def set_micro_batch(self, tokens: int) -> None:
        """Cut the training batches into micro-batches of ``tokens``; what a step holds does not depend on it."""
        self.micro_tokens, self.stream = tokens, self.stream.recut(tokens)

    # ---- validation -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> Validation:
        """The method's loss on held-out text; where the MLM head is trained, also its cross-entropy and accuracy."""
        self.setup.method.rate_share = 1.0
        losses: list[float] = []
        mlm = torch.zeros(3, dtype=torch.float64)  # summed cross-entropy, right predictions, predictions
        for batch in self.validation:
            with self.autocast():
                student, loss = self._look(batch)
                losses.append(loss)
                if self.setup.method.trains_mlm_head:
                    mlm += _score_head(student, batch)
        mean_loss, entropy, right, count = mean(
            self.world, torch.cat([torch.tensor([sum(losses) / len(losses)], dtype=torch.float64), mlm])
        ).tolist()
        return Validation(mean_loss, *((entropy / count, right / count) if count else (None, None)))

    @torch.no_grad()
    def loss_of(self, batches: list[Batch]) -> float:
        """The mean loss of micro-batches of this rank."""
        with self.autocast():
            return sum(self._look(batch)[1] for batch in batches) / len(batches)

    def _look(self, batch: Batch) -> tuple[Outputs, float]:
        """The student's outputs of a micro-batch, without dropout, and its loss."""
        method, teacher = self.setup.method, self.teach(batch)
        student = method.read(self.setup.student, batch)
        return student, float(method.loss(student, teacher, batch).loss)


def _score_head(student: Outputs, batch: Batch) -> Tensor:
    """Summed cross-entropy, right predictions and predictions of a micro-batch, in float64 on the CPU."""
    rows_MD, weight, bias = student.head_rows, student.decoder_weight, student.decoder_bias
    assert rows_MD is not None and weight is not None and bias is not None
    logits_MV = (rows_MD @ weight.T + bias).float()
    valid = batch.labels >= 0
    entropy = F.cross_entropy(logits_MV, batch.labels, ignore_index=-100, reduction="sum")
    right = ((logits_MV.argmax(-1) == batch.labels) & valid).sum()
    return torch.stack([entropy.double(), right.double(), valid.sum().double()]).cpu()
