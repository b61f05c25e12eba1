"""Documents from the Hugging Face hub, streamed through ``datasets`` so that nothing but shards is stored."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from fastkd.data.files import text_of

log = logging.getLogger(__name__)

_SPEC = re.compile(
    r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?(:(?P<config>[\w.-]*)(:(?P<split>[\w.\[\]%:-]+))?)?"
)


class HubUnreachable(ValueError):
    """The hub did not answer, or is not to be asked (HF_HUB_OFFLINE)."""


@dataclass(frozen=True)
class HubDataset:
    """``name[@revision][:config[:split]]``; the split is ``train`` unless named."""

    name: str
    revision: str | None
    config: str | None
    split: str

    @classmethod
    def parse(cls, spec: str) -> "HubDataset | None":
        """Read a specification, or return None where it has not the form of one."""
        match = _SPEC.fullmatch(spec)
        if match is None:
            return None
        return cls(match["name"], match["revision"], match["config"] or None, match["split"] or "train")

    @cached_property
    def commit(self) -> str:
        """The commit that the revision stands for today. Raises ``ValueError`` where the hub is out of reach."""
        from huggingface_hub import HfApi

        with self._reachable():
            return str(HfApi().dataset_info(self.name, revision=self.revision).sha)

    def identity(self) -> dict[str, str]:
        """Name, revision, configuration, split, and the commit: empty where the hub cannot be asked for it."""
        try:
            commit = self.commit
        except HubUnreachable as error:
            log.warning("%s", error)
            commit = ""
        asked = {"revision": self.revision or "", "config": self.config or "", "split": self.split}
        return {"hub": self.name, **asked, "commit": commit}

    size = 0  # not known without asking

    def units(self) -> Iterator["HubDataset"]:
        """The dataset as a whole."""
        yield self

    def documents(self, text_field: str) -> Iterator[str]:
        """Stream the rows' text in the order of the split; blank ones are left out."""
        import datasets

        commit = self.commit
        with self._reachable():
            rows = datasets.load_dataset(self.name, self.config, split=self.split, revision=commit, streaming=True)
            for table in rows.with_format("arrow").iter(batch_size=1000):
                columns = [text_field] if text_field in table.column_names else table.column_names
                texts = (text_of(row, text_field, "a row") for row in table.select(columns).to_pylist())
                yield from filter(None, texts)

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        from datasets.exceptions import DatasetNotFoundError
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        remedy = "take --preset quickstart, which needs no hub, or a local path (.txt .jsonl .parquet, .gz too)"
        try:
            yield
        except (RepositoryNotFoundError, RevisionNotFoundError, DatasetNotFoundError) as error:
            raise ValueError(
                f"corpus {self.name!r} is neither a file here nor a dataset on the hub that you may read: "
                f"correct the name, log in with `hf auth login`, or {remedy}"
            ) from error
        except ValueError as error:  # an unknown configuration, split or column: the message says which there are
            raise ValueError(f"corpus {self.name!r}: {' '.join(str(error).split())}") from error
        except Exception as error:  # the hub's HTTP library, and so its exceptions, changes from version to version
            reason = " ".join(str(error).split()) or type(error).__name__
            if "scripts are no longer supported" in reason:
                remedy = f"{self.name}@refs/convert/parquet is the hub's own copy without the script, where it made one"
            raise HubUnreachable(f"cannot read corpus {self.name!r} from the hub ({reason}): {remedy}") from error
