"""What an exported folder holds: a list of its files with their SHA-256, written last and compared when the folder is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastkd.files import file_sha256, json_sha256

NAME = "manifest.json"
CARD = "README.md"  # is prose: scores are added to it, and people edit it
READ = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")  # kinds of files that a model is read from


def write(folder: Path) -> None:
    """Write the list of all files in a folder, but the card's. The list has a digest of its own."""
    files = {name: file_sha256(folder / name) for name in _files(folder)}
    (folder / NAME).write_text(
        json.dumps({"files": files, "sha256": json_sha256(files)}, indent=1) + "\n", encoding="utf-8"
    )


def verify(folder: Path) -> None:
    """Refuse a folder that is not what was written; one without a list (an older export, or of another program) passes.

    Raises:
        ValueError: naming the first file that is missing, was changed or came later, and the remedy.
    """
    if not (folder / NAME).is_file():
        return
    files = _read(folder)
    for name, expected in files.items():
        path = folder / name
        try:
            same = file_sha256(path) == expected
        except OSError as error:
            raise _differs(path, f"cannot be read ({error.strerror})") from error
        if not same:
            raise _differs(path, "was changed since it was exported (its sha256 is another)")
    for name in _files(folder):
        if name not in files and name.endswith(READ) and name != "glue.json":
            raise _differs(folder / name, "was not exported with the other files")


def _read(folder: Path) -> dict[str, str]:
    try:
        content: Any = json.loads((folder / NAME).read_bytes())
        files = {str(name): str(digest) for name, digest in content["files"].items()}
        if content == {"files": files, "sha256": json_sha256(files)} and all(_is_inside(Path(name)) for name in files):
            return files
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise _differs(folder / NAME, "is damaged")


def _is_inside(name: Path) -> bool:
    return not name.is_absolute() and ".." not in name.parts


def _files(folder: Path) -> list[str]:
    """The names of all files but the card, the list itself and hidden ones, such as a hub's download adds."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    kept = (name for name in names if not any(part.startswith(".") for part in name.parts))
    return sorted(name.as_posix() for name in kept if str(name) not in (NAME, CARD))


def _differs(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} {what}: copy the folder again, or remove it and issue its run's command again; where you changed it "
        f"yourself, remove its {NAME}"
    )
