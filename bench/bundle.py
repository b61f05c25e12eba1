"""All that fastkd needs on a machine without a network, in one archive of at most 60 MB.

    python -m bench.bundle --out bundle.tar.xz --teacher quickstart --corpus quickstart texts/ --glue GLUE

    teacher/      Hugging Face folder with its tokenizer, weights in bfloat16; plan.json says what it was made from
    shards/       tokenised text, which --corpus takes; where all does not fit, whole documents drawn by a seed
    glue/         the official files, if given
    bundle.json   size and sha256 of each of these files, where they come from, the versions that made them

``bench.unpacking`` makes a folder of it again.

Teacher and GLUE are never cut. The archive is a tar of two xz streams, the second with the shards and bundle.json, so that
only that one is compressed again when the text is cut. Contexts of the compression alternate with every second byte, as the values
do (bfloat16 weights, uint16 token ids): weights shrink to 67% and token ids to about half.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from bench.unpacking import FORMAT, INDEX, PARTS, most_bytes
from fastkd import files, manifest
from fastkd.data.shards import Shards, build_shards, cache, tokenizer_hash, write_sample
from fastkd.device import environment
from fastkd.files import file_sha256
from fastkd.glue.examples import FORMATS
from fastkd.models import hf
from fastkd.run_folder import ancestors
from fastkd.setup import load_model

MAX_MB = 60.0
FILL = 0.99  # of the largest size: an archive this full is not filled further
TRIES = 6
HEADERS = 20_480  # at least the bytes of a tar beside a file's own


def write(
    out: Path,
    *,
    teacher: str,
    corpus: Sequence[str],
    glue: Path | None = None,
    max_bytes: int = int(MAX_MB * 1e6),
    seed: int = 0,
) -> dict[str, Any]:
    """Write an archive, whole or not at all, and return its bundle.json.

    Args:
        out: the archive.
        teacher: ``quickstart``, a folder, a finished run, or a hub id.
        corpus: as --corpus of a run; documents are left out until the archive fits.
        glue: folder of official files (``SST-2/train.tsv``), which are taken as they are.
        max_bytes: of the archive.
        seed: of the choice of documents.

    Raises:
        ValueError: what cannot be read, does not fit even with next to no text, or would not be unpacked again.
    """
    with tempfile.TemporaryDirectory(prefix="fastkd-bundle-") as name:
        folder = Path(name)
        tokenizer, origin = _write_teacher(teacher, folder / "teacher")
        shards = build_shards(corpus, tokenizer, cache(), tokens=max_bytes)  # a token takes a byte at least
        sources: dict[str, Any] = {"teacher": origin, "corpus": [Path(part).name for part in corpus], "seed": seed}
        if glue is not None:
            sources["glue"] = _copy_glue(glue, folder / "glue")
        facts = {"format": FORMAT, "sources": sources, "versions": _versions()}
        fixed = _packed(folder, _files(folder))
        packed, index = _filled(folder, facts, shards, max_bytes - len(fixed), seed)
        if index is None:
            raise ValueError(
                f"teacher and GLUE take {len(fixed) / 1e6:.1f} MB and the least text {len(packed) / 1e6:.1f} MB, over --max-mb "
                f"{max_bytes / 1e6:g}: take a smaller teacher, fewer GLUE tasks, or a larger --max-mb"
            )
        _check_growth(len(fixed) + len(packed), index)
        files.write(out, fixed + packed)
    return index


def _check_growth(archive_bytes: int, index: dict[str, Any]) -> None:
    """Refuse what ``bench.unpacking`` would: text so repetitive that its archive looks like a trap."""
    unpacked = sum(entry["bytes"] + HEADERS for entry in index["files"].values()) + HEADERS
    if unpacked > most_bytes(archive_bytes):
        raise ValueError(
            f"{unpacked / 1e6:.0f} MB would be packed into {archive_bytes / 1e6:.1f}: the text repeats itself; take another"
        )


def _write_teacher(source: str, folder: Path) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """A model as fastkd reads it, in bfloat16, and where it comes from."""
    loaded = load_model(source)
    hf.export(loaded.encoder, loaded.tokenizer, folder, card=f"# {source}, in bfloat16\n", mlm_head=_has_head(loaded))
    weights = folder / "model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "plan.json").write_text(json.dumps({"ancestors": ancestors(source)}) + "\n")
    manifest.write(folder)  # again: these files are not those of the export
    packed = hf.load(folder).tokenizer
    assert tokenizer_hash(packed) == tokenizer_hash(loaded.tokenizer), "the tokenizer changed when it was saved"
    return packed, {"source": source, "sha256": loaded.sha256, "revision": loaded.revision}


def _has_head(loaded: hf.Loaded) -> bool:
    return loaded.encoder.head is not None


def _copy_glue(source: Path, folder: Path) -> list[str]:
    """Copy the files of all tasks; their names."""
    files = sorted(path for path in source.glob("*/*") if path.suffix in FORMATS and path.is_file())
    if not files:
        raise ValueError(f"{source} holds no TASK/*.tsv: give --glue the folder of the official files")
    for path in files:
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return [path.relative_to(source).as_posix() for path in files]


def _versions() -> dict[str, Any]:
    facts = environment.describe()
    return {name: facts[name] for name in ("python", "packages", "commit") if name in facts}


def _filled(
    folder: Path, facts: dict[str, Any], shards: Shards, room: int, seed: int
) -> tuple[bytes, dict[str, Any] | None]:
    """The second stream with as much text as fits, and bundle.json; without it where the least text does not fit.

    Its size grows with the text almost in proportion, so that a few chords find what fits.
    """

    def packed(tokens: int) -> tuple[int, bytes, dict[str, Any]]:
        sample = write_sample(shards, folder / "shards", tokens=tokens, seed=seed)
        index = facts | sample.sizes | {"of": shards.sizes}
        index["files"] = _digests(folder)
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        names = [*(name for name in _files(folder) if name.startswith("shards/")), INDEX]
        return sample.unique_tokens, _packed(folder, names, last=True), index

    best = packed(0)
    if len(best[1]) > room:
        return best[1], None
    over = packed(shards.unique_tokens)
    if len(over[1]) <= room:
        return over[1], over[2]
    for _ in range(TRIES):
        share = (room - len(best[1])) / (len(over[1]) - len(best[1]))
        tried = packed(best[0] + int((over[0] - best[0]) * share * (1 + FILL) / 2))
        best, over = (tried, over) if len(tried[1]) <= room else (best, tried)
        if len(best[1]) >= FILL * room:
            break
    return best[1], best[2]


def _files(folder: Path) -> list[str]:
    """The names of the parts' files, in order."""
    return sorted(
        path.relative_to(folder).as_posix() for part in PARTS for path in (folder / part).rglob("*") if path.is_file()
    )


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in _files(folder)
    }


