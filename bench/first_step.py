"""Seconds from the command to the first step on a corpus that streams, and how fast text is tokenised.

    python -m bench.first_step --megabytes-per-second 20 --copies 1000

A dataset of many parquet files is served on 127.0.0.1 at a limited rate: Wikipedia's lead sections, repeated so that
all of it could never be read in the time. ``fastkd.run`` reads it under its real name. The time of the processors is
printed too, which another program's load does not change.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fastkd import quickstart
from fastkd.data.corpus import documents
from fastkd.data.tokenise import encode, load

NAME, CONFIG = "wikimedia/wikipedia", "20231101.en"
ROWS = 1_000  # of a row group
GROUPS = 10  # of a file
CARD = f"""---
configs:
- config_name: {CONFIG}
  data_files:
  - split: train
    path: {CONFIG}/*
---
"""
SERVER = Path(__file__).parents[1] / "tests" / "hub.py"


def tokenising(characters: int = 4_000_000) -> dict[str, float]:
    """Tokens a second of one core, by its own clock."""
    texts, size = [], 0
    for text in documents("quickstart"):
        texts.append(text)
        size += len(text)
        if size >= characters:
            break
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load(
        AutoTokenizer.from_pretrained(quickstart.folder(), trust_remote_code=False).backend_tokenizer.to_str()
    )
    encode(tokenizer, texts[:100])
    began = time.process_time()
    tokens = len(encode(tokenizer, texts).ids)
    seconds = time.process_time() - began
    return {"tokens": tokens, "characters": size, "cpu_s": seconds, "tokens_per_s_core": tokens / seconds}


def write_dataset(folder: Path) -> int:
    """One file of the dataset as the hub's server reads it; returns its bytes."""
    import pyarrow
    import pyarrow.parquet

    texts = list(documents("quickstart"))
    rows = [texts[i % len(texts)] + f" {i}" for i in range(ROWS * GROUPS)]  # no two rows are equal
    path = folder / "datasets" / NAME / "main" / CONFIG / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    table = pyarrow.table({"id": [str(i) for i in range(len(rows))], "text": rows})
    pyarrow.parquet.write_table(table, path, row_group_size=ROWS)
    (path.parents[1] / "README.md").write_text(CARD)
    return path.stat().st_size


def first_step(megabytes_per_second: float, copies: int, options: Sequence[str]) -> dict[str, Any]:
    """Run until the ledger holds a step, then stop."""
    with tempfile.TemporaryDirectory(prefix="fastkd-first-step-") as name:
        folder = Path(name)
        size = write_dataset(folder / "hub") * copies
        serve = [sys.executable, str(SERVER), "--serve", str(folder / "hub"), "--copies", str(copies)]
        server = subprocess.Popen(
            [*serve, "--megabytes-per-second", str(megabytes_per_second)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip().partition("=")[2]
            own = {"HF_ENDPOINT": address, "HF_HOME": str(folder / "home"), "XDG_CACHE_HOME": str(folder / "cache")}
            found = _run(folder / "run", own | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}, options)
        finally:
            server.kill()
            server.communicate()
    return {"corpus_bytes": size, "megabytes_per_second": megabytes_per_second} | found


def _run(folder: Path, environment: dict[str, str], options: Sequence[str]) -> dict[str, Any]:
    command = [
        *(sys.executable, "-m", "fastkd.run", "--preset", "quickstart", "--corpus", f"{NAME}:{CONFIG}"),
        *("--budget-gpu-hours", "1", "--output-dir", str(folder), *options),
    ]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        print(f"{time.monotonic() - began:6.1f} s  {line}", end="", flush=True)
        if line.startswith("step 1 "):
            break
    seconds = time.monotonic() - began
    process.terminate()
    process.communicate()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert lines and lines[-1].startswith("step 1 "), "the run ended before its first step"
    plan = json.loads((folder / "plan.json").read_text())
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return {"first_step_s": seconds, "cpu_s": cpu, "corpus": plan["corpus"], "step_seconds": plan["step_seconds"]}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both and print them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.first_step", description=__doc__)
    parser.add_argument("--megabytes-per-second", type=float, default=20.0)
    parser.add_argument("--copies", type=int, default=1_000, help="of a file of 10,000 rows")
    given, options = parser.parse_known_args(argv)  # what it does not know is the run's
    found = {
        "tokenising": tokenising(),
        "first_step": first_step(given.megabytes_per_second, given.copies, options),
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
