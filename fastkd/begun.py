"""What a run began with, as one file of its folder holds it: ``.begun.json``, written whole before any other.

It has the texts of environment.json, plan.json and config.toml. These three are written from it, and read from it where one is
lost or damaged.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

from fastkd.files import json_sha256

BEGUN = ".begun.json"
CONFIG = "config.toml"
COPIED = ("environment.json", "plan.json", CONFIG)


def sealed(contents: Mapping[str, str]) -> str:
    """The text of ``.begun.json``: the contents of files by name, and their SHA-256."""
    return json.dumps({"sha256": json_sha256(contents), "files": dict(contents)}, indent=1) + "\n"


def begun_with(folder: Path) -> dict[str, str]:
    """The contents of files by name that ``.begun.json`` holds; empty if there is none, it is damaged, or it holds others."""
    try:
        found = json.loads((folder / BEGUN).read_bytes())
        contents: dict[str, str] = found["files"]
        sound = found["sha256"] == json_sha256(contents) and all(_fits(name, text) for name, text in contents.items())
        return contents if sound else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _fits(name: str, text: str) -> bool:
    """Whether a file is one that is copied: anyone can make the digest, and a name may lead out of the folder."""
    return name in COPIED and isinstance(text, str) and (name == CONFIG or isinstance(json.loads(text), dict))


def config_text(folder: Path) -> str | None:
    """The text of config.toml as the run began, or as it is now; None if there is none.

    Raises:
        ValueError: it is no TOML, with a remedy.
    """
    path = folder / CONFIG
    try:
        text = begun_with(folder).get(CONFIG) or path.read_text("utf-8")
        tomllib.loads(text)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): put a copy of it back, or remove it and issue the command that the run began with, "
            "which environment.json names: it is written again"
        ) from error
    return text
