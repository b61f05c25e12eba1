"""What the pages share: the templates' environment, and the notes at the top and at the foot of a page."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fastkd import quickstart
from fastkd.reports.tables import escape_markdown

QUICKSTART_TEACHER_NOTE = (
    "The quickstart teacher, all-MiniLM-L6-v2, was fine-tuned on NLI and paraphrase pairs: what a student "
    "learns from it is not pretraining alone."
)
NOT_INCLUDED = "The teacher's own pretraining is not included in any number here; fine-tuning (GLUE) has its own line."


def render(template: str, **contents: Any) -> str:
    """A file of `fastkd/reports/templates/` filled with `contents`, escaped for HTML or Markdown unless they are `Markup`."""
    return environment(template.endswith(".md")).get_template(template).render(**contents)


@cache
def environment(is_markdown: bool) -> Environment:
    """The templates, each of which is compiled once a process."""
    return Environment(
        loader=PackageLoader("fastkd.reports", "templates"),
        autoescape=lambda name: bool(name and name.endswith(".html")),
        finalize=_markdown if is_markdown else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _markdown(value: Any) -> Any:
    return escape_markdown(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def fenced(text: str) -> Markup:
    """A block of code in Markdown; its fence is longer than any in the text."""
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", text)), 0)
    return Markup(f"{fence}\n{text}\n{fence}")


def teacher_note(models: Iterable[str]) -> str:
    """What readers must know if a student was made from the quickstart teacher: it is one of `models`; else empty."""
    return QUICKSTART_TEACHER_NOTE if quickstart.NAME in models else ""
