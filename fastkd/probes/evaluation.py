"""Probe a model: check everything, score it and its references, and write probes.json."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastkd import __version__, chain, disk, files, quickstart
from fastkd.data import corpus as corpora
from fastkd.data.progress import Progress
from fastkd.data.shards import Shards
from fastkd.files import Record
from fastkd.glue.model import find_model
from fastkd.models import tokenizer as tokenizers
from fastkd.models.hf import Loaded
from fastkd.models.teacher import encoding_digest
from fastkd.probes import blimp, labelled
from fastkd.probes.labelled import Labelled
from fastkd.probes.names import NONE, chosen
from fastkd.probes.subject import Subject
from fastkd.probes.yardstick import Yardstick
from fastkd.reports.run_report import build_report
from fastkd.run_config import RunConfig
from fastkd.run_folder import read_opening, refuse_links
from fastkd.setup import build_corpus, load_model

log = logging.getLogger(__name__)
NAME, FORMAT = "probes.json", 1


@dataclass(frozen=True)
class Probed:
    """The model that is named, and the run that it came from, if any."""

    loaded: Loaded
    name: str
    run: Path | None

    @property
    def options(self) -> Record:
        """Those of its run; empty without a run."""
        return {} if self.run is None else read_opening(self.run).config

    @property
    def corpus_version(self) -> str | None:
        """Of the corpus that its run read, if that is known."""
        return None if self.run is None else read_opening(self.run).environment.get("corpus_version")

    @property
    def output_dir(self) -> Path:
        """Where its scores go by default: its run folder, else ``runs/probe-NAME-HASH``."""
        name = self.name.strip("/").replace("/", "-")
        return self.run or Path("runs") / f"probe-{name}-{str(self.loaded.sha256)[:8]}"


def probe(
    model: str | Path | Loaded,
    probes: Sequence[str] | None = None,
    *,
    probe_data: Sequence[str | Path] = (),
    corpus: Sequence[str] | None = None,
    text_field: str | None = None,
    pairs: int = blimp.PAIRS,
    references: bool = True,
    output_dir: str | Path | None = None,
) -> Record:
    """Read out of a frozen model what it knows, and write probes.json; equal calls write equal bytes on one machine.

    model: a run folder, a Hugging Face folder, a hub id, ``quickstart``, or a model that ``hf.load`` returned.
    probes: some of tokens, pos and blimp; None: tokens, and those that ``probe_data`` has files for.
    probe_data: CoNLL-U files, BLiMP's archive or folder, or folders that hold them.
    corpus, text_field: for tokens, as of a run; None: those of the model's run, else the quickstart's.
    pairs: of a paradigm of BLiMP, the first ones.
    references: also score a model of this shape with random weights, and the run's teacher.
    output_dir: for probes.json; None: the run folder, or ``runs/probe-…``.

    Returns what probes.json holds (docs/probes.md). Raises ValueError for the user's mistakes, in one line, before anything is
    written but the cache of the tokenised corpus.
    """
    wanted, data = labelled.read(probes, probe_data, pairs)
    probed = _probed(model)
    folder = Path(output_dir) if output_dir is not None else probed.output_dir
    refuse_links(folder)
    files.check_writable(folder, folder / NAME)
    bench = Bench.made(probed, wanted, data, corpus, text_field)
    return bench.write(folder, _subjects(probed, references))


@dataclass(frozen=True)
class Bench:
    """What models of one tokenizer are scored on, and where its parts come from."""

    yardstick: Yardstick
    about: Record  # of probes.json: what holds for all models

    @classmethod
    def made(
        cls, probed: Probed, wanted: Sequence[str], data: Labelled, corpus: Sequence[str] | None, text_field: str | None
    ) -> Bench:
        """With a model's tokenizer, and the corpus of its run where none is named. Raises ValueError where that is too small."""
        tokenizer = probed.loaded.tokenizer
        shards = _shards(probed, corpus, text_field) if "tokens" in wanted else None
        about = {
            "format": FORMAT,
            "fastkd": __version__,
            "tokenizer_sha256": tokenizers.digest(tokenizer),
            "corpus_version": shards.version if shards else None,
        }
        return cls(Yardstick.of(tokenizer, shards, data), about)

    def probe(self, model: str | Path, folder: Path) -> None:
        """Score a model into ``folder/probes.json``, unless that holds its scores on these items. Raises ValueError for a model
        that cannot be read, or that has another tokenizer."""
        probed = _probed(model)
        if encoding_digest(probed.loaded.tokenizer) != encoding_digest(self.yardstick.tokenizer):
            raise ValueError("it has another tokenizer")
        subject = Subject.of("model", probed.name, probed.loaded)
        if not self._holds(folder / NAME, subject):
            self.write(folder, [subject])

    def write(self, folder: Path, subjects: Iterable[Subject]) -> Record:
        """Score models into ``folder/probes.json``; returns what that holds. If it is a run's, its ledger gets a line and
        its report the scores."""
        start = time.perf_counter()
        about = self.yardstick.record()
        record: Record = self.about | {
            "models": {},
            "probes": {name: each | {"scores": {}} for name, each in about.items()},
        }
        for subject in subjects:
            record["models"][subject.label] = subject.about
            for name, scores in self.yardstick.score(subject).items():
                record["probes"][name]["scores"][subject.label] = scores
        with disk.written(folder):
            files.write(folder / NAME, json.dumps(files.finite(record), allow_nan=False) + "\n")
            if (ledger := folder / "ledger.jsonl").is_file():
                spent = {"event": "probe", "seconds": time.perf_counter() - start, "charged": False}
                device = "cuda" if torch.cuda.is_available() else "cpu"
                chain.append(
                    ledger, spent | {"probes": list(about), "models": list(record["models"]), "device": device}
                )
            if (folder / "report.html").is_file():
                build_report(folder)
        log.info("written to %s", folder / NAME)
        return record

    def _holds(self, path: Path, subject: Subject) -> bool:
        try:
            record = json.loads(path.read_bytes())
            same = {name: each["items_sha256"] for name, each in record["probes"].items()}
            scored = all("model" in each["scores"] for each in record["probes"].values())
            return bool(
                scored
                and subject.about["sha256"] is not None
                and record["models"]["model"]["sha256"] == subject.about["sha256"]
                and same == {name: each["items_sha256"] for name, each in self.yardstick.record().items()}
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return False


class Prober:
    """Probes many models, all by the same probes on the same items: the rows of a comparison."""

    def __init__(self, probes: str | None, data: Sequence[str]) -> None:
        """``probes``: as ``--probes`` of a comparison; ``data``: as ``--probe-data``.

        Raises:
            ValueError: an unknown probe, or data that is missing or damaged.
        """
        self.asked, self.wanted = probes is not None, tuple[str, ...]()
        if probes != NONE:
            self.wanted, self._data = labelled.read(chosen(probes), data)
        self._bench: Bench | None = None  # until it is prepared
        self._probed: set[Path] = set()  # folders whose scores are on its items

    def prepare(self, model: Path, corpus: Sequence[str], text_field: str) -> None:
        """Make the items from a corpus, with the tokenizer of one of the models, which all share.

        Raises:
            ValueError: the corpus is too small for a probe that was asked for. By default, no model is probed then.
        """
        if not self.wanted:
            return
        try:
            self._bench = Bench.made(_probed(model), self.wanted, self._data, corpus, text_field)
        except ValueError as error:
            if self.asked:
                raise
            log.warning("no model is probed: %s", error)

    def probe(self, model: Path | str, folder: Path) -> None:
        """Probe a model into ``folder/probes.json``, unless its scores on these items are there; one that cannot be probed is
        left out, with a warning."""
        if self._bench is None:
            return
        try:
            self._bench.probe(model, folder)
            self._probed.add(folder)
        except ValueError as error:
            log.warning("%s is not probed: %s", model, error)

    def record_of(self, folder: Path) -> Record | None:
        """What `probe` found of a folder's model; None if it was not probed."""
        return dict(json.loads((folder / NAME).read_bytes())) if folder in self._probed else None


def _probed(model: str | Path | Loaded) -> Probed:
    """Load what is named, and refuse a tokenizer that has more ids than the model has embeddings."""
    if isinstance(model, Loaded):
        probed = Probed(model, model.source, None)
    else:
        found = find_model(model)
        probed = Probed(load_model(str(model)), found.name, found.run)
    tokens, rows = tokenizers.entries(probed.loaded.tokenizer), probed.loaded.config.vocab_size
    if tokens > rows:
        raise ValueError(
            f"{probed.name} has embeddings for {rows} tokens, its tokenizer {tokens}: put the tokenizer that it was trained with "
            "beside it"
        )
    return probed


def _subjects(probed: Probed, references: bool) -> Iterator[Subject]:
    """The model, then, with ``references``, the floor and the ceiling; each is made when the one before is done."""
    model = Subject.of("model", probed.name, probed.loaded)
    yield model
    if references:
        yield model.untrained()
        if (teacher := _teacher(probed)) is not None:
            yield Subject.of("teacher", teacher.source, teacher)


def _teacher(probed: Probed) -> Loaded | None:
    """The teacher of the model's run; None, with a warning, where it cannot be read any more or has another tokenizer."""
    name = probed.options.get("teacher")
    if not name:
        return None
    try:
        teacher = load_model(name)
    except ValueError as error:
        log.warning("the run's teacher is not probed: %s", error)
        return None
    if encoding_digest(teacher.tokenizer) != encoding_digest(probed.loaded.tokenizer):
        log.warning("the run's teacher %s is not probed: it has another tokenizer now", name)
        return None
    return teacher


def _shards(probed: Probed, corpus: Sequence[str] | None, text_field: str | None) -> Shards:
    """The corpus that is named, or that of the run, or the quickstart's."""
    named = list(corpus or probed.options.get("corpus") or [quickstart.NAME])
    field = text_field or probed.options.get("text_field") or "text"
    quickstart.require_named((), named)
    corpora.check(named, text_field=field)
    run = RunConfig(corpus=named, text_field=field)
    shards = build_corpus(run, probed.loaded.tokenizer, tokens=1, progress=Progress())
    if corpus is None and probed.corpus_version not in (None, shards.version):
        log.warning("the corpus is another now than the run read: the model may know some of what is held out here")
    return shards
