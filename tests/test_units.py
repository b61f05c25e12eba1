"""Units: every document is in exactly one, in an order that is a sample wherever the files are."""

import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkd.data.corpus import documents, sources, units
from fastkd.data.local_files import LocalFile
from fastkd.data.rows import JOINED_CHARACTERS

PIECES = ["a", "word", "é🙂東", " ", "\t \n", "\r\n", "\n", "\n\n", " \r\n \r\n", "\ufeff", "\u2028", "x" * 30]
BLOCKS = st.sampled_from([1, 2, 3, 5, 8, 13, 40, 2**20])


def plain_lines(data: bytes) -> list[str]:
    return [line.strip() for line in data.decode("utf-8-sig").split("\n")]


def plain_documents(data: bytes) -> list[str]:
    """Runs of lines that are not blank, told in another way than the reader's."""
    return [text for text in re.split(r"\n{2,}", "\n".join(plain_lines(data)).strip("\n")) if text]


def read(file: LocalFile) -> list[str]:
    """In the order of the file: that of its units is drawn."""
    parts = sorted(file.units(), key=lambda unit: getattr(unit, "start", 0))
    assert sum(unit.size for unit in parts) == file.size
    return [text for unit in parts for text in unit.documents("text")]


@settings(max_examples=40)
@given(st.lists(st.sampled_from(PIECES)), st.booleans(), BLOCKS)
def test_each_document_of_a_text_is_in_one_block(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], mark: bool, block: int
) -> None:
    data = ("\ufeff" * mark + "".join(pieces)).encode()
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(data)
    assert read(LocalFile(path, block=block)) == plain_documents(data)
    assert read(LocalFile(path, block=block, lines=True)) == [line for line in plain_lines(data) if line]
    packed = path.with_name("any.txt.gz")
    packed.write_bytes(gzip.compress(data))
    assert read(LocalFile(packed, block=block)) == plain_documents(data)


@settings(max_examples=40)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))), st.sampled_from(["\n", "\r\n", "\n \n"]), BLOCKS)
def test_each_row_of_a_jsonl_is_in_one_block(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], end: str, block: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(end.join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode())
    assert read(LocalFile(path, block=block)) == [text.strip() for text in texts if text.strip()]


def test_a_line_longer_than_many_blocks_is_read_once(tmp_path: Path) -> None:
    text = "word " * 10_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "a.txt").write_text(text)
    for name in ("a.jsonl", "a.txt"):
        assert read(LocalFile(tmp_path / name, block=64)) == [text.strip()]


def test_what_is_wrong_in_a_block_is_named_by_the_line_of_the_file(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"row {i}"}) for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, "{", *rows]))
    (tmp_path / "a.txt").write_bytes("\n".join(rows).encode() + b"\n\xe9\n")
    (tmp_path / "b.txt").write_bytes(("\n".join(rows * 3) + "\n\n").encode() + bytes(4096))
    for name, message in {
        "a.jsonl": r"a\.jsonl:101: not a JSON object",
        "a.txt": r"a\.txt:101: not UTF-8 \(byte 0xe9 at column 1\)",
        "b.txt": r"b\.txt:302: holds zero bytes, as .* a download that broke off does: copy it again",
    }.items():
        for block in (100, 2**20):
            with pytest.raises(ValueError, match=message):
                read(LocalFile(tmp_path / name, block=block))


def write_parquet(path: Path, texts: Sequence[str | None], row_group: int) -> Path:
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=row_group)
    return path


