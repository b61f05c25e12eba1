"""The archive for a machine without a network: it loads back exactly, is never too large, and nothing else is unpacked."""

import io
import json
import lzma
import shutil
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench import bundle, unpacking
from fastkd import plan, run
from fastkd.data.shards import Shards, build_shards, tokenizer_hash
from fastkd.models import hf
from fastkd.run_folder import ancestors


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("glue")
    for task in ("SST-2", "RTE"):
        (folder / task).mkdir()
        (folder / task / "train.tsv").write_bytes(f"sentence\tlabel\r\n{task} – ok \t1\n".encode())
    (folder / "SST-2" / "notes.txt").write_text("not packed")
    return folder


@pytest.fixture(scope="module")
def archive(made_teacher: Path, made_corpus: Path, glue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("archive") / "bundle.tar.xz"
    bundle.main(["--out", str(out), "--teacher", str(made_teacher), "--corpus", str(made_corpus), "--glue", str(glue)])
    return out


@pytest.fixture(scope="module")
def unpacked(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> unpacking.Bundle:
    return unpacking.unpack(archive, tmp_path_factory.mktemp("unpacked") / "bundle")


def built(made_teacher: Path, made_corpus: Path, folder: Path) -> Shards:
    return build_shards(str(made_corpus), hf.load(made_teacher).tokenizer, folder)


def documents(shards: Shards, split: str = "train") -> list[tuple[int, ...]]:
    tokens, offsets = shards.documents(split)
    return [tuple(tokens[a:b].tolist()) for a, b in pairwise(offsets)]


def test_the_teacher_comes_back_bit_for_bit_in_bfloat16(unpacked: unpacking.Bundle, made_teacher: Path) -> None:
    source, found = hf.load(made_teacher), hf.load(unpacked.teacher)
    stored = load_file(unpacked.teacher / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    expected, weights = source.encoder.state_dict(), found.encoder.state_dict()
    assert list(weights) == list(expected) and found.config == source.config
    assert all(torch.equal(weights[name], expected[name].bfloat16().float()) for name in expected)
    assert tokenizer_hash(found.tokenizer) == tokenizer_hash(source.tokenizer)


def test_the_text_is_the_builds(
    unpacked: unpacking.Bundle, made_teacher: Path, made_corpus: Path, tmp_path: Path
) -> None:
    shards, whole = Shards(unpacked.shards), built(made_teacher, made_corpus, tmp_path)
    assert shards.version == whole.version == whole.folder.name
    assert all(documents(shards, split) == documents(whole, split) for split in ("train", "validation"))


def test_glue_files_are_the_same_bytes(unpacked: unpacking.Bundle, glue: Path) -> None:
    assert unpacked.glue is not None
    found = {path.relative_to(unpacked.glue): path.read_bytes() for path in unpacked.glue.rglob("*") if path.is_file()}
    assert found == {path.relative_to(glue): path.read_bytes() for path in glue.rglob("*.tsv")}


def test_the_same_parts_give_the_same_archive(
    archive: Path, made_teacher: Path, made_corpus: Path, glue: Path, tmp_path: Path
) -> None:
    bundle.write(tmp_path / "again", teacher=str(made_teacher), corpus=[str(made_corpus)], glue=glue)
    assert (tmp_path / "again").read_bytes() == archive.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_text_is_cut_until_the_archive_fits(
    archive: Path, made_teacher: Path, made_corpus: Path, tmp_path: Path
) -> None:
    """The teacher is never cut; documents stay whole and in order, and are not the first ones."""
    limit = archive.stat().st_size - 20_000
    bundle.write(tmp_path / "cut", teacher=str(made_teacher), corpus=[str(made_corpus)], max_bytes=limit)
    assert 0.99 * limit < (tmp_path / "cut").stat().st_size <= limit
    cut = unpacking.unpack(tmp_path / "cut", tmp_path / "bundle")
    assert cut.glue is None
    whole, kept = documents(built(made_teacher, made_corpus, tmp_path / "cache")), documents(Shards(cut.shards))
    places = [whole.index(document) for document in kept]
    assert 10 < len(kept) < len(whole) and places == sorted(places) and places != list(range(len(kept)))
    assert Shards(cut.shards).version != built(made_teacher, made_corpus, tmp_path / "cache").version
    assert Shards(cut.shards).unique_tokens == sum(map(len, kept))
    assert documents(Shards(cut.shards), "validation")
    about = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert about["documents"]["train"] == len(kept) and about["of"]["documents"]["train"] == len(whole)


def test_what_cannot_fit_is_refused_with_its_sizes(
    made_teacher: Path, made_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--out", str(tmp_path / "out"), "--teacher", str(made_teacher), "--corpus", str(made_corpus)]
    with pytest.raises(SystemExit):
        bundle.main([*argv, "--max-mb", "0.5"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert "teacher and GLUE take" in last and "over --max-mb 0.5: take a smaller teacher" in last
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [run.main, plan.main])
def test_a_bundle_is_all_that_a_command_needs(
    command, unpacked: unpacking.Bundle, made_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is tokenised: the cache stays empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = ["--preset", "quickstart", "--teacher", str(unpacked.teacher), "--corpus", str(unpacked.shards)]
    options += ["--student", "2L-96H-12A", "--batch-tokens", "1024", "--seq-length", "32", "--dtype", "float32"]
    options += ["--budget-tokens", "4096"] + (["--output-dir", str(tmp_path / "run")] if command is run.main else [])
    assert command(options) == 0
    assert not (tmp_path / "cache").exists()


def test_what_a_teacher_was_made_from_is_told(made_teacher: Path, made_corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(made_teacher, tmp_path / "student")
    (tmp_path / "student" / "plan.json").write_text('{"ancestors": ["quickstart"]}')
    bundle.write(tmp_path / "bundle.tar.xz", teacher=str(tmp_path / "student"), corpus=[str(made_corpus)])
    found = unpacking.unpack(tmp_path / "bundle.tar.xz", tmp_path / "bundle")
    assert ancestors(str(found.teacher)) == [str(found.teacher), str(tmp_path / "student"), "quickstart"]


@pytest.mark.parametrize("damage", ["flip", "remove", "index"])
def test_damage_after_unpacking_is_found(damage: str, archive: Path, tmp_path: Path) -> None:
    unpacking.unpack(archive, tmp_path / "bundle")
    path = tmp_path / "bundle" / ("bundle.json" if damage == "index" else "glue/SST-2/train.tsv")
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(b"{" if damage == "index" else path.read_bytes().replace(b"ok", b"no"))
    with pytest.raises(
        ValueError, match=r"(train\.tsv is missing or is not what was packed|bundle\.json): unpack .*again"
    ):
        unpacking.opened(tmp_path / "bundle")


def test_a_broken_archive_leaves_nothing(archive: Path, tmp_path: Path) -> None:
    content = archive.read_bytes()
    for name, broken in {"short": content[: len(content) // 2], "text": b"no archive", "empty": b""}.items():
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(ValueError, match=r"copy it again|unpack the archive again") as error:
            unpacking.unpack(tmp_path / name, tmp_path / "bundle")
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "short", "text"]


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 4 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    "bad",
    [
        member("/teacher/a"), member("../a"), member("teacher/../../a"), member("a"), member("teacher"),
        member("teacher/a", tarfile.SYMTYPE, "/etc/passwd"), member("teacher/a", tarfile.SYMTYPE, "b"),
        member("teacher/a", tarfile.LNKTYPE, "bundle.json"), member("teacher/a", tarfile.FIFOTYPE),
        member("teacher/a", tarfile.DIRTYPE), member("teacher\\..\\..\\a"),
    ],
    ids=lambda info: f"{info.name} {info.type.decode()}",
)  # fmt: skip
def test_nothing_but_files_of_a_bundle_is_unpacked(bad: tarfile.TarInfo, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with lzma.open(tmp_path / "in" / "bad", "wb") as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(member("bundle.json"), io.BytesIO(b"{}  "))
        tar.addfile(bad, io.BytesIO(b"text"))
    with pytest.raises(ValueError, match="is no file of a bundle: do not use it"):
        unpacking.unpack(tmp_path / "in" / "bad", tmp_path / "out" / "bundle")
    assert not list((tmp_path / "out").iterdir())


def zeros(tar: tarfile.TarFile, name: str, **pax: str) -> None:
    """A file or a header of more than a small archive may unpack to, in one of some kilobytes."""
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = (0, pax) if pax else (2 * unpacking.LEAST_BYTES, {})
    tar.addfile(info, Zeros())


class Zeros(io.RawIOBase):
    """A file without end."""

    def read(self, size: int = -1) -> bytes:
        return bytes(size)


def sparse(tar: tarfile.TarFile, size: int) -> None:
    """One that is a terabyte large and has no bytes."""
    info = tarfile.TarInfo("teacher/a")
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.map": f"{size},0", "GNU.sparse.size": str(size)}
    tar.addfile(info, io.BytesIO())


@pytest.mark.parametrize(
    ("fill", "reason"),
    [
        (lambda tar: zeros(tar, "teacher/a"), "is larger unpacked than an archive of its size may be: do not use it"),
        (lambda tar: zeros(tar, "teacher/a", comment="a" * (unpacking.LEAST_BYTES + 1)), "is larger unpacked than"),
        (lambda tar: sparse(tar, 1 << 40), "holds 'teacher/a', which is no file of a bundle"),
    ],
    ids=["content", "header", "sparse"],
)
def test_a_small_archive_cannot_fill_the_disk(fill, reason: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with (
        lzma.open(tmp_path / "in" / "bad", "wb", preset=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        fill(tar)
    assert (tmp_path / "in" / "bad").stat().st_size < 300_000
    with pytest.raises(ValueError, match=reason):
        unpacking.unpack(tmp_path / "in" / "bad", tmp_path / "out" / "bundle")
    assert not list((tmp_path / "out").iterdir())


def test_an_archive_without_a_teacher_or_text_is_refused(tmp_path: Path) -> None:
    index = b'{"format": 1, "files": {}}'
    with lzma.open(tmp_path / "empty", "wb") as stream, tarfile.open(fileobj=stream, mode="w") as tar:
        info = tarfile.TarInfo("bundle.json")
        info.size = len(index)
        tar.addfile(info, io.BytesIO(index))
    with pytest.raises(ValueError, match=r"teacher/config\.json is missing"):
        unpacking.unpack(tmp_path / "empty", tmp_path / "bundle")


def test_what_would_not_be_unpacked_again_is_not_packed(
    made_teacher: Path, made_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "LEAST_BYTES", 0)
    monkeypatch.setattr(unpacking, "LARGEST_FACTOR", 1)
    with pytest.raises(ValueError, match="MB would be packed into"):
        bundle.write(tmp_path / "out", teacher=str(made_teacher), corpus=[str(made_corpus)])
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is in use: unpack into a folder that is not there yet"):
        unpacking.unpack(archive, tmp_path)
    assert (tmp_path / "file").read_text() == "mine"
