"""Who computes a fused loss: fastkd, its definition, and other packages that do the same job.

A contender turns the keyword arguments of a kernel's case into a loss; gradients are asked from autograd. What a package
does not take (biases) is left out, for its float64 oracle too; what it cannot do at all it refuses, with the reason.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import losses
from bench.losses.linear_kd import HeadCase
from bench.losses.packed import PackedCase
from fastkd.kernels import buckets

ZERO = 1e-12  # norm of a float64 result that would be 0 without rounding
Inputs = dict[str, Any]  # keyword arguments of a kernel
Loss = Callable[[Inputs], Tensor]  # → a scalar


@dataclass(frozen=True)
class Contender:
    """``make`` gives the loss when it is first needed: it may import a package, or compile."""

    name: str
    make: Callable[[], Loss]
    package: str = ""  # that it comes from
    without: tuple[str, ...] = ()  # arguments that it does not take
    refuses: Callable[[Any, str], str] = lambda case, device: ""  # the reason, or ""

    def refusal(self, case: Any, device: str) -> str:
        """Why it cannot run ``case`` on ``device``; "" where it can."""
        if self.package and importlib.util.find_spec(self.package.replace("-", "_")) is None:
            return f"{self.package} is not installed: see the extra 'bench' in pyproject.toml"
        return self.refuses(case, device)

    def inputs(self, case: Any, device: str) -> Inputs:
        """Those of the case that it takes."""
        return self.taken(case.inputs(device))

    def taken(self, inputs: Inputs) -> Inputs:
        """Those of these that it takes: drawing the inputs of a large case takes seconds."""
        return {name: x for name, x in inputs.items() if name not in self.without}


def step(loss: Loss, inputs: Inputs) -> Callable[[], tuple[Tensor, tuple[Tensor, ...]]]:
    """A call that computes the loss and its gradients in the inputs that ask for one."""
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]

    def run() -> tuple[Tensor, tuple[Tensor, ...]]:
        value = loss(inputs)
        return value.detach(), torch.autograd.grad(value, leaves)

    return run


def definition(kernel: str) -> Loss:
    """The loss's ``reference`` in the inputs' dtype."""
    reference = losses.definition(kernel).reference
    return lambda inputs: scalar(reference(**inputs))


def scalar(value: Any) -> Tensor:
    """The loss that is differentiated, of what a fused loss returns."""
    loss: Tensor = value if isinstance(value, Tensor) else value.loss
    return loss


def _fused(kernel: str) -> Loss:
    function = getattr(losses.definition(kernel), kernel)
    return lambda inputs: scalar(function(**inputs))


def _compiled(kernel: str) -> Loss:
    torch.compiler.reset()  # each case is compiled for its own shapes
    return torch.compile(definition(kernel), dynamic=False)


# ---- linear_kd ------------------------------------------------------------------------------------------------


def _labels(inputs: Inputs) -> Tensor:
    """The labels, or some that ignore no row, for packages that need them even without a cross-entropy."""
    labels = inputs.get("labels")
    return (
        inputs["student_hidden"].new_zeros(len(inputs["student_hidden"]), dtype=torch.int64)
        if labels is None
        else labels
    )


def _orda() -> Loss:
    from orda_kernel import SeparateTeacher, distillation_loss

    def loss(inputs: Inputs) -> Tensor:
        hidden = inputs["student_hidden"]
        return distillation_loss(
            hidden,
            inputs["student_weight"],
            _labels(inputs),
            SeparateTeacher(inputs["teacher_hidden"], inputs["teacher_weight"]),
            student_ce_weight=inputs["ce_weight"],
            kl_weight=inputs["kl_weight"],
            kl_temperature=inputs["temperature"],
            kl_divergence="forward",
            backend="triton" if hidden.is_cuda else "torch",
        ).loss

    return loss


def _liger_triton() -> Loss:
    """Generalised Jensen-Shannon with β = 0: KL(teacher ‖ student), without its τ²."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    def loss(inputs: Inputs) -> Tensor:
        value = liger_fused_linear_jsd(
            inputs["student_hidden"],
            inputs["student_weight"],
            inputs["teacher_hidden"],
            inputs["teacher_weight"],
            inputs.get("labels"),
            jsd_beta=0.0,
            temperature=inputs["temperature"],
        )
        factor = inputs["kl_weight"] * inputs["temperature"] ** 2
        return value if factor == 1 else value * factor

    return loss


