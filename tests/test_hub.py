"""The hub: datasets in units, and what goes wrong there, through a hub on 127.0.0.1."""

import csv
import gzip
import io
import json
import logging
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import fsspec
import hub as test_hub
import hub_contents
import pyarrow
import pyarrow.parquet
import pytest

from fastkd import push
from fastkd.data import hub_parquet, hub_requests
from fastkd.data.hub import HubDataset

CARD = hub_contents.card("small")


def parquet(texts: Sequence[str | None], rows: int = 3) -> bytes:
    columns = {"id": pyarrow.array(range(len(texts)), "int64"), "text": pyarrow.array(texts, "string")}
    return hub_contents.parquet(columns, rows)


def files(count: int) -> dict[str, bytes]:
    """Parquet files of three row groups each."""
    return {
        f"small/train-{file:05}-of-{count:05}.parquet": parquet([f"file {file} row {row}" for row in range(9)])
        for file in range(count)
    }


def dataset(spec: str) -> HubDataset:
    found = HubDataset.parse(spec)
    assert found is not None
    return found


def documents(spec: str) -> list[str]:
    return [text for unit in dataset(spec).units() for text in unit.documents("text")]


def test_row_groups_are_units_in_an_order_that_is_a_sample(hub: test_hub.Hub) -> None:
    contents = files(40)
    hub.add("datasets", "units/wiki", {"README.md": CARD, **contents})
    source, again = dataset("units/wiki:small"), dataset("units/wiki:small")
    units = list(source.units())
    assert [unit.name for unit in again.units()] == [unit.name for unit in units]
    assert len({unit.name for unit in units}) == 120
    assert sum(unit.size for unit in units) == source.size == sum(map(len, contents.values()))
    texts = [text for unit in units for text in unit.documents("text")]
    assert sorted(texts) == sorted(f"file {file} row {row}" for file in range(40) for row in range(9))
    first = [int(text.split()[1]) for text in texts[:90]]  # of ten files' rows: from many files, all over the dataset
    assert len(set(first)) > 10 and min(first) < 10 and max(first) >= 30
    assert source.identity()["commit"] == hub.repositories["datasets", "units/wiki"].branches["main"]


def test_a_file_without_rows_has_no_text(hub: test_hub.Hub) -> None:
    hub.add("datasets", "units/empty", files(2) | {"small/train-00009-of-00002.parquet": parquet([])})
    assert len(documents("units/empty")) == 18


def test_units_that_are_skipped_are_not_read(hub: test_hub.Hub) -> None:
    hub.large = 0
    body = {name: parquet([f"{name} {row} " * 300 for row in range(90)], 30) for name in files(40)}
    hub.add("datasets", "units/skipped", {"README.md": CARD, **body})
    units = dataset("units/skipped:small").units()
    first = next(units)
    footers = {
        request.split("/resolve/")[1].split()[0]
        for request in hub.requests
        if "bytes=" in request and "resolve" in request
    }
    assert len(footers) <= 17, "footers of more files than those that are shuffled together"
    assert len(list(islice(units, 30))) == 30
    hub.sent = 0
    list(first.documents("text"))
    assert hub.sent < 20 * first.size


@pytest.mark.parametrize("kind", ["jsonl.gz", "csv", "txt"])
def test_files_of_other_kinds_are_units(hub: test_hub.Hub, kind: str) -> None:
    def content(number: int) -> bytes:
        rows = [{"id": row, "text": f"file {number} row {row}"} for row in range(3)]
        if kind == "csv":
            text = io.StringIO()
            writer = csv.DictWriter(text, ["id", "text"])
            writer.writeheader()
            writer.writerows(rows)
            return text.getvalue().encode()
        lines = [json.dumps(row) if kind == "jsonl.gz" else row["text"] for row in rows]
        plain = "".join(f"{line}\n" for line in lines).encode()
        return gzip.compress(plain) if kind == "jsonl.gz" else plain

    contents = {f"data/train-{number}.{kind}": content(number) for number in range(5)}
    hub.add("datasets", f"units/{kind}", contents)
    source = dataset(f"units/{kind}")
    units = list(source.units())
    assert [unit.size for unit in units] == [len(contents[unit.name]) for unit in units]
    assert source.size == sum(map(len, contents.values()))
    numbers = [int(unit.name.removesuffix(f".{kind}")[-1]) for unit in units]
    assert sorted(numbers) == [0, 1, 2, 3, 4]
    expected = [f"file {number} row {row}" for number in numbers for row in range(3)]
    assert [text for unit in units for text in unit.documents("text")] == expected


