"""Checkpoints that people bring: transformers' own numbers, or a refusal in one line that names the fix."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from given_model import edit, pickled, rewrite, untie, vocabulary, write
from huggingface_hub import constants
from packed_text import RAGGED, VOCAB, pack
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    CamembertForMaskedLM,
    PreTrainedModel,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
    XLMRobertaForMaskedLM,
)
from transformers.models.bert import tokenization_bert

from fastkd.models.encoder import Encoder
from fastkd.models.hf import export, load, shape
from fastkd.models.needs import Needs
from fastkd.models.student import init_from_teacher, student_config
from fastkd.models.teacher import Teacher

MASKED_LM = (BertForMaskedLM, RobertaForMaskedLM, XLMRobertaForMaskedLM, CamembertForMaskedLM)
NEEDS = Needs(hidden=(0, 1, 2), qkv=(2,))


@torch.no_grad()
def difference(folder: Path, encoder: Encoder | None = None) -> float:
    """The largest error of hidden states and logits, relative to transformers' forward of a folder, both in float64."""
    encoder = (encoder or load(folder).encoder).double()
    text = pack(RAGGED)
    kind = AutoModel if encoder.head is None else AutoModelForMaskedLM
    model = kind.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    ids, real = text.padded(model.config.pad_token_id or 0)
    theirs = model(ids, attention_mask=real.long(), output_hidden_states=True)
    ours = encoder(text.input_ids, text, Needs(logits=encoder.head is not None, hidden=(0, 1, 2)))
    pairs = [(ours.hidden[layer], state[real]) for layer, state in enumerate(theirs.hidden_states)]
    if encoder.head is not None:
        assert ours.head_rows is not None
        logits = ours.head_rows @ encoder.decoder_weight.T + encoder.decoder_bias
        pairs.append((logits, theirs.logits[real][text.predicted]))
    return max(float((found - expected).norm() / expected.norm()) for found, expected in pairs)


@pytest.mark.parametrize("cls", MASKED_LM)
@pytest.mark.parametrize("storage", ["safetensors", "shards", "bin", "bin shards"])
def test_every_family_and_storage(cls: type[PreTrainedModel], storage: str, tmp_path: Path) -> None:
    """All load, are exported as their own class and load again to the bit."""
    write(tmp_path, cls, shard="20KB" if "shards" in storage else "1GB")
    if "bin" in storage:
        pickled(tmp_path)
    assert len(list(tmp_path.glob("*.bin" if "bin" in storage else "*.safetensors"))) > ("shards" in storage)
    loaded = load(tmp_path)
    assert loaded.sha256 is not None and loaded.encoder.head is not None
    export(loaded.encoder, loaded.tokenizer, tmp_path / "again", card="", mlm_head=True)
    again = load(tmp_path / "again")
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path / "again")) is cls
    assert again.config == loaded.config and again.config.model_type == cls.config_class.model_type
    state = again.encoder.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.encoder.state_dict().items())
    assert difference(tmp_path, loaded.encoder) < 1e-12


def renamed(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor for name, tensor in state.items()}


GAMMA = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
WEIGHT_CHANGES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "as saved": lambda state: state,
    "float16": lambda state: {name: tensor.half() for name, tensor in state.items()},
    "bfloat16": lambda state: {name: tensor.bfloat16() for name, tensor in state.items()},
    "gamma and beta": lambda state: renamed(renamed(state, *GAMMA[0]), *GAMMA[1]),
    "untied decoder": untie,
    "untied weight": lambda state: untie(state, bias=False),
    "untied bias": lambda state: untie(state, weight=False),
    "more than is read": lambda state: state | {"bert.embeddings.position_ids": torch.arange(64)[None]},
}


@pytest.mark.parametrize("cls", [BertForMaskedLM, RobertaForMaskedLM])
@pytest.mark.parametrize("name", WEIGHT_CHANGES)
def test_weights_as_they_are_found(cls: type[PreTrainedModel], name: str, tmp_path: Path) -> None:
    rewrite(write(tmp_path, cls), WEIGHT_CHANGES[name])
    loaded = load(tmp_path)
    assert loaded.config.tied == (name not in ("untied decoder", "untied weight"))
    assert all(tensor.dtype == torch.float32 for tensor in loaded.encoder.state_dict().values())
    export(loaded.encoder, loaded.tokenizer, tmp_path / "again", card="", mlm_head=True)
    assert load(tmp_path / "again").config == loaded.config
    again = tmp_path / "again"
    assert max(difference(tmp_path), difference(again), difference(again, loaded.encoder)) < 1e-12


