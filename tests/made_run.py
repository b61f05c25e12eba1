"""A run folder as tests need it, without a run: 57 steps under a plan, line by line."""

import json
from pathlib import Path
from typing import Any

PHASES = ("data", "teacher", "student", "loss", "backward", "optimizer", "communication", "other")
PLAN = {
    "device": "A processor, 2 cores", "devices": 1, "preset": "quickstart",
    "preset_reason": "no CUDA device is at hand",
    "method": "minilmv2",
    "student": {"layers": 3, "width": 384, "heads": 12, "vocabulary": 30522, "parameters": 17_248_506,
                "spec": "3L-384H-12A"},
    "teacher": {"layers": 6, "width": 384, "heads": 12, "vocabulary": 30522, "parameters": 22_565_376,
                "source": "quickstart", "layers_run": 5},
    "ancestors": ["quickstart"],
    "corpus": {"sources": ["quickstart"], "documents": 10_033, "unique_tokens": 1_134_022},
    "budget": {"unit": "gpu-seconds", "amount": 72.0}, "charge": "loop", "tokens_per_s": 3400.0, "step_seconds": 1.2,
    "steps": 60, "tokens": 240_000.0, "epochs": 0.21,
    "flops_per_token": {"student": 5.2e7, "teacher": 2.0e7, "loss": 4.0e5}, "teacher_share": 0.43,
    "teacher_seconds_share": 0.19, "flops_per_s": 2.4e11, "matmul_flops_per_s": 5e11, "mfu": 0.24, "lr": 6e-4,
    "batch_tokens": 4096, "micro_batch": 2048,
    "attention": "sdpa", "dtype": "bfloat16", "compile": False, "activation_bytes": 412_000_000,
}  # fmt: skip


def step_line(step: int, charged_s: float, seconds: float = 1.0, joules: float | None = None) -> dict[str, Any]:
    parts = (0.01, 0.2, 0.2, 0.08, 0.42, 0.05, 0.0, 0.04)
    return {
        "step": step, "progress": step / 60, "charged_s": charged_s,
        "phase_s": {name: part * seconds for name, part in zip(PHASES, parts, strict=True)},
        "flops": {"student": 213_000_000_001 * step, "teacher": 82_000_000_003 * step, "loss": 1_600_000_007 * step},
        "tokens": {"real": 4_091 * step, "predicted": 614 * step, "unique": min(4_091 * step, 1_134_022)},
        "epoch": 4_091 * step / 1_134_022, "joules": joules, "lr": 6e-4 * (1 - step / 60), "loss": 4.6 - step / 20,
    }  # fmt: skip


def event_line(event: str, seconds: float, step: int, charged: bool, charged_s: float) -> dict[str, Any]:
    return {"event": event, "seconds": seconds, "step": step, "charged": charged, "charged_s": charged_s}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(folder: Path, *, devices: int = 1, joules: bool = False, plan: dict[str, Any] | None = None) -> Path:
    """A finished run of 57 steps with two validations and a checkpoint between them."""
    folder.mkdir(parents=True)
    ledger = [event_line("setup", 6.4, 0, False, 0.0), event_line("validation", 0.5, 0, False, 0.0)]
    metrics = [{"event": "validation", "step": 0, "progress": 0.0, "charged_s": 0.0, "tokens": 0, "loss": 4.7,
                "accuracy": None}]  # fmt: skip
    charged = 0.0
    for step in range(1, 58):
        seconds = 1.0 + 0.003 * (step % 7)
        charged += seconds * devices
        ledger.append(step_line(step, charged, seconds, 310.5 * step if joules else None))
        if step == 1 or step % 10 == 0:
            parts = {"query": 1.5 - step / 100, "key": 1.4 - step / 100, "value": 1.3 - step / 100}
            metrics.append({"step": step, "progress": step / 60, "charged_s": charged, "tokens": 4_091 * step,
                            "loss": 4.6 - step / 20, "parts": parts, "lr": 5e-4, "grad_norm": 1.0,
                            "tokens_per_s": 3412.3, "peak_memory_bytes": 10**9 + step,
                            "watts": 309.0 if joules else None, "sm_clock_mhz": 1500.0 + step if joules else None,
                            "throttle": ["power cap"] * (step == 10) if joules else None})  # fmt: skip
        if step == 30:
            for event, taken in (("validation", 0.41), ("checkpoint", 0.23)):
                charged += taken * devices
                ledger.append(event_line(event, taken, step, True, charged))
            metrics.append({"event": "validation", "step": step, "progress": 0.5, "charged_s": charged,
                            "tokens": 4_091 * step, "loss": 2.9, "mlm_loss": 3.1, "accuracy": 0.231})  # fmt: skip
    ledger.append(event_line("export", 0.9, 57, False, charged))
    write_lines(folder / "ledger.jsonl", ledger)
    write_lines(folder / "metrics.jsonl", metrics)
    (folder / "plan.json").write_text(json.dumps((plan or PLAN) | {"devices": devices}))
    (folder / "config.toml").write_text('method = "minilmv2"\nseed = 3\n[method_options]\nrelation_heads = 48\n')
    environment = {"command": ["python", "-m", "fastkd.run", "--teacher", "a b"], "packages": {"torch": "2.13.0"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "final").mkdir()
    (folder / "final" / "config.json").write_text("{}")
    (folder / "final" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # no tensor
    return folder
