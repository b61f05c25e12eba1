"""Inductor's code for a GPU that is not here: what it holds of the encoder."""

import pytest
import torch

from fastkd.models.encoder import EncoderConfig

if torch.version.cuda is None:
    pytest.skip("Inductor writes CUDA code with a CUDA build of torch", allow_module_level=True)

from bench.inductor import read


@pytest.mark.filterwarnings("ignore")  # torch's own, of a device that is not there
def test_a_step_is_one_graph_without_fills_or_eager_operations() -> None:
    config = EncoderConfig("bert", 300, 64, 2, 2, 128)
    found, code = read(config, tokens=512, method="mlm", residual="float32", layerwise=False)
    for direction in ("forward", "backward"):
        work = found[direction]
        assert work["graphs"] == 1
        assert work["kernels"] > 0 and work["kernel_bytes"] > 0
        assert work["fills"] == 0 and not work["eager"]
    calls = found["forward"]["calls"]["packed_attention"], found["backward"]["calls"]["packed_attention_backward"]
    assert calls == (2, 2)
    assert "'kernel_name': 'triton_poi_fused_cat" not in code  # dq, dk and dv are made side by side
    assert "triton" in code


@pytest.mark.filterwarnings("ignore")  # torch's own, of a device that is not there
@pytest.mark.parametrize(("method", "added"), [("mlm", 1), ("minilmv2", 0)])
def test_no_gradient_is_added_up_in_any_order(method: str, added: int) -> None:
    """Of the embeddings none is; the predicted rows, all different, are added to zeros: one addition a place."""
    config = EncoderConfig("bert", 300, 64, 2, 2, 128)
    _, code = read(config, tokens=512, method=method, residual="float32", layerwise=False)
    assert code.count("tl.atomic_add") == added