CONFIG_CHANGES: dict[str, dict[str, Any]] = {
    "eps": {"layer_norm_eps": 1e-3},
    "one type": {"type_vocab_size": 1},
    "vocabulary padded to 64": {"vocab_size": 256},
    "gelu_python": {"hidden_act": "gelu_python"},
    "chunks": {"chunk_size_feed_forward": 4},
    "labels": {"num_labels": 7},
    "untied flag": {"tie_word_embeddings": False},
    "absolute positions": {"position_embedding_type": "absolute"},
    "dropout": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
    "flash attention": {"_attn_implementation": "flash_attention_2", "dtype": "bfloat16"},
    "own code": {"auto_map": {"AutoConfig": "own.Config", "AutoModelForMaskedLM": "own.Model"}},
    "no class": {"architectures": None},
    "another class": {"architectures": ["RobertaForTokenClassification"]},
    "another file": {"transformers_weights": "other.safetensors"},
}
NOT_IN_TRANSFORMERS = (
    "flash attention",
    "own code",
    "another file",
)  # it needs a package, leave to run what it finds, a file


@pytest.mark.parametrize("cls", [BertForMaskedLM, RobertaForMaskedLM])
@pytest.mark.parametrize("name", CONFIG_CHANGES)
def test_configurations_as_they_are_found(cls: type[PreTrainedModel], name: str, tmp_path: Path) -> None:
    changes = CONFIG_CHANGES[name]
    write(tmp_path, cls, **{key: value for key, value in changes.items() if key in ("type_vocab_size", "vocab_size")})
    if name == "untied flag":
        rewrite(tmp_path, untie)
    plain = (tmp_path / "config.json").read_bytes()
    edit(tmp_path, **changes)
    encoder = load(tmp_path).encoder
    if name in NOT_IN_TRANSFORMERS:
        (tmp_path / "config.json").write_bytes(plain)
    assert difference(tmp_path, encoder) < 1e-12


@pytest.mark.parametrize(
    ("cls", "head"),
    [(BertModel, False), (BertForPreTraining, True), (BertForSequenceClassification, False), (RobertaModel, False),
     (RobertaForSequenceClassification, False)],
)  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_other_classes(cls: type[PreTrainedModel], head: bool, tied: bool, tmp_path: Path) -> None:
    """With or without a head, and of one without it does not matter whether its decoder would be tied."""
    write(tmp_path, cls)
    if not head or tied:
        edit(tmp_path, tie_word_embeddings=tied)
    loaded = load(tmp_path)
    assert (loaded.encoder.head is not None) == head and loaded.config.tied
    assert difference(tmp_path, loaded.encoder) < 1e-12


def test_a_model_without_a_pooler(tmp_path: Path) -> None:
    rewrite(write(tmp_path, BertModel), lambda state: {n: t for n, t in state.items() if "pooler" not in n})
    assert difference(tmp_path) < 1e-12


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_linked_snapshot(shard: str, tmp_path: Path) -> None:
    """A hub cache holds links to blobs."""
    write(tmp_path / "blobs", shard=shard)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    assert difference(tmp_path / "snapshot") < 1e-12
    assert load(tmp_path / "snapshot").sha256 == load(tmp_path / "blobs").sha256


def test_a_hub_model_is_told_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the hub's cache holds it, without a network; all files are of one commit."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--bert"
    (repository / "refs").mkdir(parents=True)
    for commit, eps in (("a" * 40, 1e-12), ("b" * 40, 1e-3)):
        write(repository / "snapshots" / commit, layer_norm_eps=eps)
        (repository / "refs" / "main").write_text(commit)
        loaded = load("some/bert")
        assert (loaded.revision, loaded.sha256, loaded.config.layer_norm_eps) == (
            commit,
            load(repository / "snapshots" / commit).sha256,
            eps,
        )
        assert shape("some/bert")[0] == loaded.config


def test_without_a_padding_id_no_row_is_zeroed(tmp_path: Path) -> None:
    encoder = load(write(tmp_path, pad_token_id=None)).encoder
    assert difference(tmp_path, encoder) < 1e-12
    fresh = Encoder(encoder.config, mlm_head=False)
    assert (fresh.word_embeddings.weight != 0).all()
    text = pack(RAGGED)
    text.input_ids[:2] = torch.tensor([0, VOCAB - 1])  # the first and the last row
    fresh(text.input_ids, text, NEEDS).hidden[2].square().sum().backward()
    gradient = fresh.word_embeddings.weight.grad
    assert gradient is not None and gradient[[0, VOCAB - 1]].any(dim=1).all()


