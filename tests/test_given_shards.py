"""A folder of shards in a corpus's place: every command reads it, verified, and only with its own tokenizer."""

import json
import os
import random
import shutil
from itertools import pairwise
from pathlib import Path

import made_model
import pytest

from fastkd import compare, plan, run
from fastkd.data.builder import load
from fastkd.data.corpus import check
from fastkd.data.part import Part
from fastkd.data.shards import Shards, build_shards, write_sample
from fastkd.loop import Loop
from fastkd.models import hf
from fastkd.run_folder import read_run


@pytest.fixture(scope="module")
def shards(made_teacher: Path, made_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return build_shards(str(made_corpus), hf.load(made_teacher).tokenizer, tmp_path_factory.mktemp("shards"))


@pytest.fixture
def options(made_teacher: Path) -> list[str]:
    """Of a run that takes a second, but for its corpus."""
    made = ["--preset", "quickstart", "--teacher", str(made_teacher), "--student", "1L-48H-12A", "--dtype", "float32"]
    return [*made, "--batch-tokens", "1024", "--seq-length", "32", "--budget-tokens", "4096"]


def documents(shards: Shards, split: str = "train") -> list[list[int]]:
    tokens, offsets = shards.documents(split)
    return [tokens[a:b].tolist() for a, b in pairwise(offsets)]


def test_a_run_on_shards_is_the_run_on_their_text(
    shards: Shards, made_corpus: Path, options: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(shards.folder, folder)
    for name, corpus in (("text", made_corpus), ("shards", folder)):
        assert run.main([*options, "--corpus", str(corpus), "--output-dir", str(tmp_path / name)]) == 0
    text, given = read_run(tmp_path / "text"), read_run(tmp_path / "shards")
    assert [step["loss"] for step in given.steps] == [step["loss"] for step in text.steps]
    assert given.environment["corpus_version"] == text.environment["corpus_version"] == shards.folder.name
    assert given.plan["corpus"]["unique_tokens"] == shards.unique_tokens


def test_a_plan_and_a_comparison_take_them(shards: Shards, options: list[str], tmp_path: Path) -> None:
    given = [*options, "--corpus", str(shards.folder)]
    assert plan.main(given) == 0
    rows = ["--methods", "mlm,minilmv2", "--budget-gpu-hours", "0.0005", "--plan-only"]
    assert compare.main([*given[:-4], *given[-2:], *rows, "--output-dir", str(tmp_path / "comparison")]) == 0


def interrupted(*args: object, **options: object) -> None:
    """What Ctrl-C does to the call that it replaces."""
    raise KeyboardInterrupt


def test_a_resumed_run_notices_other_shards(
    shards: Shards, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Though the folder is called the same."""
    folder = tmp_path / "shards"
    shutil.copytree(shards.folder, folder)
    command = [*options, "--corpus", str(folder), "--output-dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "save_the_end", interrupted)
        assert run.main(command) == run.EXIT_INTERRUPTED
    write_sample(shards, folder, tokens=10_000, seed=1)
    assert run.main(command) == run.EXIT_CONFIGURATION
    assert "the corpus changed since the run in" in capsys.readouterr().err


def truncate(folder: Path) -> None:
    os.truncate(folder / "part-00000" / "train.tokens.bin", 100)


def remove(folder: Path) -> None:
    (folder / "part-00000" / "validation.offsets.bin").unlink()


def spoil(folder: Path) -> None:
    (folder / "part-00000" / "index.json").write_text("[]")


def forget(folder: Path) -> None:
    """A file that no digest covers."""
    index = json.loads((folder / "part-00000" / "index.json").read_text())
    del index["files"]["train.tokens.bin"]
    (folder / "part-00000" / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "is corrupted (it has 100 bytes, its index.json says 57556)"),
        (remove, "cannot be read"),
        (spoil, "holds no shards"),
        (forget, "holds no shards"),
    ],
)
def test_damage_is_one_line_and_the_folder_is_kept(
    damage, words: str, shards: Shards, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards of a cache are built again; these are the user's."""
    folder = tmp_path / "shards"
    shutil.copytree(shards.folder, folder)
    damage(folder)
    before = sorted(path.name for path in folder.iterdir())
    assert run.main([*options, "--corpus", str(folder), "--output-dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line and "copy it again, or give --corpus text" in line
    assert sorted(path.name for path in folder.iterdir()) == before and not (tmp_path / "run").exists()


def mutated(data: bytes, seed: int) -> bytes:
    """A file after one accident: bits, bytes, digits, values or lines that are others, lost, doubled or moved."""
    rng = random.Random(seed)
    place, length = rng.randrange(len(data)), rng.randrange(1, 40)
    match seed % 8:
        case 0:
            return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        case 1:
            return data[:place]
        case 2:
            return data[:place] + data[place + length :]
        case 3:
            return data[:place] + rng.randbytes(length) + data[place:]
        case 4:
            digits = [i for i, byte in enumerate(data) if 48 <= byte < 58]
            return bytes(
                (byte + 1 if byte < 57 else 48) if i == digits[place % len(digits)] else byte
                for i, byte in enumerate(data)
            )
        case 5:
            lines = data.splitlines(keepends=True)
            first, second = rng.sample(range(len(lines)), 2)
            lines[first], lines[second] = lines[second], lines[first]
            return b"".join(lines)
        case 6:
            index = json.loads(data)
            inner = rng.choice([index, index["recipe"], index["tokens"], index["documents"], index["files"]])
            other = rng.choice([None, 0, -1, 3, 1e30, float("nan"), "uint8", [], {}, True, "[" * 9])
            inner[rng.choice(list(inner))] = other
            return json.dumps(index).encode()
    return b"[" * 100_000 if place % 2 else data[::-1]


def test_no_change_of_an_index_is_silent(shards: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """200 accidents: each is one line with the remedy, or a part that the cache builds again; or it changed no value."""
    folder = tmp_path / "shards"
    shutil.copytree(shards.folder, folder)
    path = folder / "part-00000" / "index.json"
    sound, refused = path.read_bytes(), 0
    for seed in range(200):
        path.write_bytes(mutated(sound, seed))
        try:
            found = Part(folder, 0, remedy="copy it again").index
        except ValueError as error:
            assert str(error).endswith(": copy it again") and len(str(error).splitlines()) == 1, (seed, error)
            assert load(folder, 0) is None
            refused += 1
        else:
            assert found == json.loads(sound), seed
    assert refused >= 190 and {message.rpartition(": ")[2] for message in caplog.messages} == {"it is built again"}


def test_shards_of_an_older_version_have_no_digest_and_are_checked_by_their_sizes(
    shards: Shards, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards.folder, folder)
    path = folder / "part-00000" / "index.json"
    older = json.loads(path.read_bytes())
    del older["sha256"]
    path.write_text(json.dumps(older, indent=1))
    assert documents(Shards(folder, whole=True)) == documents(shards)
    for changes in (
        {"dtype": "uint32"},
        {"dtype": "uint8"},
        {"tokens": {"train": 7, "validation": 7}},
        {"vocab_size": 2**17},
    ):
        path.write_text(json.dumps(older | changes))
        with pytest.raises(ValueError, match="copy it again"):
            Shards(folder, whole=True, remedy="copy it again")


def test_another_tokenizer_is_refused(
    shards: Shards, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = made_model.write_teacher(tmp_path / "other", made_model.texts(seed=1))
    capsys.readouterr()  # transformers' bars
    command = [str(other) if i and options[i - 1] == "--teacher" else part for i, part in enumerate(options)]
    assert run.main([*command, "--corpus", str(shards.folder), "--output-dir", str(tmp_path / "run")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert "were made by another tokenizer than the student's" in lines[0] and "--tokenizer" in lines[0]


def test_shards_are_a_corpus_of_their_own(shards: Shards, made_corpus: Path) -> None:
    with pytest.raises(ValueError, match="are a corpus of their own: give --corpus nothing else"):
        check([str(made_corpus), str(shards.folder)])
    check(str(shards.folder))


def test_a_folder_of_text_may_hold_an_index(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("{}")
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    check(str(tmp_path))


def test_a_sample_is_whole_documents_in_order_and_grows_by_adding(shards: Shards, tmp_path: Path) -> None:
    whole = documents(shards)
    few, more = (write_sample(shards, tmp_path / str(n), tokens=n, seed=3) for n in (2_000, 9_000))
    places = [[whole.index(document) for document in documents(sample)] for sample in (few, more)]
    assert all(found == sorted(found) for found in places) and set(places[0]) < set(places[1])
    assert 8_000 < more.unique_tokens <= 9_000 and len({few.version, more.version, shards.version}) == 3
    assert documents(more, "validation") == documents(shards, "validation")
    assert [whole.index(d) for d in documents(write_sample(shards, tmp_path / "s", tokens=9_000, seed=4))] != places[1]
    same = write_sample(shards, tmp_path / "all", tokens=shards.unique_tokens, seed=3)
    assert same.first.index == shards.first.index
    assert write_sample(shards, tmp_path / "one", tokens=0, seed=3).sizes["documents"]["train"] == 1
