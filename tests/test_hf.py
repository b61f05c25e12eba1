"""Hugging Face checkpoints: what is exported loads elsewhere as it was, and what is refused says why."""

import logging
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from given_model import edit
from oracle import assert_rounded_alike
from packed_text import RAGGED, VOCAB, bert, pack, roberta, word_tokenizer
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fastkd.glue.model import find_model
from fastkd.models.encoder import Encoder
from fastkd.models.hf import export, from_hf, from_hf_model, load, shape, to_hf
from fastkd.models.needs import Needs
from fastkd.models.student import init_from_teacher, student_config
from fastkd.push import push_folder

ALL = Needs(hidden=(0, 1, 2, 3))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def encoder_of(make: Callable[[], PreTrainedModel], mlm_head: bool = True) -> Encoder:
    return from_hf_model(make(), mlm_head=mlm_head)


def same_parameters(one: Encoder, other: Encoder) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("make", [bert, roberta])
def test_exported_masked_lm_loads_in_transformers(
    make: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    encoder, text = encoder_of(make), pack(RAGGED)
    export(encoder, tokenizer, tmp_path / "final", card="# A student\n", mlm_head=True)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        logging.getLogger("transformers").propagate = True
        model = AutoModelForMaskedLM.from_pretrained(tmp_path / "final").eval()
        logging.getLogger("transformers").propagate = False
        assert not caplog.records
        body = AutoModel.from_pretrained(tmp_path / "final", add_pooling_layer=False).eval()
    ids, real = text.padded(model.config.pad_token_id)
    out = encoder(text.input_ids, text, replace(ALL, logits=True))
    assert out.head_rows is not None
    with torch.no_grad():
        theirs = model(ids, attention_mask=real.long(), output_hidden_states=True)
        bare = body(ids, attention_mask=real.long()).last_hidden_state[real]
    for layer, hidden in out.hidden.items():
        assert_rounded_alike(hidden, theirs.hidden_states[layer][real])
    assert_rounded_alike(out.hidden[3], bare)
    ours = out.head_rows @ encoder.decoder_weight.T + encoder.decoder_bias
    assert_rounded_alike(ours, theirs.logits[real][text.predicted])


@pytest.mark.parametrize("make", [bert, roberta])
def test_exported_bare_model_lacks_the_pooler_alone(
    make: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    encoder, text = encoder_of(make), pack(RAGGED)
    export(encoder, tokenizer, tmp_path / "final", card="# A student\n", mlm_head=False)
    model, found = AutoModel.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert {name.split(".")[0] for name in found["missing_keys"]} <= {"pooler"}
    assert not found["unexpected_keys"] and not found["mismatched_keys"]
    ids, real = text.padded(model.config.pad_token_id)
    with torch.no_grad():
        theirs = model.eval()(ids, attention_mask=real.long()).last_hidden_state[real]
    assert_rounded_alike(encoder(text.input_ids, text, ALL).hidden[3], theirs)
    assert load(tmp_path / "final").encoder.head is None


@pytest.mark.parametrize("make", [bert, roberta])
def test_round_trip_keeps_every_bit(
    make: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    encoder = encoder_of(make)
    export(encoder, tokenizer, tmp_path / "final", card="# A student\n", mlm_head=True)
    loaded = load(tmp_path)  # a finished run: its final/
    assert same_parameters(loaded.encoder, encoder)
    assert loaded.config == encoder.config == from_hf(to_hf(encoder.config))
    assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert loaded.source == str(tmp_path) and loaded.revision is None
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.encoder.parameters())


def test_encoder_is_a_copy_of_the_model() -> None:
    model = bert()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in from_hf_model(model, mlm_head=True).parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_export_is_whole_and_replaces(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    first, second = encoder_of(bert), encoder_of(lambda: bert(seed=1))
    for encoder in (first, second):
        export(encoder, tokenizer, tmp_path / "run" / "final", card="# A student\n", mlm_head=True)
    assert same_parameters(load(tmp_path / "run").encoder, second)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["final"]
    (tmp_path / "plain").touch()  # has the mode that the umask means
    modes = {path.stat().st_mode for path in (tmp_path / "run" / "final").rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
    assert (tmp_path / "run" / "final" / "README.md").read_text() == "# A student\n"
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "final")("w1 w2")["input_ids"] == [6, 7]
    # An export that fails leaves what was there.
    with pytest.raises(AttributeError):
        export(first, None, tmp_path / "run" / "final", card="", mlm_head=True)  # type: ignore[arg-type]
    assert same_parameters(load(tmp_path / "run").encoder, second)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["final"]


def test_quickstart_teacher_is_verified(quickstart_teacher: Path, tmp_path: Path) -> None:
    digest = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    loaded = load(quickstart_teacher, sha256=digest)
    assert loaded.encoder.head is None
    assert (loaded.config.num_layers, loaded.config.hidden_size, loaded.config.num_heads) == (6, 384, 12)
    broken = tmp_path / "model"
    shutil.copytree(quickstart_teacher, broken)
    with (broken / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(ValueError, match=f"has sha256 .* not {digest}; download it again"):
        load(broken, sha256=digest)


def test_student_spec() -> None:
    like, tokenizer = encoder_of(roberta).config, word_tokenizer(("cls", "pad", "unk", "sep", "mask"))
    short, full = (student_config(spec, like, tokenizer) for spec in ("2L-64H-4A", "2L-64H-4A-100I"))
    assert short == replace(like, num_layers=2, hidden_size=64, num_heads=4, intermediate_size=256)
    assert full == replace(short, intermediate_size=100)
    for spec in ("", "3L-384H", "3l-384h-12a", "0L-64H-4A", "2L-64H-4A-", "2L-64H-4A-100I-1", "x2L-64H-4A"):
        with pytest.raises(ValueError, match=f"student {spec!r} is malformed; write it as 3L-384H-12A"):
            student_config(spec, like, tokenizer)
    with pytest.raises(ValueError, match="width 64 is not divisible by 5 heads"):
        student_config("2L-64H-5A", like, tokenizer)
    with pytest.raises(ValueError, match=f"the tokenizer has {VOCAB} tokens, the model 100"):
        student_config("2L-64H-4A", replace(like, vocab_size=100), tokenizer)


def test_student_starts_from_every_other_teacher_layer() -> None:
    teacher = encoder_of(lambda: bert(layers=6))
    student = Encoder(replace(teacher.config, num_layers=3, initializer_range=0.1), mlm_head=True)
    init_from_teacher(student, teacher)
    for i in range(3):
        mine, theirs = student.layers[i].state_dict(), teacher.layers[2 * i].state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(student.word_embeddings.weight, teacher.word_embeddings.weight)
    assert student.head is not None and teacher.head is not None
    assert torch.equal(student.head.dense.weight, teacher.head.dense.weight)
    student.word_embeddings.weight.data.zero_()
    assert teacher.word_embeddings.weight.any()  # a copy, not the teacher's own


def test_student_starts_from_a_teacher_without_a_head() -> None:
    teacher = encoder_of(bert, mlm_head=False)
    student = Encoder(replace(teacher.config, num_layers=2), mlm_head=True, seed=3)
    head = Encoder(student.config, mlm_head=True, seed=3).head
    init_from_teacher(student, teacher)
    assert student.head is not None and head is not None
    assert torch.equal(student.head.dense.weight, head.dense.weight)  # stays as it was initialised


def changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model.safetensors", changed, "was changed since it was exported"),
        ("config.json", lambda path: edit(path.parent, layer_norm_eps=1e-3), "was changed since it was exported"),
        ("tokenizer.json", changed, "was changed since it was exported"),
        ("tokenizer_config.json", lambda path: edit(path.parent, path.name, mask_token="w1"), "was changed since"),
        ("1_Pooling/config.json", Path.unlink, "cannot be read"),
        ("added_tokens.json", lambda path: path.write_text('{"w1": 9}'), "was not exported with the other files"),
        ("manifest.json", changed, "is damaged"),
        ("manifest.json", lambda path: path.write_text("{}"), "is damaged"),
    ],
)
def test_an_export_that_was_changed_is_refused(
    name: str, change: Callable[[Path], object], words: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """As teacher, as tokenizer, to be evaluated or pushed: in one line with the remedy."""
    final = tmp_path / "run" / "final"
    export(encoder_of(bert), tokenizer, final, card="# A student\n", mlm_head=True)
    (final / "README.md").write_text("# A card is edited, and scores are added to it\n")
    (final / ".gitattributes").write_text("of a hub")
    assert load(tmp_path / "run").sha256 and shape(final) and find_model(final)
    change(final / name)
    for read in (load, shape, find_model, lambda folder: push_folder(folder, "a/b")):
        with pytest.raises(ValueError, match=f"{name} {words}.*: copy the folder again, or remove it and") as caught:
            read(final)
        assert len(str(caught.value).splitlines()) == 1
    (final / "manifest.json").unlink()  # an older export, or the person's own change
    if name in ("config.json", "manifest.json", "1_Pooling/config.json"):
        assert load(final).sha256
