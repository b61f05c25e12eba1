"""A report's page as a program reads it."""

from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """The named numbers of a page, the tags and the ids it uses, and what it would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text()
        self.numbers: dict[str, float] = {}
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.tags.add(tag)
        if tag == "data":
            assert values["data-name"] not in self.numbers
            self.numbers[values["data-name"]] = float(values["value"])
        if "id" in values:
            self.ids.append(values["id"])
        for key in ("src", "href", "xlink:href", "action", "poster", "data"):
            if not values.get(key, "#").startswith("#"):
                self.fetched.append(values[key])
