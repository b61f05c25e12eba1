"""A plan as it is printed, a line a fact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastkd import quantities
from fastkd.budget import Budget
from fastkd.data.unknown import unknown_remark
from fastkd.device import waiting
from fastkd.reports.descriptions import optimizer_text, start_text

if TYPE_CHECKING:
    from fastkd.config import Resolved
    from fastkd.terminal import Console

SHORT = 0.5  # of --seq-length: if the average sequence is shorter, the plan warns


def render(plan: dict[str, Any], console: Console) -> None:
    """Print a plan, a line a fact."""
    student, teacher, q = plan["student"], plan["teacher"], quantities
    flops, rounded = plan["flops_per_token"], ", bfloat16 residual stream" if plan["residual"] == "bfloat16" else ""
    rows = [
        ("device", f"{plan['devices']} × {plan['device']}, {plan['dtype']}{rounded}, "
                   f"attention {_attention(plan)}, compile {'on' if plan['compile'] else 'off'}"),
        ("method", f"{plan['method']}, learning rate {rates(plan)}{optimizer_text(plan)}"),
        ("student", f"{student['spec']}, {q.count(student['parameters'])} parameters"
                    + start_text(student)),
        ("teacher", "none" if teacher is None else f"{teacher['source']}, {q.count(teacher['parameters'])} parameters, "
                                                   f"{teacher['layers_run']} of {teacher['layers']} layers run, "
                                                   f"attention {_attention(teacher)}"),
        ("corpus", _corpus_line(plan["corpus"])),
        ("budget", f"{Budget(**plan['budget'])}, charged: {plan['charge']}"),
        ("step", f"{q.count(plan['batch_tokens'])} tokens in micro-batches of {q.count(plan['micro_batch'])}, "
                 f"{q.duration(plan['step_seconds'])}, {q.memory(plan['activation_bytes'])} of activations"),
        ("FLOPs a token", ", ".join(f"{part} {q.scaled(value, 'FLOP')}" for part, value in flops.items())
                           + _optimizer_flops(plan)),
        ("teacher's share", f"{plan['teacher_share']:.1%} of the FLOPs, "
                            f"{plan['teacher_seconds_share']:.1%} of the seconds"),
        ("throughput", f"{q.count(plan['tokens_per_s'])} tokens/s, {q.scaled(plan['flops_per_s'], 'FLOP/s')} = "
                       f"{plan['flops_per_s'] / plan['matmul_flops_per_s'] / plan['devices']:.1%} of a matrix product's"
                       + ("" if plan["mfu"] is None else f", MFU {plan['mfu']:.1%}")),
        ("predicted", f"{plan['steps']:,} steps, {q.count(plan['tokens'])} tokens, {plan['epochs']:.2f} epochs, "
                      f"{q.scaled(sum(plan['flops'].values()), 'FLOP')}, {q.duration(plan['seconds'])}"
                      + ("" if plan["joules"] is None else f", {q.scaled(plan['joules'], 'J')}")),
        *((f"  {stage['method']}", _stage_line(stage)) for stage in plan.get("stages", ())),
    ]  # fmt: skip
    if plan["queued_share"] > waiting.BUSY_SHARE:
        load = "" if plan["load"] is None else f" (load {plan['load']:.1f})"
        rows.append(("busy", f"other programs had the cores for {plan['queued_share']:.0%} of the time that steps were "
                             f"timed{load}: without them steps are faster"))  # fmt: skip
    for name, value in rows:
        console.print(f"{name:<17}{value}")
    corpus = plan["corpus"]
    for warning in filter(None, (_short_sequences(corpus), unknown_remark(corpus["unknown_share"]))):
        console.print(f"warning: {warning}")


def rates(plan: Mapping[str, Any]) -> str:
    """The peak learning rate; of a recipe, each stage's."""
    return " > ".join(f"{stage['lr']:g}" for stage in plan.get("stages") or [plan])


def _optimizer_flops(plan: Mapping[str, Any]) -> str:
    """What the optimiser adds to the student's FLOPs, if anything."""
    added = plan["optimizer_flops_per_token"]
    return f"; {quantities.scaled(added, 'FLOP')} of the student's are the optimiser's" if added else ""


def _stage_line(stage: Mapping[str, Any]) -> str:
    q = quantities
    return (
        f"{stage['share']:.1%} of the budget, {stage['steps']:,} steps, {q.count(stage['tokens'])} tokens, "
        f"{q.scaled(sum(stage['flops'].values()), 'FLOP')}, {q.duration(stage['seconds'])}, teacher's share of the seconds "
        f"{stage['teacher_seconds_share']:.1%}"
    )


def announce(resolved: Resolved, console: Console) -> None:
    """The plan's first line, which is known before anything is loaded."""
    console.print(f"{'preset':<17}{resolved.run.preset} ({resolved.preset_reason})")


def _attention(model: dict[str, Any]) -> str:
    """A backend, and if it is a slow one, why."""
    return model["attention"] + (f" ({model['attention_remark']})" if model["attention_remark"] else "")


def _corpus_line(corpus: dict[str, Any]) -> str:
    about = "" if corpus["is_complete"] else "about "
    share = corpus["held_out_tokens"] / (corpus["unique_tokens"] + corpus["held_out_tokens"])
    return (
        f"{', '.join(corpus['sources'])}: {about}{quantities.count(corpus['unique_tokens'])} tokens, "
        f"{quantities.count(corpus['held_out_tokens'])} held out ({share:.1%}), "
        f"sequences of {corpus['mean_sequence']:.0f} tokens on average"
    )


def _short_sequences(corpus: dict[str, Any]) -> str | None:
    """A warning if sequences are far from full."""
    if corpus["mean_sequence"] >= SHORT * corpus["seq_length"]:
        return None
    return (
        f"sequences hold {corpus['mean_sequence']:.0f} tokens on average, under half of --seq-length {corpus['seq_length']}: "
        "--packing full-sentences fills them; where a row or line is a sentence, +join after the corpus's name joins them"
    )
