"""Training tokens/s and peak memory of every method beside its peers, at equal models, batch, length and dtype.

    python -m bench.throughput                      quickstart size on a CPU; with --device cuda the paper's sizes too
    python -m bench.throughput --sizes paper-6l --methods mlm,logit_kd,minilmv2 --dtypes bfloat16
    python -m bench.throughput --tokenizer BUNDLE/teacher --corpus BUNDLE/shards            without packages and network

For each size, dtype and method the variants take turns, round after round, each in a fresh process, so that a machine
that slows down slows all of them and a peak of memory is one variant's own. Beside ``fastkd``:

    paper             eager attention, all attentions and hidden states, both heads everywhere, padded batches
    trainer           transformers' Trainer, for mlm (attention sdpa), and trainer-compile with torch.compile
    bertdistiller     the package's MiniLMTrainer, for minilmv2, if it is installed
    scratch           fastkd's mlm: what a distilling method costs over it is the teacher tax

Tokens are text: padding is not counted, and ``text`` says which share of a batch's positions it is, so that up to its
inverse of a ratio is what packing gains. On a CPU fastkd splits a batch into micro-batches of 2,048 tokens, which saves
memory; peers take it whole. Weights are random, which changes no time. Written to ``results/<device>/throughput.json``
and ``.md``; what other commands measured for other sizes, dtypes and methods stays there.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BertConfig

from bench.results import RESULTS, device_folder, in_words, measured_on
from bench.variants import Spec
from fastkd import files, methods, quickstart
from fastkd.device import environment
from fastkd.device.peaks import peak_flops
from fastkd.models import hf
from fastkd.models.encoder import Encoder
from fastkd.models.student import student_config
from fastkd.setup import model_folder


@dataclass(frozen=True)
class Size:
    """A pair of models and the length of their sequences."""

    teacher: str
    student: str
    seq_length: int = 128


SIZES = {
    "tiny": Size("2L-48H-4A", "1L-48H-4A", seq_length=16),
    "quickstart": Size("6L-384H-12A", "3L-384H-12A"),
    "paper-6l": Size("12L-768H-12A", "6L-768H-12A"),
    "paper-12l": Size("24L-1024H-16A", "12L-1024H-16A"),
}
SEQUENCES = {"cpu": 32, "cuda": 256}  # of a batch: what peers still hold on an 80 GB GPU


def variants_of(method: str) -> list[tuple[str, str]]:
    """(row, variant) of a method: what is measured beside fastkd."""
    rows = ["fastkd", "paper"]
    rows += ["trainer", "trainer-compile"] if method == "mlm" else ["scratch"]
    rows += ["bertdistiller"] if method == "minilmv2" else []
    return [(row, "fastkd" if row == "scratch" else row) for row in rows]


def measure(spec: Spec, rounds: int) -> dict[str, Any]:
    """One method: every row's rounds, or why it was left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    skipped: dict[str, str] = {}
    for number in range(rounds):
        for row, variant in variants_of(spec.method):
            if row in skipped:
                continue
            method = "mlm" if row == "scratch" else spec.method
            result = run(dataclasses.replace(spec, variant=variant, method=method))
            if isinstance(result, str):
                skipped[row] = result
                found.pop(row, None)
                continue
            found.setdefault(row, []).append(result)
            print(f"  round {number + 1} {spec.method:9} {row:16} {result['tokens_per_s']:12,.0f} tokens/s", flush=True)
    return {"rows": {row: summary(results) for row, results in found.items()}, "skipped": skipped}


def run(spec: Spec) -> dict[str, Any] | str:
    """One variant in a process of its own: what it measured, or the line that says why not."""
    if spec.variant == "bertdistiller" and importlib.util.find_spec("bertdistiller") is None:
        return "bertdistiller is not installed"
    argv = [sys.executable, "-m", "bench.variants", json.dumps(dataclasses.asdict(spec))]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of a row's rounds, and the rates of all."""
    rates = [result["tokens_per_s"] for result in results]
    medians = {
        name: statistics.median(result[name] for result in results)
        for name, value in results[0].items()
        if isinstance(value, float | int) and not isinstance(value, bool)
    }
    return results[0] | medians | {"tokens_per_s_rounds": rates}