def test_configurations_splits_and_revisions_are_named(hub: test_hub.Hub) -> None:
    texts = ["one", " ", "two"]
    hub.add("datasets", "some/data", {"README.md": CARD, "small/train-0.parquet": parquet(texts)})
    for spec in ("some/data", "some/data:small", "some/data@main:small:train"):
        assert documents(spec) == ["one", "two"]
    for spec, line in {
        "some/data:big": r"corpus 'some/data': BuilderConfig 'big' not found. Available: \['small'\]",
        "some/data::test": r"corpus 'some/data' has no split 'test': take train, or all of them as 'all'$",
        "some/data::train[:1%]": r"corpus 'some/data' has no split 'train\[:1%\]'",
        "some/data@other": r"corpus 'some/data': the hub has no such revision: correct what follows the @",
        "no/data": r"corpus 'no/data' is neither here nor on the hub for you to read: correct the name, .*hf auth login",
    }.items():
        with pytest.raises(ValueError, match=line):
            documents(spec)


def test_a_script_s_parquet_copy_is_read_and_pointed_to(hub: test_hub.Hub) -> None:
    hub.add("datasets", "books/books", {"books.py": "raise SystemExit", "README.md": "---\n---\n"})
    with pytest.raises(ValueError, match=r"'books/books' is a script.*books/books@refs/convert/parquet"):
        documents("books/books")
    hub.add("datasets", "books/books", {"plain_text/train/0000.parquet": parquet(["a", "b"])}, "refs/convert/parquet")
    assert documents("books/books@refs/convert/parquet") == ["a", "b"]


def test_a_column_that_is_not_there_is_named(hub: test_hub.Hub) -> None:
    hub.add("datasets", "units/column", files(1))
    unit = next(dataset("units/column").units())
    with pytest.raises(ValueError, match=r"no column 'body'; it has \['id', 'text'\]: name one with --text-field"):
        next(unit.documents("body"))


