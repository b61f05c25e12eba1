"""The metadata of a model card, which the hub shows, filters and ranks by: its front matter in YAML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fastkd import files, methods, quickstart
from fastkd.data.hub import HubDataset
from fastkd.run_folder import Run

METRICS = {
    "matthews": "matthews_correlation",
    "spearman": "spearmanr",
    "pearson": "pearsonr",
    "macro_f1": "f1",
}  # the hub's names
QUICKSTART_MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # whose weights the packaged teacher has


def front_matter(run: Run, *, mlm_head: bool) -> str:
    """YAML for a student: its teacher and data where they are on the hub, and its held-out loss as a result."""
    datasets = hub_datasets(run)
    teacher = hub_model((run.plan.get("teacher") or {}).get("source"))
    method = str(run.plan.get("method", run.config.get("method", "unknown")))
    distilled = ["knowledge-distillation"] if run.plan.get("teacher") else []
    card = ModelCardData(
        license="unknown",
        library_name="transformers",
        pipeline_tag="fill-mask" if mlm_head else "feature-extraction",
        base_model=teacher,
        datasets=datasets or None,
        tags=["fastkd", *distilled, method, "sentence-transformers"],
        model_name=run.folder.name,
        eval_results=_held_out(run, datasets) or None,
    )
    return str(card.to_yaml())


def method_note(run: Run) -> str:
    """What the run's method says of its students; nothing where no file of fastkd/methods/ has its name."""
    name = run.config.get("method", run.plan.get("method"))
    if name not in methods.available():
        return ""
    return str(methods.load(name).METHOD.card_note(run.config.get("method_options", {})))


def hub_model(source: str | None) -> str | None:
    """The hub id of a model that a run names; None where it is not on the hub."""
    if source == quickstart.NAME:
        return QUICKSTART_MODEL
    if not source or source.count("/") > 1 or source[0] in "./~" or Path(source).exists():
        return None
    return source


def hub_datasets(run: Run) -> list[str]:
    """The hub's names of a run's corpora; files and the quickstart corpus have none."""
    specs = [str(spec).removesuffix("+join") for spec in run.config.get("corpus", [])]
    found = [HubDataset.parse(spec) for spec in specs if not Path(spec).exists() and "/" in spec]
    return [dataset.name for dataset in found if dataset is not None]


def _held_out(run: Run, datasets: Sequence[str]) -> list[EvalResult]:
    """Loss, and accuracy where there is one, on the held-out text."""
    last = next((line for line in reversed(run.validations) if line["loss"] is not None), None)
    if last is None:
        return []
    values = {"loss": last["loss"], "accuracy": last.get("accuracy")}
    name = ", ".join(map(str, run.config.get("corpus", []))) or "the corpus"
    return [
        EvalResult(
            task_type="fill-mask",
            task_name="Held-out text",
            dataset_type=datasets[0] if datasets else "text",
            dataset_name=f"held-out part of {name}",
            metric_type=metric,
            metric_name=f"held-out {metric}",
            metric_value=round(value, 6),
        )
        for metric, value in values.items()
        if value is not None
    ]


def add_results(path: Path, results: Sequence[EvalResult]) -> None:
    """Put results into a card's metadata, in the place of older ones of the same tasks; a card without is given some."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    front = "" if text.startswith("---") else "---\ntags:\n- fastkd\n---\n"
    card = ModelCard(front + text, ignore_metadata_errors=True)
    data: Any = card.data
    new = {_what(result) for result in results}
    data.eval_results = [*(result for result in data.eval_results or [] if _what(result) not in new), *results]
    data.model_name = data.model_name or path.absolute().parent.name
    files.write(path, str(card))


def _what(result: EvalResult) -> tuple[str | None, ...]:
    """What a result was measured on."""
    return result.dataset_type, result.dataset_config, result.dataset_split


def glue_results(scores: Mapping[str, Any]) -> list[EvalResult]:
    """glue.json's scores as results: a metric's mean over seeds, between 0 and 1."""
    return [
        EvalResult(
            task_type="text-classification",
            task_name="Text classification",
            dataset_type=task.hub if task.folder is None else task.name,
            dataset_name=task.title,
            dataset_config=task.config or task.name,
            dataset_split="validation",
            metric_type=METRICS.get(metric, metric),
            metric_name=metric.replace("_", " "),
            metric_value=round(values["mean"] / 100, 5),
        )
        for task, metrics in ((score.task, score.metrics) for score in scores.values())
        for metric, values in metrics.items()
        if math.isfinite(values["mean"])
    ]