def compared(group: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Ratios within a group: speed-up and memory against each peer, the teacher tax and its bound, MFU."""
    rows, out = group["rows"], dict[str, Any]()
    ours = rows.get("fastkd")
    if ours is None:
        return out
    peers = {row: values for row, values in rows.items() if row not in ("fastkd", "scratch")}
    out["speedup"] = {row: ours["tokens_per_s"] / values["tokens_per_s"] for row, values in peers.items()}
    out["memory"] = {row: ours["peak_memory_bytes"] / values["peak_memory_bytes"] for row, values in peers.items()}
    out["flop_per_s"] = ours["flops_a_token"] * ours["tokens_per_s"]
    peak = peak_flops(torch.device(device))
    if peak is not None:
        out["mfu"] = out["flop_per_s"] / peak
    if "scratch" in rows:
        scratch = rows["scratch"]
        tax = scratch["tokens_per_s"] / ours["tokens_per_s"]
        bound = ours["flops_a_token"] / scratch["flops_a_token"]
        out |= {"tax": tax, "tax_bound": bound, "tax_over_bound": tax / bound}
    return out


def markdown(groups: Iterable[Mapping[str, Any]]) -> str:
    """The groups as one table, a line a row."""
    groups = list(groups)
    lines = [
        "# Training throughput", "",
        *(f"{words}.\n" for words in dict.fromkeys(in_words(group["environment"]) for group in groups)),
        "`python -m bench.throughput`: medians of interleaved rounds, each in a fresh process. Tokens are text, padding is not",
        "counted; `×` is fastkd's rate over the row's, `memory` fastkd's peak over the row's. Tax: seconds a token over",
        "fastkd's own scratch training, with the ratio of their arithmetic in brackets.", "",
        "| size | dtype | method | row | tokens/s | spread | text | peak MB | × | memory | tax | MFU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for group in groups:
        for row, values in group["rows"].items():
            rates, extra = values["tokens_per_s_rounds"], group["compared"]
            spread = (max(rates) - min(rates)) / values["tokens_per_s"]
            ours = row == "fastkd"
            cells = [
                group["size"], group["dtype"], group["method"], row, f"{values['tokens_per_s']:,.0f}", f"{spread:.0%}",
                f"{values['text_share']:.0%}", f"{values['peak_memory_bytes'] / 1e6:,.0f}",
                _ratio(extra.get("speedup", {}).get(row)), _ratio(extra.get("memory", {}).get(row)),
                f"{extra['tax']:.2f} ({extra['tax_bound']:.2f})" if ours and "tax" in extra else "",
                f"{extra['mfu']:.0%}" if ours and "mfu" in extra else "",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        for row, reason in group["skipped"].items():
            lines.append(f"| {group['size']} | {group['dtype']} | {group['method']} | {row} | left out: {reason} |")
    return "\n".join(lines) + "\n"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def write(groups: list[dict[str, Any]], folder: Path) -> Path:
    """Write the groups; each replaces an earlier one of the same size, dtype and method."""
    path = folder / "throughput.json"

    def key(group: Mapping[str, Any]) -> tuple[str, str, str]:
        return group["size"], group["dtype"], group["method"]

    before = json.loads(path.read_text())["groups"] if path.exists() else []
    kept = {key(group): group for group in (*before, *groups)}
    everything = [kept[name] for name in sorted(kept)]
    files.write(path, json.dumps({"groups": everything}, indent=1) + "\n")
    files.write(path.with_suffix(".md"), markdown(everything))
    return path


def write_teacher(spec: str, folder: Path, tokenizer: str = quickstart.NAME) -> None:
    """A teacher of transformers' with random weights, an MLM head and a tokenizer by name or folder.

    Raises:
        ValueError: the tokenizer cannot be read.
    """
    source = model_folder(tokenizer)
    try:
        own = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer {tokenizer} holds no tokenizer; give a model's folder or hub id") from error
    like = hf.from_hf(BertConfig(vocab_size=len(own), pad_token_id=own.pad_token_id))
    hf.export(Encoder(student_config(spec, like, own), mlm_head=True), own, folder, card="", mlm_head=True)


def default_dtypes(device: str) -> list[str]:
    """bfloat16 where the device multiplies it fast, and float32 on a CPU."""
    if device == "cuda":
        return ["bfloat16"]
    return ["bfloat16", "float32"] if environment.cpu_has_bf16() else ["float32"]


def main(argv: list[str] | None = None) -> None:
    """Measure what the options name, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    at_hand = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=at_hand)
    parser.add_argument("--sizes", help=f"of {', '.join(SIZES)}, comma-separated")
    parser.add_argument("--methods", default=",".join(methods.available()), help="comma-separated")
    parser.add_argument("--dtypes", help="bfloat16 and float32, comma-separated")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, help="of a batch, a multiple of 16")
    parser.add_argument(
        "--tokenizer", default=quickstart.NAME, help="folder or hub id; of the teacher and all students"
    )
    parser.add_argument(
        "--corpus", nargs="+", default=[quickstart.NAME], help="as of a run: files, or a folder of shards"
    )
    parser.add_argument("--results", type=Path, help="folder of the results; default bench/results/DEVICE")
    options = parser.parse_args(argv)
    if min(options.warmup, options.steps, options.rounds) < 1:
        parser.error("--warmup, --steps and --rounds must be at least 1")
    unknown = [name for name in (options.sizes or "").split(",") if name and name not in SIZES]
    if unknown:
        parser.error(f"no size {unknown[0]}: take of {', '.join(SIZES)}")
    unknown = [name for name in options.methods.split(",") if name not in methods.available()]
    if unknown:
        parser.error(f"no method {unknown[0]!r}: take of {', '.join(methods.available())}")
    if options.device == "cuda" and at_hand != "cuda":
        parser.error("--device cuda: PyTorch finds no GPU")
    everywhere = ["quickstart", "paper-6l", "paper-12l"] if options.device == "cuda" else ["quickstart"]
    results, groups = options.results or RESULTS / device_folder(options.device), []
    for size in options.sizes.split(",") if options.sizes else everywhere:
        with tempfile.TemporaryDirectory() as folder:
            try:
                write_teacher(SIZES[size].teacher, Path(folder) / "teacher", options.tokenizer)
            except ValueError as error:
                parser.error(str(error))
            for dtype in options.dtypes.split(",") if options.dtypes else default_dtypes(options.device):
                print(f"{size}, {dtype}", flush=True)
                for method in options.methods.split(","):
                    spec = Spec(
                        "fastkd", method, SIZES[size].student, str(Path(folder) / "teacher"), options.corpus,
                        options.device, dtype, options.sequences or SEQUENCES[options.device],
                        SIZES[size].seq_length, options.warmup, options.steps,
                    )  # fmt: skip
                    group = {"size": size, "dtype": dtype, "method": method, "sequences": spec.sequences,
                             "seq_length": spec.seq_length, "steps": options.steps, "warmup": options.warmup,
                             "environment": measured_on(),
                             **measure(spec, options.rounds)}  # fmt: skip
                    groups.append(group | {"compared": compared(group, options.device)})
                    path = write(groups, results)
    print(markdown(groups))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
