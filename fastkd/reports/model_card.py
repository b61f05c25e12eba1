"""The model card of a student: its text, the metadata that the hub shows and ranks by, and results added later."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from markupsafe import Markup

from fastkd import files, methods, quantities, quickstart, recipe
from fastkd.budget import PARTS
from fastkd.data.hub import HubDataset
from fastkd.reports.descriptions import budget_text, corpus_text, model_text, optimizer_text, warning_of
from fastkd.reports.page import render, teacher_note
from fastkd.run_folder import Run, made_from, read_run

# A metric of fastkd.glue: its name on the hub, where that is another.
HUB_METRICS = {
    "matthews": "matthews_correlation",
    "spearman": "spearmanr",
    "pearson": "pearsonr",
    "macro_f1": "f1",
}
QUICKSTART_MODEL = "sentence-transformers/all-MiniLM-L6-v2"  # the hub's name of the packaged teacher


def model_card(run_folder: Path, *, mlm_head: bool) -> str:
    """README.md of a student: what it is, what it cost, what it is not good for.

    Args:
        run_folder: of the run that trained it, with its complete ledger.
        mlm_head: whether the masked-language-modelling head was trained.
    """
    run = read_run(run_folder)
    last = run.last or {"flops": dict.fromkeys(PARTS, 0), "tokens": {"real": 0}, "epoch": 0.0, "joules": None}
    return render(
        "model_card.md",
        metadata=Markup(_front_matter(run, mlm_head=mlm_head)),
        method=str(run.plan.get("method", run.config.get("method", "unknown"))) + optimizer_text(run.plan),
        student=model_text(run.plan.get("student")),
        teacher=model_text(run.plan.get("teacher")),
        teacher_note=teacher_note(made_from(run.plan)),
        corpus=corpus_text(run.plan.get("corpus")),
        seq_length=run.config.get("seq_length"),
        budget=budget_text(run),
        charge=run.plan.get("charge", "unknown"),
        charged=quantities.number(run.charged_s),
        tokens=quantities.count(last["tokens"]["real"]),
        epochs=quantities.number(last["epoch"], 3),
        flops={part: quantities.scaled(last["flops"][part], "FLOP") for part in PARTS},
        joules=None if last["joules"] is None else quantities.scaled(last["joules"], "J"),
        warning=warning_of(run),
        held_out=next((line for line in reversed(run.validations) if line["loss"] is not None), None),
        mlm_head=mlm_head,
        method_note=_method_note(run),
    )


def _front_matter(run: Run, *, mlm_head: bool) -> str:
    """The card's metadata in YAML: teacher and corpus if they are on the hub, and the held-out loss as a result."""
    datasets = _hub_datasets(run)
    teacher = _hub_model((run.plan.get("teacher") or {}).get("source"))
    method = str(run.plan.get("method", run.config.get("method", "unknown")))
    parts = dict.fromkeys(part.partition(":")[0] for part in method.split(recipe.THEN))
    distilled = ["knowledge-distillation"] if run.plan.get("teacher") else []
    card = ModelCardData(
        license="unknown",
        library_name="transformers",
        pipeline_tag="fill-mask" if mlm_head else "feature-extraction",
        base_model=teacher,
        datasets=datasets or None,
        tags=["fastkd", *distilled, *parts, "sentence-transformers"],
        model_name=run.folder.name,
        eval_results=_held_out(run, datasets) or None,
    )
    return str(card.to_yaml())


def _method_note(run: Run) -> str:
    """What the run's method says of its students; of a recipe, what the last one does, and what came before it. Empty if no
    file of fastkd/methods/ has its name."""
    spec = str(run.config.get("method", run.plan.get("method")))  # whose options config.toml holds
    try:
        *earlier, last = recipe.names(spec)
    except ValueError:
        return ""
    method = methods.load(last).METHOD
    before = f"Before {last}, it was trained by {', then '.join(earlier)}. " if earlier else ""
    if not method.trains_mlm_head and any(methods.load(name).METHOD.trains_mlm_head for name in earlier):
        before += f"The MLM head is of that time: {last} changed the layers below it. "
    return (before + str(method.card_note(run.config.get("method_options", {})))).strip()


def _hub_model(source: str | None) -> str | None:
    """The hub's name of a model that a run names; None if it is not on the hub."""
    if source == quickstart.NAME:
        return QUICKSTART_MODEL
    if not source or source.count("/") > 1 or source[0] in "./~" or Path(source).exists():
        return None
    return source


def _hub_datasets(run: Run) -> list[str]:
    """The hub's names of a run's corpora; files and the quickstart corpus have none."""
    specs = [str(spec).removesuffix("+join") for spec in run.config.get("corpus", [])]
    found = [HubDataset.parse(spec) for spec in specs if not Path(spec).exists() and "/" in spec]
    return [dataset.name for dataset in found if dataset is not None]


def _held_out(run: Run, datasets: Sequence[str]) -> list[EvalResult]:
    """The last scores on held-out text: cross-entropy and accuracy of the MLM head, or else the loss of the method, named."""
    last = next((line for line in reversed(run.validations) if line["loss"] is not None), None)
    if last is None:
        return []
    if last.get("mlm_loss") is not None:
        task, values = "fill-mask", {"loss": last["mlm_loss"], "accuracy": last["accuracy"]}
    else:
        task, values = "feature-extraction", {f"loss of {run.plan.get('method', 'its method')}": last["loss"]}
    name = ", ".join(map(str, run.config.get("corpus", []))) or "the corpus"
    return [
        EvalResult(
            task_type=task,
            task_name="Held-out text",
            dataset_type=datasets[0] if datasets else "text",
            dataset_name=f"held-out part of {name}",
            metric_type=metric.partition(" ")[0],
            metric_name=f"held-out {metric}",
            metric_value=round(value, 6),
        )
        for metric, value in values.items()
    ]


def add_results(path: Path, results: Sequence[EvalResult]) -> None:
    """Put results into the metadata of a card, in place of older results of the same tasks.

    A card without metadata gets some; a file that is missing is made.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    front = "" if text.startswith("---") else "---\ntags:\n- fastkd\n---\n"
    card = ModelCard(front + text, ignore_metadata_errors=True)
    data: Any = card.data
    new = {_measured_on(result) for result in results}
    data.eval_results = [*(result for result in data.eval_results or [] if _measured_on(result) not in new), *results]
    data.model_name = data.model_name or path.absolute().parent.name
    files.write(path, str(card))


def _measured_on(result: EvalResult) -> tuple[str | None, ...]:
    """The data that a result was measured on."""
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
            metric_type=HUB_METRICS.get(metric, metric),
            metric_name=metric.replace("_", " "),
            metric_value=round(values["mean"] / 100, 5),
        )
        for task, metrics in ((score.task, score.metrics) for score in scores.values())
        for metric, values in metrics.items()
        if math.isfinite(values["mean"])
    ]
