"""A finished student on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastkd import manifest
from fastkd.data import hub_requests

REMEDY = "leave --push-to-hub out"


class NotPushed(OSError):
    """The student is finished and saved, but not on the hub."""


def destination(name: str) -> str:
    """The repository ``OWNER/NAME`` behind what --push-to-hub was given, checked: the token may write there.

    Raises:
        ValueError: a name that the hub does not take, no token or a wrong one, or one that may not write there.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"--push-to-hub {name!r} is no name for a repository: write NAME or OWNER/NAME") from error
    if get_token() is None:
        raise ValueError(f"--push-to-hub needs a token: log in with `hf auth login`, set HF_TOKEN, or {REMEDY}")
    user = _ask(name, lambda: HfApi().whoami())
    token = user.get("auth", {}).get("accessToken", {})
    owners = [user["name"], *(group["name"] for group in user.get("orgs", []))]
    repository = name if "/" in name else f"{user['name']}/{name}"
    if token.get("role") == "read":
        raise ValueError(f"--push-to-hub {name}: the token may only read: log in with one that may write, or {REMEDY}")
    if repository.split("/")[0] not in owners:
        raise ValueError(
            f"--push-to-hub {name}: {user['name']!r} may write to {', '.join(owners)}: choose one of them, or {REMEDY}"
        )
    return repository


def push_folder(folder: Path, repository: str) -> str:
    """Send a Hugging Face folder; returns its address.

    Raises:
        NotPushed: the hub did not take it. Nothing is lost: call this again to send it again.
        ValueError: the folder is not what was exported.
    """
    from huggingface_hub import HfApi

    manifest.verify(folder)

    def send() -> str:
        HfApi().create_repo(repository, exist_ok=True)
        message = "Student trained with fastkd"
        return str(HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message=message).repo_url)

    try:
        return str(_ask(repository, send))
    except ValueError as error:
        raise NotPushed(f"{folder} is finished, but {error}") from error


def _ask(name: str, call: Any) -> Any:
    return hub_requests.ask(f"model {name!r}", call, remedy=REMEDY, verb="push")