@pytest.mark.parametrize("stated", [None, 3])
def test_a_student_pads_as_its_tokenizer(stated: int | None, tmp_path: Path) -> None:
    """Whatever config.json says: the padding row is zero and stays so, and every word's row is trained."""
    config, tokenizer = shape(write(tmp_path, pad_token_id=stated))
    student = Encoder(student_config("2L-24H-4A-52I", config, tokenizer), mlm_head=True)
    rows = student.word_embeddings.weight
    assert student.config.pad_token_id == 0 and not rows[0].any() and rows[1:].any(dim=1).all()
    text = pack(RAGGED)
    text.input_ids[:2] = torch.tensor([0, 3])
    student(text.input_ids, text, NEEDS).hidden[2].square().sum().backward()
    assert rows.grad is not None and not rows.grad[0].any() and rows.grad[3].any()
    export(student, tokenizer, tmp_path / "student", card="", mlm_head=True)
    assert AutoModel.from_pretrained(tmp_path / "student").config.pad_token_id == 0
    init_from_teacher(student, load(tmp_path).encoder.requires_grad_(False))  # shapes are equal, whatever pads


def test_an_untied_teacher_teaches_by_its_own_decoder(tmp_path: Path) -> None:
    rewrite(write(tmp_path), untie)
    loaded = load(tmp_path)
    assert loaded.encoder.head is not None and loaded.encoder.head.decoder is not None
    for dtype in (torch.float32, torch.bfloat16):
        teacher = Teacher(loaded, Needs(logits=True), device="cpu", dtype=dtype)
        assert torch.equal(teacher.encoder.decoder_weight, loaded.encoder.head.decoder.to(dtype))
    config = student_config("1L-24H-4A-52I", loaded.config, loaded.tokenizer)
    assert config.tied  # a student's is
    init_from_teacher(Encoder(config, mlm_head=False), loaded.encoder)
    with pytest.raises(ValueError, match=r"own decoder is another \(untied\); leave it out, or use --method minilmv2"):
        init_from_teacher(Encoder(config, mlm_head=True), loaded.encoder)


def test_a_vocabulary_file_is_converted(tmp_path: Path) -> None:
    vocabulary(write(tmp_path))
    assert isinstance(load(tmp_path).tokenizer, tokenization_bert.BertTokenizer)
    assert load(tmp_path).tokenizer("W7 w8")["input_ids"] == [2, 12, 13, 3]


def test_the_exported_tokenizer_names_the_longest_sequence(tmp_path: Path) -> None:
    loaded, final = load(write(tmp_path)), tmp_path / "final"
    export(loaded.encoder, loaded.tokenizer, final, card="", mlm_head=True, max_length=32)
    assert AutoTokenizer.from_pretrained(final).model_max_length == 32
    assert loaded.tokenizer.model_max_length > 32  # the run's own is left as it was
    export(loaded.encoder, load(final).tokenizer, tmp_path / "again", card="", mlm_head=True, max_length=64)
    assert AutoTokenizer.from_pretrained(tmp_path / "again").model_max_length == 32  # never more than it was


def test_the_digest_is_of_the_numbers_however_they_are_stored(tmp_path: Path) -> None:
    folder, digests = tmp_path / "model", {}
    for storage, shard in (("safetensors", "1GB"), ("shards", "20KB"), ("bin", "1GB"), ("bin shards", "20KB")):
        shutil.rmtree(folder, ignore_errors=True)
        write(folder, shard=shard)
        if "bin" in storage:
            pickled(folder)
        digests[storage] = load(folder).sha256
        for path in [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]:
            state = torch.load(path) if path.suffix == ".bin" else load_file(path)
            first = next(iter(state))
            state[first] = state[first] + 1
            torch.save(state, path) if path.suffix == ".bin" else save_file(state, path, metadata={"format": "pt"})
            digests[f"{storage}, {path.name}"] = load(folder).sha256
    one = digests.pop("safetensors")
    assert one is not None and [digests.pop(name) for name in ("shards", "bin", "bin shards")] == [one] * 3
    assert one not in digests.values() and len({*digests.values()}) >= 4
    write(folder, shard="1GB")
    for name in folder.glob("pytorch_model*"):
        name.unlink()
    for changes, same in (
        ({"layer_norm_eps": 1e-3}, False),
        ({"hidden_act": "gelu_python"}, True),
        ({"vocab": 3}, True),
    ):
        plain = (folder / "config.json").read_bytes()
        edit(folder, **changes)
        assert (load(folder).sha256 == one) == same, changes
        (folder / "config.json").write_bytes(plain)
    rewrite(folder, lambda state: {name: tensor.half() for name, tensor in state.items()})
    half = load(folder).sha256
    rewrite(folder, lambda state: {name: tensor.float() for name, tensor in state.items()})
    assert half == load(folder).sha256 != one  # rounded, then stored in either format
