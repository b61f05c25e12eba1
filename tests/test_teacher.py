"""The frozen teacher: what it computes, what it keeps, whom it refuses to teach."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packed_text import RAGGED, VOCAB, bert, pack, roberta, word_tokenizer
from transformers import AutoTokenizer

from fastkd.models import float8
from fastkd.models.captured import Inputs
from fastkd.models.encoder import Encoder, EncoderConfig
from fastkd.models.hf import Loaded, from_hf_model, load
from fastkd.models.needs import Needs
from fastkd.models.teacher import Teacher, check_teacher, encoding_digest


@pytest.fixture(scope="module")
def quickstart(quickstart_teacher: Path) -> Loaded:
    return load(quickstart_teacher)


@pytest.fixture
def random_teacher() -> Loaded:
    """A small teacher with an MLM head."""
    encoder = from_hf_model(bert(), mlm_head=True)
    return Loaded(encoder, encoder.config, word_tokenizer(), "random")


def make(loaded: Loaded, needs: Needs, dtype: torch.dtype = torch.float32) -> Teacher:
    return Teacher(loaded, needs, device="cpu", dtype=dtype)


def test_computes_what_the_encoder_does(random_teacher: Loaded) -> None:
    text, needs = pack(RAGGED), Needs(logits=True, hidden=(0, 2), qkv=(1,))
    plain = random_teacher.encoder(text.input_ids, text, needs)
    taught = make(random_teacher, needs)(text.input_ids, text)
    assert plain.head_rows is not None and taught.head_rows is not None
    torch.testing.assert_close(taught.head_rows, plain.head_rows, atol=0, rtol=0)
    assert taught.head_rows.is_inference()
    for layer in needs.hidden:
        assert torch.equal(taught.hidden[layer], plain.hidden[layer])


def test_bfloat16_is_autocasts_arithmetic(random_teacher: Loaded) -> None:
    text, needs = pack(RAGGED), Needs(logits=True, hidden=(3,), qkv=(2,))
    exact = random_teacher.encoder(text.input_ids, text, needs)
    teacher = make(random_teacher, needs, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = random_teacher.encoder(text.input_ids, text, needs)
        inside = teacher(text.input_ids, text)
    outside = teacher(text.input_ids, text)
    assert torch.equal(inside.hidden[3], outside.hidden[3])  # whether or not the caller is under autocast
    assert outside.hidden[3].dtype == torch.float32 and outside.qkv[2][0].dtype == torch.bfloat16
    error, allowed = (float((x.hidden[3] - exact.hidden[3]).detach().norm()) for x in (outside, autocast))
    assert error < 1.3 * allowed
    decoder = teacher.encoder.decoder_weight, teacher.encoder.decoder_bias
    assert [x.dtype for x in decoder] == [torch.bfloat16, torch.float32]  # the bias is added to float32 sums


def test_a_captured_forward_reads_its_own_buffers() -> None:
    """What a CUDA graph replays on: each batch is copied into the first one's tensors, if the shapes are equal."""
    one, other = pack((9, 7, 16), seed=1), pack((7, 9, 16), seed=2)
    inputs = Inputs.like(one.input_ids, one)
    assert inputs.fits(other.input_ids, other) and not inputs.fits(*(lambda text: (text.input_ids, text))(pack((9, 7))))
    kept = inputs.ids
    inputs.fill(other.input_ids, other)
    assert inputs.ids is kept and torch.equal(kept, other.input_ids) and not torch.equal(kept, one.input_ids)
    for name in ("position_ids", "cu_seqlens", "predicted"):
        assert torch.equal(getattr(inputs, name), getattr(other, name)) and getattr(inputs, name) is not getattr(
            other, name
        )


def test_a_float32_teacher_stays_float32_under_autocast(random_teacher: Loaded) -> None:
    text, needs = pack(RAGGED), Needs(logits=True, qkv=(3,))
    teacher = make(random_teacher, needs)
    plain = teacher(text.input_ids, text)
    with torch.autocast("cpu", torch.bfloat16):
        inside = teacher(text.input_ids, text)
    assert plain.head_rows is not None and inside.head_rows is not None
    assert torch.equal(plain.head_rows, inside.head_rows)
    assert inside.qkv[3][0].dtype == torch.float32


