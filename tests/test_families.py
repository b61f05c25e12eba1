"""A model family is one file: each one's names cover its parameters, and a third one works without an edit elsewhere."""

import json
import shutil
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from oracle import assert_rounded_alike
from packed_text import RAGGED, VOCAB, pack, word_tokenizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForMaskedLM, ModernBertConfig, ModernBertForMaskedLM

from fastkd import run
from fastkd.device import memory
from fastkd.files import read_jsonl
from fastkd.models import families, flops
from fastkd.models.encoder import Encoder
from fastkd.models.hf import export, from_hf, load, to_hf, to_hf_model
from fastkd.models.needs import Needs, Outputs
from fastkd.models.student import init_from_teacher, student_config

EVERYTHING = Needs(logits=True, hidden=(0, 1, 2, 3), qkv=(1, 2, 3), last_rows=True)
PARTIAL = [
    Needs(logits=True),
    Needs(last_rows=True),
    Needs(qkv=(3,)),
    Needs(qkv=(1,)),
    Needs(hidden=(0,)),
    Needs(hidden=(2,), qkv=(3,)),
    Needs(logits=True, hidden=(3,)),
]


@pytest.mark.parametrize("model_type", families.available())
@pytest.mark.parametrize("tied", [True, False])
def test_names_cover_every_parameter(model_type: str, tied: bool) -> None:
    hf_config = families.of(model_type).classes[model_type].config(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=52, pad_token_id=1,
        tie_word_embeddings=tied,
    )  # fmt: skip
    config = from_hf(hf_config)
    names = config.family.body_names(config) | config.family.head_names(config)
    encoder = Encoder(config, mlm_head=True)
    assert names.keys() == encoder.state_dict().keys()
    assert from_hf(to_hf(config)) == config
    for mlm_head in (True, False):
        to_hf_model(encoder, mlm_head=mlm_head)  # transformers takes the names, and misses none
    tables = [p for name, p in encoder.named_parameters() if p.dim() == 2 and not name.startswith("head.")]
    assert config.family.parameters(config) == sum(table.numel() for table in tables)


@pytest.fixture
def third(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """A folder of families beside the package's own, with one file."""
    folder = tmp_path / "families"
    folder.mkdir()
    shutil.copy(Path(__file__).parent / "modernbert_family.py", folder / "modernbert.py")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(folder)])
    yield
    del sys.modules[f"{families.__name__}.modernbert"], families.modernbert


@pytest.fixture
def checkpoint(third: None, tmp_path: Path) -> Path:
    """A random ModernBERT as transformers saves it."""
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=VOCAB, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=60,
        max_position_embeddings=64, layer_types=["full_attention"] * 3, attn_implementation="eager", pad_token_id=0,
        bos_token_id=None, eos_token_id=None, cls_token_id=2, sep_token_id=3,
    )  # fmt: skip
    model = ModernBertForMaskedLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "modernbert")
    word_tokenizer().save_pretrained(tmp_path / "modernbert")
    return tmp_path / "modernbert"


def logits(encoder: Encoder, out: Outputs) -> Tensor:
    assert out.head_rows is not None
    return out.head_rows @ encoder.decoder_weight.T + encoder.decoder_bias


def read(out: Outputs, needs: Needs) -> list[Tensor]:
    rows = [out.head_rows if needs.logits else None, out.last_rows if needs.last_rows else None]
    qkv = [x for layer in needs.qkv for x in out.qkv[layer]]
    return [*(x for x in rows if x is not None), *(out.hidden[layer] for layer in needs.hidden), *qkv]


def test_it_is_refused_until_its_file_is_there() -> None:
    with pytest.raises(ValueError, match="model type 'modernbert' is not supported; use one of bert, roberta, xlm-rob"):
        families.of("modernbert")