def test_a_parquet_file_is_read_by_row_groups(tmp_path: Path) -> None:
    texts = [f"row {i} " * (i % 7) for i in range(1_000)]
    file = LocalFile(write_parquet(tmp_path / "a.parquet", texts, 96))
    parts = list(file.units())
    assert len(parts) == 11 and sum(unit.size for unit in parts) == file.size
    found = [list(unit.documents("text")) for unit in parts]
    assert Counter(chain(*found)) == Counter(text.strip() for text in texts if text)
    assert found != sorted(found, key=lambda group: int(group[0].split()[1])), "in the order of the file"
    for group in found:
        numbers = [int(text.split()[1]) for text in group]
        assert numbers == sorted(numbers) and numbers[-1] - numbers[0] < 96


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A large text, a parquet file of many row groups, small files and an empty one."""
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "large.txt").write_text("\n\n".join(f"large {i} " * 20 for i in range(20_000)))
    write_parquet(folder / "many.parquet", [f"many {i} " * 20 for i in range(4_000)], 100)
    for i in range(40):
        (folder / "sub" / f"{i}.txt").write_text(f"small {i}")
    (folder / "sub" / "empty.jsonl").touch()
    return folder


def test_the_order_is_that_of_the_contents_and_not_of_places_or_listings(corpus: Path, tmp_path: Path) -> None:
    texts = list(documents(str(corpus)))
    assert texts == list(documents(str(corpus / "**" / "*"))) == list(documents(str(corpus)))
    moved = tmp_path / "elsewhere" / "of another name"
    moved.mkdir(parents=True)
    for path in sorted(corpus.rglob("*.*"), reverse=True):  # made in another order than the first
        target = moved / path.relative_to(corpus)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    assert list(documents(str(moved))) == texts
    assert [source.identity() for source in sources(str(moved))] == [s.identity() for s in sources(str(corpus))]


def test_any_first_part_is_a_sample_of_every_source_and_of_its_places(corpus: Path) -> None:
    """The share of a source that was read differs from that of another by a unit at most, and files come anywhere."""
    parts = list(units(str(corpus)))
    total = {kind: sum(u.size for u in parts if u.name.startswith(kind)) for kind in ("large", "many")}
    most = {kind: max(u.size for u in parts if u.name.startswith(kind)) / total[kind] for kind in total}
    read = dict.fromkeys(total, 0)
    for unit in parts:
        if (kind := unit.name.split(".")[0]) in total:
            read[kind] += unit.size
            shares = [read[kind] / total[kind] for kind in total]
            assert abs(shares[0] - shares[1]) <= sum(most.values()) + 1e-9
    groups = [int(unit.name.split()[-1]) for unit in parts if unit.name.startswith("many")]
    assert min(groups[:8]) < 10 and max(groups[:8]) >= 30, "the beginning of a file comes first"
    places = [i / len(parts) for i, unit in enumerate(parts) if unit.name[0].isdigit()]
    assert 12 < sum(place < 0.5 for place in places) < 28


def test_units_are_counted_without_reading_them(tmp_path: Path) -> None:
    """A sparse file of 3 GB: its digest reads some places, its units only their borders."""
    path = tmp_path / "large.jsonl"
    path.write_text('{"text": "first"}\n' * 1_000)
    os.truncate(path, 3 * 2**30)
    names = [unit.name for unit in units(str(path))]
    assert len(set(names)) == 3 * 2**10 and names[0] != "large.jsonl"
    identity = sources(str(path))[0].identity()
    assert identity["places"] == "1024"
    with open(path, "r+b") as file:
        file.seek(2**30)
        file.write(b"\n")
    os.truncate(path, 3 * 2**30 + 1)
    assert sources(str(path))[0].identity()["sha256"] != identity["sha256"]


def test_joined_rows_are_running_text(tmp_path: Path) -> None:
    """In the order of the rows, none lost, in documents of about 100,000 characters; units are joined by themselves."""
    sentences = [f"Sentence number {i} of the book ." for i in range(20_000)]
    (tmp_path / "lines.txt").write_text("\n".join(sentences) + "\n\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences))
    write_parquet(tmp_path / "rows.parquet", [*sentences, None, " "], 100_000)
    for name in ("lines.txt", "rows.jsonl", "rows.parquet"):
        texts = list(documents(f"{tmp_path / name}+join"))
        assert all(JOINED_CHARACTERS <= len(text) + 1 < JOINED_CHARACTERS + 50 for text in texts[:-1])
        assert "\n".join(texts).split("\n") == sentences
    small = write_parquet(tmp_path / "small.parquet", sentences[:1_000], 100)
    assert sorted(len(text.split("\n")) for text in documents(f"{small}+join")) == [100] * 10
    assert len(list(documents("quickstart+join"))) < 60
    plain, joined = (sources(f"{small}{end}")[0] for end in ("", "+join"))
    assert joined.identity() == plain.identity() | {"joined": "100000"} and joined.size == plain.size


def test_a_file_whose_name_ends_in_join_is_meant_as_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "a+join").mkdir()
    (tmp_path / "a+join" / "a.txt").write_text("one\n\ntwo")
    assert list(documents(str(tmp_path / "a+join"))) == ["one", "two"]
    assert list(documents(f"{tmp_path / 'a+join'}+join")) == ["one\ntwo"]
