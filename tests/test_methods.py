"""Methods as objects: what their options choose of a teacher."""

import importlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packed_text import RAGGED, as_batch, pack

from bench import losses
from fastkd import methods
from fastkd.models.encoder import Encoder, EncoderConfig


@pytest.mark.parametrize(
    ("layers", "width", "heads", "paper", "released"),
    [(24, 1024, 16, (21, 64), (24, 16)), (12, 768, 12, (12, 48), (12, 12)), (6, 384, 12, (6, 12), (6, 12))],
)
def test_the_layer_and_the_relation_heads_of_minilmv2(
    layers: int, width: int, heads: int, paper: tuple[int, int], released: tuple[int, int]
) -> None:
    """The paper's of each size of teacher; the released scripts' are its last layer and its attention heads."""
    module = methods.load("minilmv2")
    teacher = EncoderConfig("bert", 1000, width, layers, heads, 4 * width)
    student = EncoderConfig("bert", 1000, width, 3, heads, 4 * width)
    for as_released, expected in ((False, paper), (True, released)):
        method = module.METHOD(module.Config(as_released=as_released), student, teacher)
        assert (method.layer, method.relation_heads) == expected
        assert method.teacher_needs.qkv == (method.layer,) and method.reads_masked == as_released
        named = module.METHOD(module.Config(as_released=as_released, teacher_layer=2), student, teacher)
        assert named.layer == 2


def test_listing_and_loading_methods_needs_no_torch() -> None:
    """``--help`` and refusals of options read every method's options and facts."""
    script = """
import sys

from fastkd import methods

lines = methods.descriptions()
facts = [(m.name, m.uses_teacher, m.trains_mlm_head, m.default_lr) for m in (methods.load(name).METHOD for name in lines)]
assert [name for name, *_ in facts] == methods.available() == list(lines) and all(lines.values())
assert all(methods.load(name).Config() for name in lines)
print(sorted({"torch", "transformers"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


STUDENT, TEACHER = (EncoderConfig("bert", 97, width, layers, 4, 100) for width, layers in ((24, 2), (48, 4)))


@pytest.mark.parametrize("name", methods.available())
def test_a_method_names_the_fused_losses_that_it_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The predictions of ``bench.predictions`` stand on it."""
    called: list[str] = []
    for kernel in losses.available():
        module = importlib.import_module(f"fastkd.kernels.{kernel}")
        monkeypatch.setattr(module, kernel, counting(called, kernel, getattr(module, kernel)))
    module = methods.load(name)
    method = module.METHOD(module.Config(), STUDENT, TEACHER if module.METHOD.uses_teacher else None)
    method.initialise(torch.Generator().manual_seed(0), torch.device("cpu"))
    text, taught = as_batch(pack(RAGGED, vocab=97)), None
    if method.teacher_needs is not None:
        with torch.no_grad():
            taught = Encoder(TEACHER, mlm_head=True)(text.input_ids, text, method.teacher_needs)
    loss = method.loss(method.read(Encoder(STUDENT, mlm_head=True), text), taught, text)
    assert Counter(called) == Counter(kernel for kernel, _ in method.fused_losses())
    assert loss.loss.requires_grad and not any(term.requires_grad for term in loss.terms.values())


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "mse"])
def test_each_divergence_of_logit_kd_is_that_of_its_plain_form(divergence: str) -> None:
    """As ``test_the_eager_way_has_fastkd_s_loss_and_gradients`` of every method, here of logits alone."""
    module = methods.load("logit_kd")
    method = module.METHOD(module.Config(divergence=divergence), STUDENT, TEACHER)
    text = as_batch(pack(RAGGED, vocab=97))
    with torch.no_grad():
        taught = Encoder(TEACHER, mlm_head=True)(text.input_ids, text, method.teacher_needs)
    student = Encoder(STUDENT, mlm_head=True)(text.input_ids, text, method.student_needs)
    out = method.loss(student, taught, text)
    z_s, z_t = (F.linear(x.head_rows, x.decoder_weight, x.decoder_bias) for x in (student, taught))
    plain = method.plain_divergence(z_s, z_t).mean()
    torch.testing.assert_close(out.terms[divergence], plain, rtol=1e-5, atol=1e-7)
    expected = 0.5 * plain + 0.5 * F.cross_entropy(z_s, text.labels)
    rows = [torch.autograd.grad(loss, student.head_rows, retain_graph=True)[0] for loss in (out.loss, expected)]
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-7)
    assert method.fused_losses()[0][1]["divergence"] == divergence


def counting(called: list[str], kernel: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which also notes that it was called."""

    def noted(*args: Any, **options: Any) -> Any:
        called.append(kernel)
        return function(*args, **options)

    return noted
