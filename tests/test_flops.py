"""Closed-form FLOPs against torch's counter: on transformers' eager forward, on ours, and on the plain losses."""

from collections.abc import Callable, Iterable

import pytest
import torch
from packed_text import RAGGED, PackedText, bert, pack
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastkd import methods
from fastkd.kernels import linear_kd, relation_kl, score_mse
from fastkd.models import flops
from fastkd.models.encoder import Encoder, EncoderConfig, Needs, Outputs
from fastkd.models.hf import from_hf_model

EQUAL = (32,) * 8
STUDENT = EncoderConfig("bert", 997, 96, 3, 4, 384, max_positions=64)
TEACHER = EncoderConfig("bert", 997, 96, 6, 4, 384, max_positions=64)


def counted(function: Callable[[], object]) -> int:
    """FLOPs of matrix products that torch counts; SDPA is written out, since its CPU kernel is not counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def shape(text: PackedText) -> dict[str, int]:
    return {
        "tokens": sum(text.lengths),
        "pairs": sum(n * n for n in text.lengths),
        "predicted": len(text.predicted),
    }


def tensors(out: Outputs) -> list[Tensor]:
    found: Iterable[Tensor | None] = (out.head_rows, out.last_rows, *out.hidden.values(), *sum(out.qkv.values(), ()))
    return [x for x in found if x is not None]


def test_full_forward_and_backward_equal_transformers() -> None:
    model, text = bert(), pack(EQUAL)
    config, needs = from_hf_model(model, mlm_head=True).config, Needs(hidden=(3,))
    ids, real = text.padded(0)
    closed = flops.forward_flops(config, needs, **shape(text))
    last: list[Tensor] = []
    forward = counted(lambda: last.append(model.bert(ids, attention_mask=real.long()).last_hidden_state))
    assert closed == pytest.approx(forward, rel=0.01)
    assert flops.backward_flops(closed) == pytest.approx(counted(lambda: last[0].sum().backward()), rel=0.01)


NEEDS = [
    Needs(logits=True),
    Needs(last_rows=True),
    Needs(qkv=(3,)),
    Needs(qkv=(1,)),
    Needs(hidden=(0,)),
    Needs(hidden=(0, 1, 2, 3), qkv=(1, 2, 3)),
    Needs(hidden=(2,), qkv=(3,)),
    Needs(logits=True, hidden=(3,)),
]


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("lengths", [EQUAL, RAGGED], ids=["equal", "ragged"])
def test_partial_forward_and_backward(needs: Needs, lengths: tuple[int, ...]) -> None:
    encoder, text = from_hf_model(bert(), mlm_head=True), pack(lengths)
    closed = flops.forward_flops(encoder.config, needs, **shape(text))
    outputs: list[Tensor] = []
    forward = counted(lambda: outputs.extend(tensors(encoder(text.input_ids, text, needs))))
    backward = counted(lambda: torch.autograd.backward([x.sum() for x in outputs]))
    # Exact where every row has the same number of keys; else predicted rows are taken to attend to an average sequence.
    tolerance = 1e-9 if lengths == EQUAL else 0.01
    assert closed == pytest.approx(forward, rel=tolerance)
    assert flops.backward_flops(closed) == pytest.approx(backward, rel=tolerance)


def plain_loss(
    name: str, student: Outputs, teacher: Outputs | None, text: PackedText, decoders: list[Tensor]
) -> Tensor:
    """The method's loss by the kernels' plain definitions: the arithmetic that its FLOPs stand for."""
    cu, bound = text.cu_seqlens, max(text.lengths)
    labels = text.input_ids[text.predicted]
    if name in ("mlm", "logit_kd"):
        towards = {} if teacher is None else {"teacher_hidden": teacher.head_rows, "teacher_weight": decoders[1]}
        weights = {"ce_weight": 1.0, "kl_weight": float(bool(towards))}
        return linear_kd.reference(student.head_rows, decoders[0], labels, **towards, **weights).loss
    assert teacher is not None
    if name == "tinybert":
        pairs = [(student.qkv[m], teacher.qkv[2 * m]) for m in (1, 2, 3)]
        heads = STUDENT.num_heads
        scores = [score_mse.reference(*s[:2], *t[:2], cu, heads, max_seqlen=bound) for s, t in pairs]
        hidden = [(student.hidden[m] - teacher.hidden[2 * m]).square().mean() for m in range(4)]
        return torch.stack(scores + hidden).sum()
    s, t = student.qkv[3], teacher.qkv[6]
    if name == "minilm":
        keys = {"student_key": s[1], "teacher_key": t[1]}
        attention = relation_kl.reference(s[0], t[0], cu, 4, max_seqlen=bound, **keys)
        return attention + relation_kl.reference(s[2], t[2], cu, 4, max_seqlen=bound)
    return torch.stack([relation_kl.reference(a, b, cu, 4, max_seqlen=bound) for a, b in zip(s, t, strict=True)]).sum()


@pytest.mark.parametrize("name", methods.available())
def test_a_step_of_every_method(name: str) -> None:
    """Student forward and backward, teacher forward and loss, all in one count."""
    module, text = methods.load(name), pack(EQUAL, vocab=997)
    method = module.METHOD(module.Config(), STUDENT, TEACHER if module.METHOD.uses_teacher else None)
    student, teacher = Encoder(STUDENT, mlm_head=True), Encoder(TEACHER, mlm_head=True)
    decoders = [student.decoder_weight, teacher.decoder_weight.detach()]

    def step() -> None:
        taught = None
        if method.teacher_needs is not None:
            with torch.no_grad():
                taught = teacher(text.input_ids, text, method.teacher_needs)
        out = student(text.input_ids, text, method.student_needs)
        plain_loss(name, out, taught, text, decoders).backward()

    own = flops.forward_flops(STUDENT, method.student_needs, **shape(text))
    closed = own + flops.backward_flops(own) + method.loss_flops(**shape(text))
    if method.teacher_needs is not None:
        closed += flops.forward_flops(TEACHER, method.teacher_needs, **shape(text))
    assert closed == pytest.approx(counted(step), rel=0.01)
