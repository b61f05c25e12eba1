"""Methods as objects: what their options choose of a teacher."""

import subprocess
import sys

import pytest

from fastkd import methods
from fastkd.models.encoder import EncoderConfig


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