def test_a_student_learns_on_the_batch_that_the_teacher_read(random_teacher: Loaded) -> None:
    """What the teacher leaves behind in inference mode can be part of the student's graph."""
    text, needs = pack((31, 7, 12), seed=5), Needs(hidden=(3,))
    taught = make(random_teacher, needs, torch.bfloat16)(text.input_ids, text)
    with torch.autocast("cpu", torch.bfloat16):
        learned = random_teacher.encoder(text.input_ids, text, needs)
    (learned.hidden[3] - taught.hidden[3].clone()).square().sum().backward()
    assert all(p.grad is not None for p in random_teacher.encoder.layers.parameters())


@pytest.mark.parametrize(
    ("needs", "layers", "head"),
    [(Needs(qkv=(2,)), 2, False), (Needs(hidden=(0,)), 0, False), (Needs(logits=True), 3, True)],
    ids=str,
)
def test_keeps_only_what_is_read(random_teacher: Loaded, needs: Needs, layers: int, head: bool) -> None:
    teacher = make(random_teacher, needs, torch.bfloat16)
    assert len(teacher.encoder.layers) == layers and (teacher.encoder.head is not None) == head
    text = pack(RAGGED)
    teacher(text.input_ids, text)
    # The checkpoint itself is left whole and trainable: a student may start from it.
    assert len(random_teacher.encoder.layers) == 3 and random_teacher.encoder.head is not None
    assert all(p.requires_grad and p.dtype == torch.float32 for p in random_teacher.encoder.parameters())


def test_never_trains(random_teacher: Loaded) -> None:
    teacher, text = make(random_teacher, Needs(hidden=(3,))), pack(RAGGED)
    assert not isinstance(teacher, torch.nn.Module)
    assert not teacher.encoder.training and not any(p.requires_grad for p in teacher.encoder.parameters())
    holder = torch.nn.Linear(1, 1)
    holder.teacher = teacher  # type: ignore[assignment]
    before = teacher(text.input_ids, text).hidden[3]
    holder.train()
    assert [name for name, _ in holder.named_parameters()] == ["weight", "bias"]
    assert not teacher.encoder.training and torch.equal(before, teacher(text.input_ids, text).hidden[3])


def test_checking_a_tokenizer_leaves_it_as_it_is(quickstart_teacher: Path) -> None:
    """Its padding and truncation, which a call would set, are exported with the student."""
    backend = (tokenizer := AutoTokenizer.from_pretrained(quickstart_teacher)).backend_tokenizer
    backend.enable_padding(length=64)
    backend.enable_truncation(max_length=64)
    before = backend.to_str()
    encoding_digest(tokenizer)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_one_tokenizer_one_hash(quickstart: Loaded, quickstart_teacher: Path, tmp_path: Path) -> None:
    mine = encoding_digest(quickstart.tokenizer)
    assert mine == encoding_digest(AutoTokenizer.from_pretrained(quickstart_teacher))
    quickstart.tokenizer.save_pretrained(tmp_path)
    assert mine == encoding_digest(AutoTokenizer.from_pretrained(tmp_path))
    (tmp_path / "tokenizer.json").write_text(
        (tmp_path / "tokenizer.json").read_text().replace('"lowercase":true', '"lowercase":false').replace(
            '"lowercase": true', '"lowercase": false'
        )
    )  # fmt: skip
    assert mine != encoding_digest(AutoTokenizer.from_pretrained(tmp_path, do_lower_case=False))
    longer = AutoTokenizer.from_pretrained(quickstart_teacher)
    longer.add_tokens(["fastkdtoken"])
    assert mine != encoding_digest(longer)


def student(loaded: Loaded, **changes: int) -> EncoderConfig:
    return replace(loaded.config, num_layers=3, **changes)  # type: ignore[arg-type]


def test_a_fitting_teacher_is_accepted(quickstart: Loaded, random_teacher: Loaded) -> None:
    tokenizer = quickstart.tokenizer
    check_teacher(quickstart, student(quickstart), tokenizer, Needs(qkv=(6,)), 512)
    check_teacher(quickstart, student(quickstart, hidden_size=96, num_heads=4), tokenizer, Needs(qkv=(6,)), 128)
    check_teacher(random_teacher, student(random_teacher), random_teacher.tokenizer, Needs(logits=True), 64)


