"""Closed-form FLOPs against torch's counter: on transformers' eager forward, on ours, and on the plain losses."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packed_text import RAGGED, PackedText, as_batch, bert, pack
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastkd import methods
from fastkd.methods import Padded
from fastkd.models import flops
from fastkd.models.encoder import Encoder, EncoderConfig
from fastkd.models.hf import from_hf_model
from fastkd.models.needs import Needs, Outputs

EQUAL = (32,) * 8
STUDENT = EncoderConfig("bert", 997, 96, 3, 4, 384, max_positions=64)
NARROW = EncoderConfig("bert", 997, 48, 3, 4, 192, max_positions=64)
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


def as_padded(out: Outputs, layers: int) -> Padded:
    """What a forward over ``EQUAL`` was asked for, as a plain definition reads it: logits at predicted positions only."""
    hidden, qkv = ({layer: padded(x) for layer, x in each.items()} for each in (out.hidden, out.qkv))
    last = {} if out.last_rows is None else {layers: out.last_rows}
    logits = None if out.head_rows is None else F.linear(out.head_rows, out.decoder_weight, out.decoder_bias)
    return Padded(logits, hidden | last, qkv, None if out.replaced is None else padded(out.replaced))


def padded(x: Any) -> Any:
    """[T, …] of ``EQUAL`` → [B, S, …]; of each where there are several."""
    return tuple(map(padded, x)) if isinstance(x, tuple) else x.unflatten(0, (len(EQUAL), -1))


@pytest.mark.parametrize("student_config", [STUDENT, NARROW], ids=["equal widths", "a narrow student"])
@pytest.mark.parametrize("name", methods.available())
def test_a_step_of_every_method(name: str, student_config: EncoderConfig) -> None:
    """Student forward and backward, teacher forward and the plain definition of the loss, all in one count."""
    module, text = methods.load(name), pack(EQUAL, vocab=997)
    method = module.METHOD(module.Config(), student_config, TEACHER if module.METHOD.uses_teacher else None)
    method.initialise(torch.Generator().manual_seed(0), torch.device("cpu"))
    student, teacher = Encoder(student_config, mlm_head=True), Encoder(TEACHER, mlm_head=True)

    def step() -> None:
        taught = None
        if method.teacher_needs is not None:
            with torch.no_grad():
                taught = as_padded(teacher(text.input_ids, text, method.teacher_needs), TEACHER.num_layers)
        out = as_padded(method.read(student, as_batch(text)), student_config.num_layers)
        mask = torch.ones(len(EQUAL), EQUAL[0], dtype=torch.bool)
        method.plain(out, taught, text.input_ids[text.predicted], mask).backward()

    own = flops.forward_flops(student_config, method.student_needs, **shape(text))
    closed = own + flops.backward_flops(own) + method.loss_flops(**shape(text))
    if method.teacher_needs is not None:
        closed += flops.forward_flops(TEACHER, method.teacher_needs, **shape(text))
    assert closed == pytest.approx(counted(step), rel=0.01)
