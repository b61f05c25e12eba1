"""What fastkd claims or aims at, and how a run of the suite settles each: met, not met, or not measured.

Kernels are judged by their worst case, and against the fastest of several contenders. Rehearsals on a CPU settle nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.device.part import Row
from fastkd.device.peaks import PEAKS

FLOPS_A_TOKEN = 283.5e6  # of a 6L-768H student with its last layer run whole, forward and backward
PEAK = PEAKS["NVIDIA H100 80GB HBM3"].bf16_flops
SCRATCH = 0.45 * PEAK / FLOPS_A_TOKEN  # tokens/s
TAX = 1.15  # seconds of teaching over what its arithmetic asks for
ROOFLINE = 0.70
EAGER = ("reference", "eager MiniLMv2")
FULL: dict[str, Any] = {"size": "paper-6l", "packing": "full-sentences"}  # the rows of training that goals are about
METHODS = ("logit_kd", "minilm", "minilmv2", "tinybert")  # with a teacher


class Results:
    """The rows of a run by part, and which parts ended by themselves."""

    def __init__(self, rows: Mapping[str, Sequence[Row]], done: Iterable[str] = ()) -> None:
        self._rows, self._done = rows, set(done)

    def all(self, part: str, what: str, everything: bool = False, **fields: Any) -> list[Row]:
        """The rows of a kind whose fields have these values; failed and skipped ones only where everything is asked for."""
        wanted = {"what": what, **fields}
        return [
            row
            for row in self._rows.get(part, ())
            if wanted.items() <= row.items() and (everything or not {"error", "skipped"} & row.keys())
        ]

    def last(self, part: str, what: str, **fields: Any) -> Row:
        """The last of them, or an empty one."""
        return (self.all(part, what, **fields) or [{}])[-1]

    def verdict(self, part: str, fine: bool, missing: bool = False) -> bool | None:
        """Whether all is fine; None where it is so far, but something is missing or the part was cut off."""
        return None if fine and (missing or part not in self._done) else fine


@dataclass(frozen=True)
class Finding:
    """What was measured, in words, and whether it meets the goal; None: there is no bound."""

    text: str
    met: bool | None


@dataclass(frozen=True)
class Goal:
    """A claim, what settles it, and what ``bench.predictions`` expects of it (given that module and a GPU's name)."""

    claim: str
    settle: Callable[[Results], Finding | None]
    predicted: Callable[[Any, str], str] = lambda predictions, gpu: ""


# ---- training -------------------------------------------------------------------------------------------------


def _scratch(results: Results) -> Finding | None:
    rate = results.last("training", "method", method="mlm", **FULL).get("tokens_per_s")
    if rate is None:
        return None
    return Finding(f"{rate / 1e6:.2f} M tokens/s, MFU {rate * FLOPS_A_TOKEN / PEAK:.0%}", rate >= SCRATCH)


def _predicted_scratch(predictions: Any, gpu: str) -> str:
    return f"{predictions.step('mlm', 'paper-6l', gpu).tokens_per_s / 1e6:.2f} M"


def _tax(method: str) -> Goal:
    def settle(results: Results) -> Finding | None:
        row = results.last("training", "tax", method=method, **FULL)
        if row.get("over") is None:
            return None
        return Finding(f"{row['tax']:.2f} for {row['bound']:.2f}: {row['over']:.2f} times", row["over"] <= TAX)

    def predicted(predictions: Any, gpu: str) -> str:
        step = predictions.step(method, "paper-6l", gpu)
        return f"{step.tax:.2f} for {step.tax_bound:.2f}: {step.tax / step.tax_bound:.2f} times"

    return Goal(f"{method}: the teacher costs at most {TAX} times its arithmetic", settle, predicted)


def _mfu(results: Results) -> Finding | None:
    rows = [row for row in results.all("training", "method", **FULL) if row.get("mfu") is not None]
    return Finding(", ".join(f"{row['method']} {row['mfu']:.0%}" for row in rows), None) if rows else None


def _over_the_paper(results: Results) -> Finding | None:
    found = []
    for peer in results.all("training", "peer", peer="paper"):
        same = {name: peer.get(name) for name in ("method", "size", "packing")}  # padded documents beside packed ones
        ours = results.last("training", "method", **same)
        if ours.get("tokens_per_s") and peer.get("tokens_per_s"):
            memory = ""
            if ours.get("peak_memory_bytes") and peer.get("peak_memory_bytes"):
                memory = f" in {ours['peak_memory_bytes'] / peer['peak_memory_bytes']:.0%} of its memory"
            found.append(f"{peer['method']} {ours['tokens_per_s'] / peer['tokens_per_s']:.1f} times{memory}")
    return Finding(", ".join(found), None) if found else None


# ---- kernels --------------------------------------------------------------------------------------------------


def _pairs(results: Results, kernel: str, field: str, contenders: Callable[[str], bool]) -> Iterable[tuple[str, float]]:
    """(case and contender, the contender's ``field`` over fastkd's)."""
    for ours in results.all("kernels", "kernel", kernel=kernel, contender="fastkd"):
        for row in results.all("kernels", "kernel", kernel=kernel, case=ours["case"], dtype=ours.get("dtype")):
            if contenders(str(row["contender"])) and row.get(field) and ours.get(field):
                yield f"{ours['case']}, {row['contender']}", row[field] / ours[field]


def _times(claim: str, kernel: str, least: float, contenders: Callable[[str], bool], field: str = "device_s") -> Goal:
    """At least ``least`` times better than each of the contenders, in each case."""

    def settle(results: Results) -> Finding | None:
        found = sorted((ratio, where) for where, ratio in _pairs(results, kernel, field, contenders))
        if not found:
            return None
        (worst, where), best = found[0], found[-1][0]
        text = f"{worst:.2f} ({where}) to {best:.2f} times, {len(found)} compared"
        return Finding(text, worst >= least and (least != 1 or worst > 1))

    return Goal(claim, settle)


def _roofline(kernel: str) -> Goal:
    def settle(results: Results) -> Finding | None:
        rows = results.all("kernels", "kernel", kernel=kernel, contender="fastkd")
        found = sorted((row["of_roofline"], row["case"], row.get("roofline")) for row in rows if row.get("of_roofline"))
        if not found:
            return None
        worst, where, roofline = found[0]
        text = f"{worst:.0%} ({where}) to {found[-1][0]:.0%} of the {roofline} roofline"
        return Finding(text, worst >= ROOFLINE)

    def predicted(predictions: Any, gpu: str) -> str:
        from bench.losses import cases

        shares = []
        for name, case in cases():
            if name == kernel:
                expected = predictions.kernel(kernel, case, gpu)
                shares.append(expected.floor_s / expected.expected_s)
        return f"{min(shares):.0%} to {max(shares):.0%}"

    return Goal(f"{kernel}: at least {ROOFLINE:.0%} of the roofline", settle, predicted)


def _memory(kernel: str, matrix: str) -> Goal:
    def settle(results: Results) -> Finding | None:
        shares = [1 / r for _, r in _pairs(results, kernel, "peak_bytes", lambda name: name == "reference")]
        return Finding(f"{min(shares):.1%} to {max(shares):.1%} of the definition's", None) if shares else None

    return Goal(f"{kernel} never holds a {matrix} matrix: its peak memory", settle)


# ---- correctness ----------------------------------------------------------------------------------------------


def _tests(results: Results) -> Finding | None:
    rows = results.all("correctness", "tests")
    if not rows:
        return None
    passed, failed = sum(row["passed"] for row in rows), sum(row["failed"] + row["errors"] for row in rows)
    cut = [row["selection"] for row in rows if not row["complete"]]
    cut += [row["selection"] for row in results.all("correctness", "tests", everything=True) if "skipped" in row]
    text = f"{passed} passed, {failed} failed" + (f"; not or not all of: {', '.join(cut)}" if cut else "")
    return Finding(text, results.verdict("correctness", passed > 0 and failed == 0, missing=bool(cut)))


def _gradients(results: Results) -> Finding | None:
    tried = results.all("correctness", "gradient", everything=True)
    rows = [row for row in tried if "gradient_error" in row]
    if not rows:
        return None
    worst = max(rows, key=lambda row: row["gradient_error"] / row["bound"])
    text = f"worst: {worst['method']} in {worst['dtype']}, {worst['gradient_error']:.1e} of {worst['bound']:.1e}"
    missing = {"mlm", *METHODS} - {row["method"] for row in rows}
    text += f"; not measured: {', '.join(sorted(missing))}" if missing else ""
    return Finding(
        text, results.verdict("correctness", all(row.get("ok", True) for row in tried), missing=bool(missing))
    )


def _checks(results: Results) -> Finding | None:
    rows = results.all("smoke", "check", everything=True)
    if not rows:
        return None
    wrong = [row["check"] for row in rows if not row.get("ok", True)]
    skipped = sum("skipped" in row for row in rows)
    text = f"{len(rows) - skipped - len(wrong)} of {len(rows)} checks passed" + "".join(
        f"; failed: {name}" for name in wrong
    )
    return Finding(text, results.verdict("smoke", not wrong, missing=skipped > 0))


def _budget(results: Results) -> Finding | None:
    rows = [row for row in results.all("comparison", "run") if row.get("charged_s") and row.get("budget_s")]
    if not rows:
        return None
    shares = [row["charged_s"] / row["budget_s"] for row in rows]
    return Finding(f"{min(shares):.1%} to {max(shares):.1%} of the budget in {len(rows)} runs", None)


_LIGER = "a smaller gradient error than Liger's and orda's"
GOALS = (
    Goal("what a GPU is needed for works at all (smoke)", _checks),
    Goal("every kernel and attention test passes on the GPU", _tests),
    Goal("a training step's gradient in bfloat16 and float32 against float64", _gradients),
    Goal(f"scratch, 6L-768H: {SCRATCH / 1e6:.2f} M tokens/s, 45% of {PEAK / 1e12:.0f} TFLOP/s at {FLOPS_A_TOKEN / 1e6} "
         "MFLOP a token", _scratch, _predicted_scratch),
    *(_tax(method) for method in METHODS),
    Goal("MFU by FLOPs as run", _mfu),
    Goal("over the paper's way to train, in tokens a second", _over_the_paper),
    _times("linear_kd: 4 times as fast as eager", "linear_kd", 4, EAGER.__contains__),
    _times("linear_kd: 1.5 times as fast as torch.compile of its definition", "linear_kd", 1.5,
           "reference compiled".__eq__),
    _times("linear_kd: faster than orda-kernel", "linear_kd", 1, lambda name: name.startswith("orda")),
    _times("linear_kd: faster than Liger", "linear_kd", 1, lambda name: name.startswith("liger")),
    _times(f"linear_kd: {_LIGER}", "linear_kd", 1, lambda name: name.startswith(("liger", "orda")), "gradient_error"),
    _times("relation_kl: 20 times as fast as eager", "relation_kl", 20, EAGER.__contains__),
    _times("score_mse: 20 times as fast as eager", "score_mse", 20, EAGER.__contains__),
    *(_roofline(kernel) for kernel in ("linear_kd", "relation_kl", "score_mse", "hidden_mse")),
    _memory("linear_kd", "[rows, vocabulary]"),
    _memory("relation_kl", "[length, length]"),
    _memory("score_mse", "[length, length]"),
    Goal("a run charges what it was given (fastkd.run, in miniature)", _budget),
)  # fmt: skip
