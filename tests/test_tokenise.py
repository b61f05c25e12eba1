"""Token ids of a text beside transformers' own; tokens with a role are only words of a text, others have their ids."""

import io
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastkd import run
from fastkd.data import reading
from fastkd.data import tokenise as tokenise_module
from fastkd.data.progress import Shown
from fastkd.data.tokenise import ROLES, Tokens, WorkerLost, encode, load, serialise, tokenise
from fastkd.data.unknown import require_ordinary, unknown_remark, unknown_share

PLAIN = ["the [E1] capital [/E1] of[E1]France", "[e1] [E2]", "  two  spaces, naïve 東京 🙂", "[E1][E1]", ""]
ENTITIES = ["[E1]", "[/E1]"]


def word_piece(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def byte_bpe(folder: Path) -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    special.append(AddedToken("<mask>", lstrip=True, special=True))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(PLAIN, trainer)
    return roberta_roles(backend)


def unigram(folder: Path) -> PreTrainedTokenizerBase:
    """As sentencepiece's models are carried over: control pieces stand in the vocabulary with score 0."""
    pieces = [(piece, 0.0) for piece in ("<s>", "<pad>", "</s>", "<unk>")]
    letters = sorted({*"".join(PLAIN), *"<s/>mask▁"} - {" "})
    backend = Tokenizer(models.Unigram([*pieces, *((letter, -4.0) for letter in letters)], unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece, _ in pieces])
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True, normalized=False)])
    return roberta_roles(backend)


def roberta_roles(backend: Tokenizer) -> PreTrainedTokenizerFast:
    roles = dict(zip(ROLES, ("<s>", "</s>", "<mask>", "<pad>", "<unk>"), strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


@pytest.fixture(params=[word_piece, byte_bpe, unigram], ids=lambda make: make.__name__)
def tokenizer(request: pytest.FixtureRequest, quickstart_teacher: Path) -> PreTrainedTokenizerBase:
    made = request.param(quickstart_teacher)
    made.add_special_tokens({"additional_special_tokens": ENTITIES})
    return made


def ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    tokens = encode(load(serialise(tokenizer)), texts)
    return [part.tolist() for part in np.split(tokens.ids, tokens.lengths.cumsum()[:-1])]


def test_added_tokens_have_their_ids_in_a_text(tokenizer: PreTrainedTokenizerBase) -> None:
    found = ids(tokenizer, PLAIN)
    assert found == tokenizer(PLAIN, add_special_tokens=False).input_ids
    first, second = tokenizer.convert_tokens_to_ids(ENTITIES)
    assert [found[0].count(first), found[0].count(second), found[3]] == [2, 1, [first, first]]


def test_tokens_with_a_role_are_words_of_a_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """As transformers has it where it splits all special tokens, and with [E1] in the same text."""
    spelled = [f"a {getattr(tokenizer, role)} b{getattr(tokenizer, role)} [E1] c" for role in ROLES]
    found = ids(tokenizer, spelled)
    roles = {getattr(tokenizer, f"{role}_id") for role in ROLES} - {tokenizer.unk_token_id}
    assert not any(roles & set(text) for text in found)
    assert all(text.count(tokenizer.convert_tokens_to_ids("[E1]")) == 1 for text in found)
    if tokenizer.backend_tokenizer.model.__class__ is models.Unigram:
        return  # transformers finds the piece "<s>" in a text
    before = [text.split("[E1]")[0] for text in spelled]
    parts = tokenizer(before, add_special_tokens=False, split_special_tokens=True).input_ids
    assert [text[: len(part)] for text, part in zip(found, parts, strict=True)] == parts


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda each: each.name)
def test_a_worker_that_is_killed_or_stopped_is_one_line(
    number: int, quickstart_teacher: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As the system does when memory runs out. The other workers end too, and say nothing."""
    tokenizer = serialise(AutoTokenizer.from_pretrained(quickstart_teacher))
    monkeypatch.setattr(tokenise_module, "CHUNK_CHARACTERS", 2**15)
    monkeypatch.setattr(tokenise_module, "PATIENCE", 3.0)
    text = "a text " * (2**15 // 7)
    before = children()  # of this process; other tests may have left some
    results = tokenise([text] * 50, tokenizer, workers=2)
    next(results)
    lost, _ = crew = sorted(children() - before)
    os.kill(lost, number)
    said = {9: "was ended by signal 9, as the system does when memory", 19: "gave no answer"}[number]
    with pytest.raises(WorkerLost, match=rf"^a tokeniser process \({lost}\) {said}"):
        list(results)
    assert not children() & set(crew)
    assert capfd.readouterr().err == ""


def test_a_lost_worker_is_an_exit_code_that_asks_for_the_same_command(
    from_scratch: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its text is not wrong, and the folder of the shards can be written."""

    def lost(*_: object, **__: object) -> Iterator[Tokens]:
        raise WorkerLost("a tokeniser process (7) was ended by signal 9")
        yield

    with monkeypatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        patched.setattr(reading, "tokenise", lost)
        options = [*from_scratch, "--method", "mlm", "--budget-tokens", "3000", "--output-dir", str(tmp_path / "run")]
        assert run.main(options) == 75
    assert "error: a tokeniser process (7) was ended by signal 9: " in capsys.readouterr().err


def children() -> set[int]:
    found = [Path(f"/proc/self/task/{thread.native_id}/children") for thread in threading.enumerate()]
    return {int(child) for path in found for child in path.read_text().split()}


def test_the_share_of_unknown_tokens_is_told_or_refused(quickstart_teacher: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(quickstart_teacher)
    strange, known = "ᚠᚢᚦ ᚨᚱᚲ ", "a text "
    shares = []
    for text in (strange * 50, strange * 10 + known * 50, known * 50):
        found = encode(load(serialise(tokenizer)), [text]).ids
        shares.append(unknown_share(found, tokenizer.unk_token_id))
    assert shares == [1.0, pytest.approx(20 / 120), 0.0]
    with pytest.raises(ValueError, match=r"^100\.0% of the corpus's tokens are unknown .* --tokenizer that knows"):
        unknown_remark(shares[0])
    assert unknown_remark(shares[1]) == "16.7% of the corpus's tokens are unknown to the tokenizer and teach nothing"
    assert unknown_remark(shares[2]) is None and unknown_share(found, None) == 0


def test_a_text_of_markers_only_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    """Nothing of it is predicted: the loss would be 0 to the end."""
    found = encode(load(serialise(tokenizer)), ["[E1][/E1]" * 9, PLAIN[0]]).ids
    require_ordinary(found, tokenizer.all_special_ids)
    with pytest.raises(
        ValueError, match=r"^100\.0% of the corpus's tokens are special tokens, .* name another --corpus"
    ):
        require_ordinary(found[:18], tokenizer.all_special_ids)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_tells_documents_speed_share_and_time_left(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    written, clock = io.StringIO(), itertools.count(step=11.0)
    monkeypatch.setattr(time, "monotonic", clock.__next__)
    console = Console(file=written, force_terminal=terminal, width=140)
    with Shown(written.write, 4_000_000, console) as progress:
        progress.advance(1_000, 1_000_000, share=0.1)
        progress.advance(500, 1_000_000, share=0.2)
    assert "1,500 documents, 2.0 M tokens, 0.09 M tokens/s, 50%, 22 s left" in written.getvalue()
