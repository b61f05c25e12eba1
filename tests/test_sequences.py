"""Relation losses read the sequences that there are, not the empty slots of static shapes."""

from dataclasses import replace

import pytest
import torch
from packed_text import RAGGED, pack
from torch import Tensor

from fastkd import methods
from fastkd.data.batches import Batch
from fastkd.kernels.relation_kl import relation_kl
from fastkd.models.encoder import EncoderConfig
from fastkd.models.needs import Outputs

STUDENT = EncoderConfig("bert", 211, 48, 2, 4, 100)
TEACHER = EncoderConfig("bert", 211, 96, 3, 4, 200)


def batch() -> Batch:
    """Eight sequences in eleven slots."""
    text = pack(RAGGED, empty=3)
    pairs = sum(length**2 for length in RAGGED)
    return Batch(
        text.input_ids, text.input_ids, text.position_ids, text.cu_seqlens, text.predicted,
        text.input_ids[text.predicted], text.max_seqlen, RAGGED, sum(RAGGED), pairs, 1.0, 1.0,
    )  # fmt: skip


def projections(width: int, *, seed: int, grad: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(sum(RAGGED), width, generator=generator).requires_grad_(grad) for _ in range(3))


def loss_of(name: str, text: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A method's loss of random projections, and its gradients in the student's."""
    module = methods.load(name)
    method = module.METHOD(module.Config(), STUDENT, TEACHER)
    student, teacher = projections(48, seed=0, grad=True), projections(96, seed=1, grad=False)
    out = method.loss(Outputs(qkv={2: student}), Outputs(qkv={3: teacher}), text)
    return out.loss.detach(), torch.autograd.grad(out.loss, student)


def over_all_slots(name: str, text: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same loss with the empty slots given to the kernel."""
    student, teacher = projections(48, seed=0, grad=True), projections(96, seed=1, grad=False)
    (q, k, v), (q_t, k_t, v_t) = student, teacher
    cu, bound = text.cu_seqlens, text.max_seqlen
    if name == "minilm":
        loss = relation_kl(q, q_t, cu, 4, student_key=k, teacher_key=k_t, max_seqlen=bound)
        loss = loss + relation_kl(v, v_t, cu, 4, max_seqlen=bound)
    else:
        query, key, value = (relation_kl(s, t, cu, 4, max_seqlen=bound) for s, t in zip(student, teacher, strict=True))
        loss = query + key + value
    return loss.detach(), torch.autograd.grad(loss, student)


@pytest.mark.parametrize("name", ["minilm", "minilmv2"])
def test_empty_slots_change_no_bit_of_loss_and_gradients(name: str) -> None:
    (loss, gradients), (expected, expected_gradients) = loss_of(name, batch()), over_all_slots(name, batch())
    assert torch.equal(loss, expected) and loss > 0
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))


@pytest.mark.parametrize("name", ["minilm", "minilmv2"])
def test_the_empty_slots_are_not_read(name: str) -> None:
    """Whatever stands beyond the last sequence: a kernel that was given it would refuse it."""
    text = batch()
    beyond = text.cu_seqlens.clone()
    beyond[len(text.lengths) + 1 :] = 0
    assert torch.equal(loss_of(name, replace(text, cu_seqlens=beyond))[0], loss_of(name, text)[0])
