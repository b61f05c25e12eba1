"""Many files damaged one after another, in a process that has done its imports: `damage SPEC` answers each with a line of JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mutations
import run_case
from run_case import Try

REMOVAL = re.compile(r"(?:remove|delete) '?(/[^\s',:;]+)")
UNDONE = ("--output-dir", "bring back", "copy it again", "download", "export")  # what a person can do, from the line


def main(argv: Sequence[str]) -> int:
    """Do all that the spec names, and write the answers beside it: what failed, or null."""
    path = Path(argv[0])
    spec = json.loads(path.read_text())
    do: Callable[[dict[str, Any], int], str | None] = {
        "run": damaged_run,
        "model": damaged_model,
        "shards": damaged_shards,
    }[spec["what"]]
    with path.with_suffix(".out").open("w") as out:
        for seed in spec["seeds"]:
            label, error = "", None
            try:
                label = damage(spec, seed)
                error = do(spec, seed)
            except Exception as caught:
                error = f"{type(caught).__name__}: {caught}"
            print(json.dumps({"label": f"{seed}, {label}", "error": error}), file=out, flush=True)
    return 0


def damage(spec: dict[str, Any], seed: int) -> str:
    """Copy the folders and damage one file; says what was done."""
    work = Path(spec["work"])
    shutil.rmtree(work, ignore_errors=True)
    for name in spec["folders"]:
        shutil.copytree(Path(spec["from"]) / name, work / name)
    files = sorted(path for pattern in spec["files"] for path in work.glob(pattern) if path.is_file())
    assert files, f"nothing matches {spec['files']}"
    victim = files[(seed // len(mutations.KINDS)) % len(files)]
    near = [path for path in victim.parent.iterdir() if path.is_file() and path != victim and path.stat().st_size]
    return mutations.mutate(victim, sorted(near), seed)


def command(spec: dict[str, Any], place: Try) -> subprocess.CompletedProcess[str]:
    """The run's command in this process."""
    from fastkd import run

    out, err = io.StringIO(), io.StringIO()
    os.environ["XDG_CACHE_HOME"] = str(place.cache)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run.main([*spec["options"], "--output-dir", str(place.folder)])
        except Exception as error:  # a user would see a traceback
            code = 1
            print(f"Traceback: {type(error).__name__}: {error}", file=err)
    return subprocess.CompletedProcess([], code, out.getvalue(), err.getvalue())


def damaged_run(spec: dict[str, Any], seed: int) -> str | None:
    """Healed to the same bits, and said where the books differ; or refused in one line with a remedy that works."""
    work = Path(spec["work"])
    place = Try(work / "run", work / "cache", work / "counter")
    done = command(spec, place)
    if done.returncode != 0:
        run_case.check_refusal(done, 1, 2, 75)
        line = run_case.last_line(done)
        removals = [Path(found) for found in REMOVAL.findall(line)]
        if not removals:
            assert any(word in line for word in UNDONE), f"no remedy: {line}"
            return None
        for path in removals:
            assert path.is_relative_to(work), f"to be removed: {path}"
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        done = command(spec, place)
        assert done.returncode == 0, f"{line} | then: {run_case.last_line(done)}"
    whole = Path(spec["whole"])
    student, wanted = (folder / "final" / "model.safetensors" for folder in (place.folder, whole))
    if student.read_bytes() != wanted.read_bytes():
        return "another student, in silence"
    if not (place.folder / "report.html").is_file():
        return "no report"
    before = Path(spec["from"]) / "run"
    run_case.check_books(place.folder)
    if (wrong := another_ledger(place.folder, before, exactly="run/ledger.jsonl" in spec["files"])) is not None:
        return f"{wrong} of the ledger is another"
    left = run_case.debris(place.folder)
    return f"debris {left}" if left else None


def another_ledger(folder: Path, before: Path, *, exactly: bool) -> str | None:
    """The first step that was written before the damage and is another now: in what repeats, or in all that a checkpoint knows."""
    found, known = (run_case.surviving(run_case.lines_of(each / "ledger.jsonl")) for each in (folder, before))
    saved = max(int(path.name[5:]) for path in (before / "checkpoints").glob("step-*"))
    for mine, theirs in zip(found, known, strict=False):
        kept = theirs.keys() - {"sum"} if exactly and theirs["step"] <= saved else ("tokens", "flops", "progress")
        if any(mine[name] != theirs[name] for name in kept):
            return f"step {theirs['step']}"
    return None


def damaged_model(spec: dict[str, Any], seed: int) -> str | None:
    """A finished run as a teacher: refused in one line, or the same weights and the same tokenizer."""
    import torch

    from fastkd.models import hf

    try:
        found = hf.load(Path(spec["work"]) / "run")
    except ValueError as error:
        return (
            None if len(str(error).splitlines()) == 1 and len(str(error)) < 600 else f"not one line: {str(error)[:80]}"
        )
    wanted = hf.load(spec["whole"])
    same = all(
        torch.equal(a, b)
        for a, b in zip(found.encoder.state_dict().values(), wanted.encoder.state_dict().values(), strict=True)
    )
    spoken = [loaded.tokenizer.backend_tokenizer.to_str() for loaded in (found, wanted)]  # type: ignore[attr-defined]
    if not same or found.config != wanted.config or spoken[0] != spoken[1]:
        return "another teacher, in silence"
    return None


def damaged_shards(spec: dict[str, Any], seed: int) -> str | None:
    """A part of a tokenised corpus: refused in one line, or the same texts."""
    import numpy as np

    from fastkd.data.part import Part

    def contents(where: str) -> list[Any]:
        (corpus,) = (path.parent for path in Path(where).glob("cache/fastkd/*/part-00000"))
        part = Part(corpus, 0)
        known = [part.tokens, part.share, part.next, part.recipe, part.index["vocab_size"], part.index["piece"]]
        return [*part.documents("train"), *part.documents("validation"), part.held_out.hashes, *known]

    try:
        found = contents(spec["work"])
    except ValueError as error:
        return None if len(str(error).splitlines()) == 1 else f"not one line: {str(error)[:80]}"
    for mine, theirs in zip(found, contents(spec["from"]), strict=True):
        same = (
            np.array_equal(mine, theirs) and mine.dtype == theirs.dtype
            if isinstance(mine, np.ndarray)
            else mine == theirs
        )
        if not same:
            return "another corpus, in silence"
    return None
