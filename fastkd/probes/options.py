"""The options of ``fastkd probe``. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from fastkd.probes.names import chosen
from fastkd.run_config import option


@dataclass(frozen=True)
class ProbeOptions:
    """What to read out of a model, and from which text."""

    probes: str | None = option(
        None, "comma-separated: tokens, pos, blimp; default: tokens, and those that --probe-data has files for"
    )
    probe_data: list[str] = option(
        [],
        "CoNLL-U files (pos; of several, …-dev is fitted and …-test scored), BLiMP's zip or its folder of .jsonl files (blimp), or "
        "a folder that holds any of them; .conllu.gz too",
    )
    corpus: list[str] | None = option(
        None, "text for tokens: files, folders, hub datasets, as of a run; default: the run's, else quickstart"
    )
    text_field: str | None = option(None, "field that holds a document; default: the run's, else text")
    pairs: int = option(100, "minimal pairs of a paradigm: the first ones")
    references: bool = option(
        True, "probe a model of the same shape with random weights too, as floor, and the run's teacher, as ceiling"
    )
    output_dir: str | None = option(None, "for probes.json; default: the run folder, or runs/probe-…")

    def check(self) -> None:
        """Refuse values that are out of range.

        Raises:
            ValueError: naming the option.
        """
        chosen(self.probes)
        if self.pairs < 1:
            raise ValueError(f"--pairs must be at least 1, not {self.pairs}")