def _packed(folder: Path, names: Iterable[str], *, last: bool = False) -> bytes:
    """Files as a part of the tar, compressed: the same bytes for the same files."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 3, "lp": 1, "pb": 1}]
    buffer = io.BytesIO()
    with lzma.open(buffer, "wb", filters=filters) as stream:
        tar = tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  its end is written once
        for name in names:
            member = tarfile.TarInfo(name)
            member.size, member.mode = (folder / name).stat().st_size, 0o644
            with (folder / name).open("rb") as file:
                tar.addfile(member, file)
        if last:
            tar.close()
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    """Pack what the options name and say what is in it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.bundle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the archive, such as bundle.tar.xz")
    parser.add_argument("--teacher", default="quickstart", help="quickstart, a folder, a finished run or a hub id")
    parser.add_argument("--corpus", nargs="+", default=["quickstart"], help="as of a run")
    parser.add_argument("--glue", type=Path, help="folder of the official files")
    parser.add_argument("--max-mb", type=float, default=MAX_MB, help="of the archive, in megabytes of 10⁶ bytes")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of documents")
    options = parser.parse_args(argv)
    try:
        index = write(
            options.out, teacher=options.teacher, corpus=options.corpus, glue=options.glue,
            max_bytes=int(options.max_mb * 1e6), seed=options.seed,
        )  # fmt: skip
    except ValueError as error:
        parser.error(str(error))
    for part in PARTS:
        sizes = [entry["bytes"] for name, entry in index["files"].items() if name.startswith(f"{part}/")]
        print(f"{part + '/':9} {len(sizes):3} files {sum(sizes) / 1e6:7.1f} MB unpacked")
    tokens, documents = (
        f"{index[name]['train']:,} of {index['of'][name]['train']:,}" for name in ("tokens", "documents")
    )
    print(f"text      {tokens} tokens, {documents} documents, and what is held out")
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