PASSING = {
    "too many requests": ("/api/datasets/.*/revision", 429),
    "an error": ("/api/datasets/.*/(revision|tree|paths-info)", 500),
    "a cut answer": ("/api/datasets/.*/(revision|tree)", "cut"),
    "an error in a file": ("parquet", 500),
    "a cut file": ("parquet", "cut"),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_fails_for_a_moment_is_tried_again(hub: test_hub.Hub, waits: list[float], name: str) -> None:
    where, kind = PASSING[name]
    spec = f"passing/{name.replace(' ', '-')}"
    hub.add("datasets", spec, files(3))
    hub.faults = [test_hub.Fault(where, kind, times=2)]
    assert len(documents(spec)) == 27
    assert hub.faults[0].times == 0 and len(waits) >= 2


def test_the_hub_says_how_long_to_wait(hub: test_hub.Hub, waits: list[float]) -> None:
    hub.add("datasets", "passing/wait", files(1))
    hub.faults = [test_hub.Fault("/api/datasets/.*/revision", 429, times=1, retry_after=7)]
    assert len(documents("passing/wait")) == 9
    assert waits == [8.0]


def test_reading_goes_on_where_it_stopped(waits: list[float]) -> None:
    failures = iter([True, True, False])

    def items() -> Iterator[int]:
        for item in range(6):
            if item == 4 and next(failures):
                raise TimeoutError("no answer")
            yield item

    def ask(call: Callable[[], object]) -> object:
        return hub_requests.ask("corpus 'a/b'", call, remedy="wait")

    assert list(hub_requests.resumed(items, ask)) == [0, 1, 2, 3, 4, 5]
    assert waits == list(hub_requests.WAITS[:2])


def test_a_row_group_that_is_too_large_to_hold_is_read_in_pieces(
    hub: test_hub.Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_parquet, "AHEAD_BYTES", 0)
    contents = files(2)
    hub.add("datasets", "units/large", {"README.md": CARD, **contents})
    hub.faults = [test_hub.Fault("units/large.*parquet.*bytes", "cut", times=2, skip=2)]
    assert sorted(documents("units/large:small")) == sorted(
        f"file {file} row {row}" for file in range(2) for row in range(9)
    )
    assert hub.faults[0].times == 0 and waits


@pytest.mark.parametrize("ahead", [hub_parquet.AHEAD_BYTES, 0])
def test_a_column_s_name_may_have_a_dot(hub: test_hub.Hub, monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    monkeypatch.setattr(hub_parquet, "AHEAD_BYTES", ahead)
    columns = {"page": ["a", "b"], "page.text": ["one", "two"], "page.text.more": ["c", "d"]}
    hub.add("datasets", f"units/dots-{ahead}", {"train-0.parquet": hub_contents.parquet(columns)})
    (unit,) = dataset(f"units/dots-{ahead}").units()
    assert list(unit.documents("page.text")) == ["one", "two"]


def test_what_an_old_writer_did_not_count_is_read(hub: test_hub.Hub) -> None:
    """Arrow reads some bytes more of a column by a parquet-mr before 1.2.9, which left out a header's."""
    content = parquet([f"row {row}" for row in range(9)])
    written = re.search(rb"parquet-cpp-arrow version [\d.]+", content)
    assert written is not None
    old = b"parquet-mr version 1.2.8(build )".ljust(len(written[0]))
    assert len(old) == len(written[0])
    hub.add("datasets", "units/old", {"train-0.parquet": content.replace(written[0], old)})
    assert sorted(documents("units/old")) == [f"row {row}" for row in range(9)]


@pytest.mark.parametrize("ahead", [hub_parquet.AHEAD_BYTES, 0])
def test_a_damaged_row_group_is_one_line_that_names_the_corpus(
    hub: test_hub.Hub, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    monkeypatch.setattr(hub_parquet, "AHEAD_BYTES", ahead)
    content = parquet([f"row {row}" for row in range(9)])
    start = pyarrow.parquet.read_metadata(io.BytesIO(content)).row_group(1).column(1).dictionary_page_offset
    damaged = content[:start] + b"\xff" * 40 + content[start + 40 :]
    hub.add("datasets", f"units/damaged-{ahead}", {"train-0.parquet": damaged})
    with pytest.raises(ValueError, match=rf"^cannot read corpus 'units/damaged-{ahead}' .*--preset quickstart.*$"):
        documents(f"units/damaged-{ahead}")


def test_threads_of_the_hub_call_no_pyarrow(hub: test_hub.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the process, when it finds a daemon thread there, aborts."""
    hub.add("datasets", "units/threads", files(4))
    callers = []

    def called(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            callers.append((name, threading.current_thread()))
            return function(*arguments, **options)

        return call

    for name in ("read_metadata", "ParquetFile"):
        monkeypatch.setattr(pyarrow.parquet, name, called(name, getattr(pyarrow.parquet, name)))
    assert len(documents("units/threads")) == 36
    assert {name for name, _ in callers} == {"read_metadata", "ParquetFile"}
    assert {thread for _, thread in callers} == {threading.current_thread()}


@pytest.mark.parametrize("ahead", [hub_parquet.AHEAD_BYTES, 0])
def test_pyarrow_runs_no_python_that_loses_an_interrupt(
    hub: test_hub.Hub, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """One that comes while a file says whether it is closed becomes a ValueError: the file is closed."""
    monkeypatch.setattr(hub_parquet, "AHEAD_BYTES", ahead)
    hub.add("datasets", f"units/interrupt-{ahead}", files(1))

    def closed(file: object) -> bool:
        assert "pyarrow" not in sys._getframe(1).f_code.co_filename
        return False

    monkeypatch.setattr(fsspec.spec.AbstractBufferedFile, "closed", property(closed, lambda file, value: None))
    assert len(documents(f"units/interrupt-{ahead}")) == 9


def test_the_end_of_a_process_does_not_close_connections_that_threads_use() -> None:
    """What is registered first is called last."""
    script = """
import atexit
atexit.register(lambda: print(session.is_closed))
from huggingface_hub import get_session
from fastkd.data import hub_requests
session = hub_requests.ask("nothing", get_session, remedy="")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("False\n", "")


READ = """
import signal, sys
from fastkd.data import hub, hub_requests, hub_parquet
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
kind, hub_parquet.AHEAD_BYTES = sys.argv[1], int(sys.argv[2])
if kind == "model":
    hub_requests.model_folder("ends/model", remedy="")
for unit in hub.HubDataset.parse("ends/" + kind).units():
    list(unit.documents("text"))
"""
STALLED = {  # what is read, bytes that are read ahead, which request gets no answer
    "footers": ("wiki", 1 << 20, "parquet.*bytes", 3),
    "row groups": ("wiki", 1 << 20, "parquet.*bytes", 45),
    "a large row group": ("wiki", 0, "parquet.*bytes", 45),
    "lines": ("lines", 0, "jsonl", 3),
    "model": ("model", 0, "resolve", 2),
}


@pytest.mark.parametrize("name", STALLED)
def test_an_interrupt_does_not_wait_for_a_hub_that_does_not_answer(hub: test_hub.Hub, name: str) -> None:
    kind, ahead, where, skip = STALLED[name]
    hub.large = 1 << 30
    hub.add("datasets", "ends/wiki", files(40))
    hub.add("datasets", "ends/lines", {f"train-{number}.jsonl": '{"text": "some"}\n' for number in range(9)})
    hub.add("models", "ends/model", {f"{name}.json": "{}" for name in ("config", "tokenizer", "vocab")})
    hub.faults = [test_hub.Fault(where, "slow", skip=skip, seconds=1e3)]
    stalled = threading.Event()
    hub.stalls = stalled.set
    with subprocess.Popen([sys.executable, "-c", READ, kind, str(ahead)], stderr=subprocess.PIPE, text=True) as reading:
        try:
            assert stalled.wait(300)
            reading.send_signal(signal.SIGINT)
            _, said = reading.communicate(timeout=50)  # an answer is waited for longer
        finally:
            reading.kill()
    assert reading.returncode == -signal.SIGINT and "KeyboardInterrupt\n" in said
    assert "Bad file descriptor" not in said, "of a connection that was closed under a thread"


LASTING = {
    "token": (".", 401, r"status 401, it refuses the token.*hf auth login"),
    "too many": (".", 429, r"status 429, too many requests.*issue the same command again later"),
    "error": ("parquet", 500, r"status 500, an error of its own.*issue the same command again later"),
    "cut": ("/blobs/", "cut", r"the answer was cut off.*issue the same command again later"),
    "page": (".", "html", r"what answered is not the hub: a web page or a proxy"),
    "page of a file": ("/blobs/", "html", r"cannot read corpus"),
    "slow": ("/api/datasets", "slow", r"no answer in time.*issue the same command again later"),
}


SILENT = {  # what is asked, and which request gets no answer, or one that comes drop by drop
    "a dataset": ("corpus 'silent/{}'", "GET /api/datasets"),
    "a footer": ("corpus 'silent/{}'", "GET /datasets.*bytes"),
    "a model": ("model 'silent/{}'", "GET /silent.*json"),
    "an upload": ("model 'someone/{}'", "POST /api/models.*commit"),
}


@pytest.mark.parametrize("kind", ["slow", "drip"])
@pytest.mark.parametrize("name", SILENT)
def test_a_hub_that_says_nothing_is_named_soon_and_given_up(
    hub: test_hub.Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    tmp_path: Path, name: str, kind: str,
) -> None:  # fmt: skip
    """A byte now and then is no answer either. It is asked once more only as long as little time was lost."""
    for limit, seconds in {"NO_ANSWER": 0.3, "WORD_AFTER": 0.1, "LONGEST_SILENCE": 0.2}.items():
        monkeypatch.setattr(hub_requests, limit, seconds)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    caplog.set_level(logging.INFO)
    asked, where = SILENT[name]
    own = f"{name.split()[1]}-{kind}"
    what = asked.format(own)
    hub.large = 1 << 30
    hub.add("datasets", f"silent/{own}", files(1))
    hub.add("models", f"silent/{own}", {"config.json": json.dumps({"filler": "x" * 500})})
    (tmp_path / "config.json").write_text("{}")
    hub.faults = [test_hub.Fault(where, kind, seconds=60 if kind == "slow" else 0.02)]
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    ask: dict[str, Callable[[], object]] = {
        "a model": lambda: hub_requests.model_folder(f"silent/{own}", remedy="do without"),
        "an upload": lambda: push.push_folder(tmp_path, f"someone/{own}"),
    }
    with pytest.raises((ValueError, push.NotPushed), match=rf"cannot (read|push) {what} .*no answer in time"):
        ask.get(name, lambda: documents(f"silent/{own}"))()
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith(f"waiting for the hub: {what}, ") for line in said)


@pytest.mark.parametrize("name", LASTING)
def test_what_fails_for_good_is_one_line_and_the_same_goes_on(
    hub: test_hub.Hub, waits: list[float], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    where, kind, line = LASTING[name]
    monkeypatch.setattr(hub_requests, "NO_ANSWER", 0.1)
    spec = f"lasting/{name.replace(' ', '-')}"
    hub.large = 0
    hub.add("datasets", spec, files(3))
    hub.faults = [test_hub.Fault(where, kind)]
    with pytest.raises(ValueError, match=line) as error:
        documents(spec)
    assert "\n" not in str(error.value) and f"corpus '{spec}'" in str(error.value)
    assert "--preset quickstart" in str(error.value)
    hub.faults = []
    assert len(documents(spec)) == 27
