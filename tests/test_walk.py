"""One walk for names, patterns and folders: what is linked is read once, what is hidden is left out, nothing hangs."""

import bz2
import gzip
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fastkd.data.corpus import check, documents

TEXT = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.\n\nNoch ein Absatz: naïve façade.\n"
TEXTS = TEXT.strip().split("\n\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A corpus of four files, two behind links, with what programs leave beside it."""
    outside, folder = tmp_path / "outside", tmp_path / "exp [a1]"
    for path in (outside / "deep", folder / "sub"):
        path.mkdir(parents=True)
    for path, text in {
        folder / "a.txt": "a", folder / "sub" / "b.txt": "b", outside / "c.txt": "c", outside / "deep" / "d.txt": "d",
    }.items():  # fmt: skip
        path.write_text(text)
    (folder / "linked").symlink_to(outside)
    (folder / "sub" / "again.txt").symlink_to(folder / "a.txt")
    (folder / "sub" / "circle").symlink_to(folder)
    (outside / "circle").symlink_to(outside)
    for hidden in (
        ".ipynb_checkpoints/a-checkpoint.txt", "__MACOSX/._a.txt", "__MACOSX/a.txt", "sub/._b.txt", ".git/x/y.txt", ".DS_Store",
    ):  # fmt: skip
        (folder / hidden).parent.mkdir(parents=True, exist_ok=True)
        (folder / hidden).write_bytes(b"\0\5\26\7\xff\0\2\0")
    (folder / "notes.md").write_text("no corpus")
    return folder


def test_a_folder_and_every_pattern_of_it_read_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for spec in (str(folder), "exp [a1]", f"{folder}/**/*.txt", "exp [a1]/**/*.txt", "exp*/**/?.txt", f"{folder}/"):
        assert sorted(documents(spec)) == ["a", "b", "c", "d"], spec
    for spec, expected in {
        "exp [a1]/*.txt": ["a"],
        "exp [a1]/[as]*": ["a", "b", "c", "d"],  # sub matches, and what is in it is read
        "exp [a1]/[_as]*": ["a", "b", "c", "d"],  # __MACOSX matches too, but nobody means it
        "exp [a1]/*/*.txt": ["a", "b", "c"],
        "exp [a1]/**/deep/*.txt": ["d"],
        "exp [a1]/**/deep": ["d"],
        "exp [a1]/sub/**/b.txt": ["b"],
        "*/linked/**/[!d].txt": ["c"],
        "exp [a1]/.ipynb_checkpoints/../a.txt": ["a"],
    }.items():
        assert sorted(documents(spec)) == expected, spec
    for spec in ("exp [a1]/*", "exp [a1]/**"):
        with pytest.raises(ValueError, match=r"'.*notes\.md' is of an unknown kind"):
            check(spec)
    with pytest.raises(ValueError, match=r"matches no file"):
        check("exp [a1]/**/*.jsonl")


def test_what_is_left_out_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "a.txt").write_text("a longer text than the notes")
    check(str(folder))
    assert "left out what is hidden, " in caplog.text and ".ipynb_checkpoints" in caplog.text
    assert "kinds" not in caplog.text
    (folder / "large.jsonl.zst").write_bytes(bytes(999))
    check(str(folder))
    assert "most of its bytes, 2 of its files, are of kinds that fastkd does not read, .md, .zst" in caplog.text
    shutil.rmtree(folder / "sub")
    shutil.rmtree(folder.parent / "outside")
    (folder / "linked").unlink()
    (folder / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"matches no file \(3 hidden left out\)"):
        check(str(folder))


def test_names_that_look_like_patterns_or_folders(tmp_path: Path) -> None:
    (tmp_path / "data[1]*.txt").write_text("literal")
    (tmp_path / "data1.txt").write_text("other")
    (tmp_path / "part.txt").mkdir()
    (tmp_path / "part.txt" / "0.jsonl").write_text('{"text": "in a folder"}')
    (tmp_path / "empty.jsonl").touch()
    assert list(documents(str(tmp_path / "data[1]*.txt"))) == ["literal"]
    assert sorted(documents(str(tmp_path))) == ["in a folder", "literal", "other"]
    assert sorted(documents(str(tmp_path / "*.txt"))) == ["in a folder", "literal", "other"]
    with pytest.raises(ValueError, match=r"'~nobody-here/a\.txt' does not exist"):
        check("~nobody-here/a.txt")
    with pytest.raises(ValueError, match=r"does not exist"):
        check("x" * 5_000 + ".txt")


@pytest.mark.skipif(sys.platform == "win32", reason="makes pipes and links")
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=r"'.*pipe\.txt' is a pipe or a device: write its text to a file"):
        check(str(tmp_path))
    (tmp_path / "pipe.txt").unlink()
    (tmp_path / "broken.txt").symlink_to("gone/away.txt")
    for spec in (tmp_path, tmp_path / "broken.txt", tmp_path / "*.txt"):
        with pytest.raises(ValueError, match=r"'.*broken\.txt' is a link to 'gone/away\.txt', which is not there"):
            check(str(spec))


