"""Finished fine-tunings on disk, one JSON file each, so that an interrupted evaluation repeats nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from fastkd import files
from fastkd.glue.finetune import Job, finetune

FOLDER = "glue"


@dataclass(frozen=True)
class Cell:
    """One fine-tuning and where its result lies."""

    job: Job
    rows: Mapping[str, int]  # of each split, after --train-rows
    output_dir: Path

    @property
    def identity(self) -> dict[str, Any]:
        """What the scores depend on; the device and the versions are recorded beside them instead."""
        job, task, protocol = self.job, self.job.task, self.job.protocol
        return {
            "model": job.model_sha256,
            "task": task.name,
            "labels": task.labels,
            "metrics": task.metrics,
            "splits": [task.train, *task.dev],
            "content": {split: sha256 for split, sha256 in job.content if split not in job.test},
            "epochs": protocol.epochs,
            "schedule": protocol.schedule,
            "warmup": protocol.warmup,
            "weight_decay": protocol.weight_decay,
            "max_length": protocol.max_length,
            "learning_rate": job.learning_rate,
            "batch_size": job.batch_size,
            "seed": job.seed,
        }

    @property
    def path(self) -> Path:
        """Its file."""
        job = self.job
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        name = f"{job.task.name}-lr{job.learning_rate:g}-b{job.batch_size}-seed{job.seed}-{key}.json"
        return self.output_dir / FOLDER / name

    def read(self) -> dict[str, Any] | None:
        """Its result, None where it is not finished or lacks predictions that are wanted now."""
        try:
            result: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        kinds = {"metrics": dict, "predictions": dict, "seconds": float, "test_content": dict}
        if not isinstance(result, dict) or not all(isinstance(result.get(k), kind) for k, kind in kinds.items()):
            return None
        if not result["metrics"]:
            return None
        return result if self._test_content.items() <= result["test_content"].items() else None

    @property
    def _test_content(self) -> dict[str, str]:
        return {split: sha256 for split, sha256 in self.job.content if split in self.job.test}

    def run(self) -> dict[str, Any]:
        """Fine-tune, and put the result on the disk before anything else happens."""
        result = {
            **self.identity,
            "rows": dict(self.rows),
            **finetune(self.job),
            "test_content": self._test_content,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        files.write(self.path, json.dumps(result) + "\n")
        return result