def test_an_unfit_teacher_is_refused(quickstart: Loaded, random_teacher: Loaded) -> None:
    tokenizer, other = quickstart.tokenizer, AutoTokenizer.from_pretrained(quickstart.tokenizer.name_or_path)
    other.add_tokens(["fastkdtoken"])
    with pytest.raises(ValueError, match="no MLM head; train one with --method mlm, or use --method minilmv2"):
        check_teacher(quickstart, student(quickstart), tokenizer, Needs(logits=True), 128)
    with pytest.raises(ValueError, match="has another tokenizer than the student"):
        check_teacher(quickstart, student(quickstart), other, Needs(qkv=(6,)), 128)
    with pytest.raises(ValueError, match=f"has {VOCAB} tokens, the student 300"):
        pupil, needs = student(random_teacher, vocab_size=300), Needs(logits=True)
        check_teacher(random_teacher, pupil, random_teacher.tokenizer, needs, 64)
    with pytest.raises(ValueError, match="has 6 layers, not 7"):
        check_teacher(quickstart, student(quickstart), tokenizer, Needs(qkv=(7,)), 128)


def test_a_teacher_that_lacks_positions_or_tokens_is_refused(quickstart: Loaded, random_teacher: Loaded) -> None:
    """A row that the tables do not have is an IndexError on a CPU and a device assert on a GPU."""
    needs = Needs(qkv=(3,))
    with pytest.raises(ValueError, match="--seq-length 65 is beyond the 64 positions of teacher random; lower it"):
        check_teacher(random_teacher, student(quickstart), random_teacher.tokenizer, needs, 65)
    short = replace(random_teacher, tokenizer=word_tokenizer())
    short.tokenizer.model_max_length = 32
    check_teacher(short, student(quickstart), random_teacher.tokenizer, needs, 32)
    with pytest.raises(ValueError, match=r"--seq-length 33 is beyond the 32 tokens .*\(model_max_length\); lower it"):
        check_teacher(short, student(quickstart), random_teacher.tokenizer, needs, 33)
    both = replace(random_teacher, tokenizer=quickstart.tokenizer)
    with pytest.raises(ValueError, match=f"has embeddings for {VOCAB} tokens, the tokenizer 30522; use the tokenizer"):
        check_teacher(both, student(quickstart), quickstart.tokenizer, needs, 64)


def test_a_roberta_teacher_must_pad_by_its_own_id() -> None:
    """Its positions are counted from that id: with another, transformers would skip an ordinary token."""
    encoder = from_hf_model(roberta(), mlm_head=True)
    needs, pupil = Needs(qkv=(3,)), replace(encoder.config, num_layers=2)
    own = word_tokenizer(("cls", "pad", "unk", "sep", "mask"))
    check_teacher(Loaded(encoder, encoder.config, own, "random"), pupil, own, needs, 64)
    with pytest.raises(ValueError, match=r"pads by id 0, but config.json's pad_token_id, .* is 1; use the tokenizer"):
        check_teacher(Loaded(encoder, encoder.config, word_tokenizer(), "random"), pupil, word_tokenizer(), needs, 64)


def test_the_student_is_not_the_teacher(random_teacher: Loaded) -> None:
    """Training a student that started as the teacher leaves the teacher as it was."""
    teacher, text = make(random_teacher, Needs(hidden=(3,))), pack(RAGGED)
    before = teacher(text.input_ids, text).hidden[3]
    pupil: Encoder = random_teacher.encoder
    with torch.no_grad():
        for parameter in pupil.parameters():
            parameter.add_(1.0)
    assert torch.equal(before, teacher(text.input_ids, text).hidden[3])


@pytest.mark.parametrize(("quarter", "refused"), [(1.0, False), (1.009, False), (0.98, True), (float("nan"), True)])
def test_float8_is_refused_where_it_moves_the_loss(quarter: float, refused: bool) -> None:
    losses = {"float32": 1.0, "bfloat16": 1.0005, "float8": quarter}
    message = r"moves the loss by .*: leave --teacher-dtype out"
    with pytest.raises(ValueError, match=message) if refused else contextlib.nullcontext():
        float8.check(losses.__getitem__)


def test_float8_needs_a_gpu_that_has_it() -> None:
    with pytest.raises(ValueError, match=r"--teacher-dtype float8 needs a GPU .*: leave it out"):
        float8.require(torch.device("cpu"))