ENCODINGS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "latin1", "cp1252"]


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_of_another_encoding_is_named_with_the_command_that_mends_it(
    tmp_path: Path, encoding: str, suffix: str
) -> None:
    quote = "“" if encoding != "latin1" else '"'
    texts = [text.replace("Absatz", f"{quote}Absatz") for text in TEXTS]
    plain = "\n\n".join(texts)
    if suffix.startswith(".jsonl"):
        plain = "".join('{"text": "%s"}\n' % text.replace('"', '\\"') for text in texts)  # noqa: UP031
    pack: Callable[[bytes], bytes] = gzip.compress if suffix.endswith(".gz") else bytes
    path = tmp_path / f"a b{suffix}"
    path.write_bytes(pack(plain.encode(encoding)))
    name = "is UTF-16 text" if "16" in encoding else "is UTF-32 text" if "32" in encoding else "not UTF-8"
    with pytest.raises(ValueError, match=name) as error:
        check(str(path))
    subprocess.run(["bash", "-ec", str(error.value).split("`")[1]], check=True)
    assert list(documents(str(path))) == texts
    assert list(tmp_path.iterdir()) == [path]


def test_other_contents_under_a_name_of_text_are_named(tmp_path: Path) -> None:
    data = TEXT.encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "table")
    for content, words in {
        gzip.compress(data): r"is compressed by gzip: name it 'a\.txt\.gz'",
        bz2.compress(data): r"is compressed by bzip2: unpack it with `mv .* && bunzip2 .*a\.txt\.bz2`",
        lzma.compress(data): r"is compressed by xz: unpack it with `mv .* && unxz .*a\.txt\.xz`",
        b"\x28\xb5\x2f\xfd": r"is compressed by zstd",
        b"PK\3\4": r"is a zip archive",
        b"%PDF-1.7": r"is a PDF: extract its text",
        (tmp_path / "table").read_bytes(): r"is a parquet file: name it 'a\.parquet'",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0": r"is a pointer of Git LFS: fetch it with `git lfs",
        b"GIF89a" + bytes(range(32)) * 2: r"is not text, its first bytes are full of control characters",
        b"a text whose download broke off\n" * 200 + bytes(4096): r"a\.txt:201: holds zero bytes",
        "Съешь ещё этих мягких булок".encode("utf-16-le"): r"is UTF-16 text: convert it with `iconv -f UTF-16LE",
    }.items():
        for name in ("a.txt", "a.jsonl"):
            if name == "a.jsonl" and b"broke off" in content:
                continue  # its first line is no object
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=words.replace(r"a\.txt", name.replace(".", r"\."))):
                check(str(tmp_path / name))
    (tmp_path / "a.txt").write_text("a\nb\nc\nd\ne\nf\n" * 20)
    assert len(list(documents(str(tmp_path / "a.txt")))) == 1
    (tmp_path / "a.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(ValueError, match=r"a\.parquet' is a pointer of Git LFS"):
        check(str(tmp_path / "a.parquet"))
    (tmp_path / "a.parquet").write_bytes(bytes(range(32)) * 9)
    with pytest.raises(ValueError, match=r"a\.parquet' is not a readable parquet file: .*: copy it again"):
        check(str(tmp_path / "a.parquet"))


def strings(values: list[bytes], kind: pyarrow.DataType) -> pyarrow.Array:
    """Text whose bytes nobody has looked at, as some writers make it."""
    return pyarrow.array(values, pyarrow.binary() if kind == pyarrow.string() else pyarrow.large_binary()).view(kind)


def test_invalid_text_in_a_parquet_file_is_named_by_column_and_row(tmp_path: Path) -> None:
    values = [b"row %d" % i for i in range(3_000)]
    values[2_345] = b"caf\xe9"
    for column in (strings(values, pyarrow.string()), strings(values, pyarrow.large_string()), pyarrow.array(values)):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", row_group_size=100)
        words = r"a\.parquet: column 'text', row 2345 \(from 0\): not UTF-8 \(byte 0xe9\)"
        with pytest.raises(ValueError, match=words):
            list(documents(str(tmp_path / "a.parquet")))


def test_every_type_that_holds_text_in_a_parquet_file_is_read(tmp_path: Path) -> None:
    values = ["one", None, " ", "zwei", "one"]
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.string_view()):
        column = pyarrow.array(values, kind)
        columns = [column, column.dictionary_encode()] if kind != pyarrow.string_view() else [column]
        for part in columns:
            pyarrow.parquet.write_table(pyarrow.table({"a.b": part, "text": part}), tmp_path / "a.parquet")
            for field in ("text", "a.b"):
                assert list(documents(str(tmp_path / "a.parquet"), text_field=field)) == ["one", "zwei", "one"]
    for values in ([["a", "b"]], [{"x": 1}], [7]):
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=r"a\.parquet: field 'text' holds .*, not a string: name another"):
            check(str(tmp_path / "a.parquet"))


def test_a_damaged_row_group_is_named(tmp_path: Path) -> None:
    texts = [f"row {i} of many" for i in range(5_000)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=1_000, use_dictionary=False
    )
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(
        ValueError, match=r"a\.parquet' is not a readable parquet file \(row group 2\): .*: copy it again$"
    ):
        list(documents(str(tmp_path / "a.parquet")))