def _liger_chunked() -> Loss:
    """The same divergence, with a cross-entropy and biases, by compiled chunks of 1,024 rows."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def loss(inputs: Inputs) -> Tensor:
        module = LigerFusedLinearJSDLoss(
            weight_hard_loss=inputs["ce_weight"],
            weight_soft_loss=inputs["kl_weight"] * inputs["temperature"] ** 2,
            beta=0.0,
            temperature=inputs["temperature"],
        )
        return module(
            inputs["student_hidden"],
            inputs["student_weight"],
            inputs["teacher_hidden"],
            inputs["teacher_weight"],
            _labels(inputs),
            inputs.get("student_bias"),
            inputs.get("teacher_bias"),
        )

    return loss


def _no_teacher(case: HeadCase, device: str) -> str:
    return "needs a teacher" if case.teacher_width is None else ""


def _liger_triton_refuses(case: HeadCase, device: str) -> str:
    if device != "cuda":
        return "its Triton kernel needs a GPU"
    return _no_teacher(case, device) or ("has no cross-entropy" if case.ce_weight else "")


# ---- relation_kl ----------------------------------------------------------------------------------------------


def _autocast(inputs: Inputs) -> torch.autocast:
    """What a Trainer with ``bf16=True`` runs a loss under; off for float32."""
    student = inputs["student"]
    return torch.autocast(student.device.type, torch.bfloat16, enabled=student.dtype == torch.bfloat16)


def _eager_minilmv2() -> Loss:
    """Batched and eager (MiniLMv2, eq. 5-7): pad, regroup the heads, mask the keys, softmax, KL over valid rows."""

    def loss(inputs: Inputs) -> Tensor:
        rows, valid = buckets.padded_rows(inputs["cu_seqlens"], inputs["max_seqlen"])
        heads = inputs["num_heads"]

        def scores(query: Tensor, key: Tensor | None) -> Tensor:
            q = query[rows].unflatten(2, (heads, -1)).transpose(1, 2)
            k = q if key is None else key[rows].unflatten(2, (heads, -1)).transpose(1, 2)
            z = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
            return z.masked_fill(~valid[:, None, None], torch.finfo(z.dtype).min)

        with _autocast(inputs):
            log_q = scores(inputs["student"], inputs.get("student_key")).log_softmax(-1)
            p = scores(inputs["teacher"], inputs.get("teacher_key")).softmax(-1)
            divergence = F.kl_div(log_q, p, reduction="none").sum(-1) * valid[:, None]
            return divergence.sum() / (heads * len(inputs["student"]))

    return loss


def _bertdistiller() -> Loss:
    """MiniLMTrainer's divergence of two relation matrices, called as its ``compute_loss`` does."""
    from bertdistiller.distillation.minilm.trainer import MiniLMTrainer

    def loss(inputs: Inputs) -> Tensor:
        args = SimpleNamespace(num_relation_heads=inputs["num_heads"])
        trainer = SimpleNamespace(args=args, kl_loss=nn.KLDivLoss(reduction="sum"))
        sequences, length = len(inputs["cu_seqlens"]) - 1, inputs["max_seqlen"]

        def relation(query: Tensor, key: Tensor | None) -> Tensor:
            width = query.shape[1] // inputs["num_heads"]
            q, k = (
                MiniLMTrainer._transpose_for_scores_relations(trainer, x.reshape(sequences, length, -1), width)
                for x in (query, query if key is None else key)
            )
            return torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(width)

        with _autocast(inputs):
            teacher = relation(inputs["teacher"], inputs.get("teacher_key"))
            student = relation(inputs["student"], inputs.get("student_key"))
            mask = torch.ones(sequences, length, dtype=torch.bool, device=student.device)
            return MiniLMTrainer._compute_kl_divergence(trainer, teacher.detach(), student, mask)

    return loss


def _one_length_only(case: PackedCase, device: str) -> str:
    return (
        "averages over sequences, not tokens: another loss where lengths differ" if len(set(case.lengths)) > 1 else ""
    )


# ---- all ------------------------------------------------------------------------------------------------------

_NO_BIAS = ("student_bias", "teacher_bias")
PEERS = {
    "linear_kd": (
        Contender("orda-kernel", _orda, "orda-kernel", _NO_BIAS, _no_teacher),
        Contender("liger fused_linear_jsd", _liger_triton, "liger-kernel", _NO_BIAS, _liger_triton_refuses),
        Contender("liger chunked jsd", _liger_chunked, "liger-kernel", (), _no_teacher),
    ),
    "relation_kl": (
        Contender("eager MiniLMv2", _eager_minilmv2),
        Contender("bertdistiller", _bertdistiller, "bertdistiller", (), _one_length_only),
    ),
}


def contenders(kernel: str) -> tuple[Contender, ...]:
    """``fastkd`` (Triton on a GPU, else the blocked path), ``reference``, the same compiled, and the peers."""
    return (
        Contender("fastkd", lambda: _fused(kernel)),
        Contender("reference", lambda: definition(kernel)),
        Contender("reference compiled", lambda: _compiled(kernel)),
        *PEERS.get(kernel, ()),
    )


def entries() -> list[tuple[str, Any, Contender]]:
    """(kernel, case, contender) of every bench."""
    return [(kernel, case, contender) for kernel, case in losses.cases() for contender in contenders(kernel)]


def gradient_error(
    contender: Contender, kernel: str, case: Any, device: str, loss: Loss | None = None, inputs: Inputs | None = None
) -> float:
    """The worst ‖g − g₆₄‖/‖g₆₄‖ of a gradient, g₆₄ by float64 autograd of the definition, on the case's first rows.

    512 rows of a case that counts rows; of a packed one the sequences that start within its first 1,024 tokens. ``loss``
    and ``inputs`` (those of `first_rows`): what was made before, if it need not be made again.
    """
    inputs = contender.taken(first_rows(case).inputs(device) if inputs is None else inputs)
    exact = {
        name: x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }
    _, gradients = step(loss or contender.make(), inputs)()
    _, expected = step(definition(kernel), exact)()
    return max(relative_error(g, e) for g, e in zip(gradients, expected, strict=True))


def relative_error(out: Tensor, expected: Tensor) -> float:
    """‖out − ref‖/‖ref‖; where the reference is 0 but for float64's rounding, ‖out‖ itself."""
    out, expected = out.detach().double(), expected.detach().double()
    size = float(expected.norm())
    return float((out - expected).norm()) / (size if size > ZERO else 1.0)


def first_rows(case: Any) -> Any:
    """The case with the rows that a float64 definition is made of."""
    if isinstance(case, PackedCase):
        fitting = sum(sum(case.lengths[:i]) < 1024 for i in range(len(case.lengths)))
        return replace(case, lengths=case.lengths[:fitting])
    return replace(case, rows=min(case.rows, 512))