def test_it_loads_and_equals_transformers(checkpoint: Path) -> None:
    loaded, text = load(checkpoint), pack(RAGGED)
    assert list(families.available()) == ["bert", "modernbert", "roberta", "xlm-roberta", "camembert"]
    assert loaded.config.rope_theta == 160_000.0 and loaded.encoder.head is not None  # type: ignore[attr-defined]
    model = AutoModelForMaskedLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    ids, real = text.padded(0)
    with torch.no_grad():
        theirs = model(ids, attention_mask=real.long(), output_hidden_states=True)
        out = loaded.encoder(text.input_ids, text, EVERYTHING)
    for layer, state in enumerate(theirs.hidden_states):
        assert_rounded_alike(out.hidden[layer], state[real])
    assert_rounded_alike(logits(loaded.encoder, out), theirs.logits[real][text.predicted])


def test_it_is_exported(checkpoint: Path, tmp_path: Path) -> None:
    loaded = load(checkpoint)
    export(loaded.encoder, loaded.tokenizer, tmp_path / "whole", card="", mlm_head=True)
    export(loaded.encoder, loaded.tokenizer, tmp_path / "bare", card="", mlm_head=False)
    before = AutoModelForMaskedLM.from_pretrained(checkpoint).state_dict()
    after = AutoModelForMaskedLM.from_pretrained(tmp_path / "whole").state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    _, found = AutoModel.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert not any(found[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert load(tmp_path / "whole").config == loaded.config and load(tmp_path / "bare").encoder.head is None


@pytest.mark.parametrize("needs", PARTIAL, ids=str)
def test_its_partial_forward_is_exact_and_its_flops_are_counted(needs: Needs, checkpoint: Path) -> None:
    encoder, text = load(checkpoint).encoder, pack((16,) * 6)
    whole = read(encoder(text.input_ids, text, EVERYTHING), needs)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        partial = read(encoder(text.input_ids, text, needs), needs)
    for ours, expected in zip(partial, whole, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    shape = {"tokens": 96, "pairs": 6 * 16**2, "predicted": len(text.predicted)}
    assert flops.forward_flops(encoder.config, needs, **shape) == counter.get_total_flops()


@pytest.mark.parametrize("needs", [Needs(logits=True), Needs(qkv=(3,))], ids=str)
def test_its_activation_bytes_are_what_autograd_keeps(needs: Needs, checkpoint: Path) -> None:
    encoder, text = load(checkpoint).encoder, pack((64,) * 8)
    parameters, kept, held = {p.data_ptr() for p in encoder.parameters()}, {}, []

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(x)  # so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        encoder(text.input_ids, text, needs)
    shape = {"tokens": 512, "predicted": len(text.predicted), "itemsize": 4}
    found = sum(kept.values())
    assert 0.8 * found <= memory.activation_bytes(encoder.config, needs, **shape) <= 1.25 * found


def test_a_student_starts_from_a_teacher(checkpoint: Path) -> None:
    loaded = load(checkpoint)
    student = Encoder(student_config("3L-48H-4A-60I", loaded.config, loaded.tokenizer), mlm_head=True)
    init_from_teacher(student, loaded.encoder)
    state = loaded.encoder.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in student.state_dict().items())
    narrower = Encoder(student_config("3L-24H-2A-60I", loaded.config, loaded.tokenizer), mlm_head=True)
    with pytest.raises(ValueError, match=r"needs the widths of a modernbert teacher .*3L-48H-4A-60I.*change --student"):
        init_from_teacher(narrower, loaded.encoder)


@pytest.mark.parametrize("method", ["logit_kd", "minilmv2"])
def test_it_teaches_and_trains(method: str, checkpoint: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(" ".join(f"w{(7 * i + j) % 200}" for j in range(40)) for i in range(100)))
    options = ["--preset", "quickstart", "--teacher", str(checkpoint), "--corpus", str(corpus), "--method", method]
    options += ["--student", "1L-48H-4A", "--batch-tokens", "512", "--seq-length", "32", "--budget-tokens", "3000"]
    assert run.main([*options, "--output-dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "final" / "config.json").read_text())["model_type"] == "modernbert"
    steps = [record for record in read_jsonl(tmp_path / "run" / "ledger.jsonl") if "loss" in record]
    assert len(steps) >= 3 and all(record["flops"]["student"] > 0 for record in steps)
    assert load(tmp_path / "run").config.num_layers == 1
