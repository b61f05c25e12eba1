"""A run goes on only with the inputs and options that it began with, however they are stored, and only in a folder of its own."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from given_model import WEIGHTS, edit, pickled, rewrite, untie, write
from safetensors.torch import load_file, save_file

from fastkd import pipeline, run
from fastkd.config import parse
from fastkd.distributed import World
from fastkd.run_folder import read_run, refuse_links
from fastkd.setup import Setup, prepare

WORD = "bert.embeddings.word_embeddings.weight"


class Inputs:
    """A teacher, a model whose tokenizer and shape the student has, a text, a ledger; and a run that began with them."""

    def __init__(self, root: Path) -> None:
        self.teacher, self.like = write(root / "teacher"), write(root / "like", max_position_embeddings=48)
        self.corpus, self.ledger, self.run = root / "corpus.txt", root / "ledger.jsonl", root / "run"
        self.corpus.write_text("\n\n".join(" ".join(f"w{(7 * i + j) % 200}" for j in range(40)) for i in range(50)))
        self.ledger.write_text("".join(json.dumps({"step": i, "progress": i / 10}) + "\n" for i in range(1, 11)))
        self.run.mkdir()
        begun = self.prepare().inputs
        assert None not in begun.values()
        (self.run / "environment.json").write_text(json.dumps(begun))

    def prepare(self) -> Setup:
        named = {"teacher": self.teacher, "tokenizer": self.like, "corpus": self.corpus, "replay": self.ledger}
        options = [word for name, path in named.items() for word in (f"--{name}", str(path))]
        options += ["--preset", "quickstart", "--student", "1L-24H-4A", "--batch-tokens", "512", "--seq-length", "32"]
        return prepare(parse([*options, "--dtype", "float32", "--budget-tokens", "12000"]), World())

    def check(self) -> None:
        pipeline.check_inputs(read_run(self.run), self.prepare())


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def inputs(sound: Inputs, tmp_path: Path) -> Inputs:
    """Copies, to be changed."""
    mine = object.__new__(Inputs)
    shutil.copytree(sound.run.parent, tmp_path / "mine")
    for name, path in vars(sound).items():
        setattr(mine, name, tmp_path / "mine" / path.name)
    return mine


def tokenizers(change: Callable[[Path], object]) -> Callable[[Inputs], object]:
    """A change of the tokenizer, of teacher and student."""
    return lambda inputs: (change(inputs.teacher), change(inputs.like))


def backend(change: Callable[[dict], object]) -> Callable[[Inputs], object]:
    """A change of what tokenizer.json holds."""

    def edited(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return tokenizers(edited)


def swapped(content: dict) -> None:
    words = content["model"]["vocab"]
    words["w3"], words["w4"] = words["w4"], words["w3"]


def sharded(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    write(folder, shard="20KB")


def weights(change: Callable[[dict], dict]) -> Callable[[Inputs], object]:
    return lambda inputs: rewrite(inputs.teacher, change)


def last_of(pattern: str) -> Callable[[Inputs], None]:
    """Other numbers in the last file of weights of another format."""

    def change(inputs: Inputs) -> None:
        if "0" in pattern:
            sharded(inputs.teacher)
        if ".bin" in pattern:
            pickled(inputs.teacher)
        path = sorted(inputs.teacher.glob(pattern))[-1]
        state = torch.load(path) if path.suffix == ".bin" else load_file(path)
        state = {name: 2 * tensor for name, tensor in state.items()}
        torch.save(state, path) if path.suffix == ".bin" else save_file(state, path, metadata={"format": "pt"})

    return change


def appended(text: str) -> Callable[[Inputs], object]:
    return lambda inputs: inputs.corpus.write_text(inputs.corpus.read_text() + text)


def older(inputs: Inputs, files: list[Path]) -> None:
    """What an older version noted of a teacher: one digest over its files."""
    contents = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    version = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    (inputs.run / "environment.json").write_text(json.dumps({"teacher_version": version}))


SAME: dict[str, Callable[[Inputs], object]] = {
    "nothing": lambda i: None,
    "shards": lambda i: sharded(i.teacher),
    "bin": lambda i: pickled(i.teacher),
    "bin shards": lambda i: (sharded(i.teacher), pickled(i.teacher)),
    "another place": lambda i: setattr(i, "teacher", i.teacher.rename(i.teacher.with_name("moved"))),
    "a card": lambda i: (i.teacher / "README.md").write_text("words"),
    "gelu by another name": lambda i: edit(i.teacher, hidden_act="gelu_python"),
    "what no forward reads": lambda i: edit(i.teacher, hidden_dropout_prob=0.3, _name_or_path="elsewhere"),
    "an older run": lambda i: older(i, [i.teacher / "config.json", i.teacher / WEIGHTS]),
    "an older run with shards": lambda i: (sharded(i.teacher), older(i, [i.teacher / "config.json", *i.teacher.glob("model*")])),
    "a run that noted nothing": lambda i: (i.run / "environment.json").write_text("{}"),
}  # fmt: skip
OTHER: dict[str, tuple[Callable[[Inputs], object], str]] = {
    "a weight": (weights(lambda s: s | {WORD: s[WORD] * 1.001}), "the teacher"),
    "a weight of the head": (weights(lambda s: s | {"cls.predictions.bias": s["cls.predictions.bias"] + 1}), "the teacher"),
    "a decoder": (weights(untie), "the teacher"),
    "a weight of an older run's": (
        lambda i: (older(i, [i.teacher / "config.json", i.teacher / WEIGHTS]), weights(untie)(i)), "the teacher",
    ),
    "another commit of an older run's": (
        lambda i: (i.run / "environment.json").write_text('{"teacher_version": "0123abcd"}'), "the teacher",
    ),
    "no head": (weights(lambda s: {n: t for n, t in s.items() if not n.startswith("cls")}), "the teacher"),
    "rounded weights": (weights(lambda s: {n: t.half() for n, t in s.items()}), "the teacher"),
    "a shard": (last_of("model-0*.safetensors"), "the teacher"),
    "a bin": (last_of("pytorch_model.bin"), "the teacher"),
    "a bin shard": (last_of("pytorch_model-0*.bin"), "the teacher"),
    "layer_norm_eps": (lambda i: edit(i.teacher, layer_norm_eps=1e-3), "the teacher"),
    "heads": (lambda i: edit(i.teacher, num_attention_heads=2), "the teacher"),
    "layers": (lambda i: edit(i.teacher, num_hidden_layers=1), "the teacher"),
    "the student's layer_norm_eps": (lambda i: edit(i.like, layer_norm_eps=1e-3), "the config.json beside the tokenizer"),
    "the student's start": (lambda i: edit(i.like, initializer_range=0.1), "the config.json beside the tokenizer"),
    "the student's positions": (lambda i: edit(i.like, max_position_embeddings=40), "the config.json beside the tokenizer"),
    "the student's types": (lambda i: edit(i.like, type_vocab_size=3), "the config.json beside the tokenizer"),
    "[MASK]": (tokenizers(lambda f: edit(f, "tokenizer_config.json", mask_token="w7")), "the tokenizer"),
    "[CLS]": (tokenizers(lambda f: edit(f, "tokenizer_config.json", cls_token="w7")), "the tokenizer"),
    "a special token": (tokenizers(lambda f: edit(f, "tokenizer_config.json", extra_special_tokens=["w8"])), "the tokenizer"),
    "vocabulary": (backend(swapped), "the tokenizer"),
    "normaliser": (backend(lambda c: c.update(normalizer={"type": "Lowercase"})), "the tokenizer"),
    "pre-tokeniser": (backend(lambda c: c.update(pre_tokenizer={"type": "WhitespaceSplit"})), "the tokenizer"),
    "a word of the text": (lambda i: i.corpus.write_text(i.corpus.read_text().replace("w7 ", "w8 ", 1)), "the corpus"),
    "more text": (appended("\n\nw1 w2 w3\n"), "the corpus"),
    "replayed ledger": (lambda i: i.ledger.write_text(i.ledger.read_text().replace("0.5", "0.55")), "the ledger that is"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_the_same_inputs_however_they_are_stored(name: str, inputs: Inputs) -> None:
    SAME[name](inputs)
    inputs.check()


@pytest.mark.parametrize("name", OTHER)
def test_other_inputs_are_named(name: str, inputs: Inputs) -> None:
    change, words = OTHER[name]
    change(inputs)
    with pytest.raises(
        ValueError, match=f"{words}.* changed since the run in .*: bring back what it was, or give another"
    ):
        inputs.check()


def test_changed_options_are_named_with_both_values(from_scratch: list[str], tmp_path: Path, capsys) -> None:
    begun = parse([*from_scratch, "--method", "mlm", "--budget-tokens", "9000", "--lr", "5e-4"])
    (tmp_path / "config.toml").write_text(begun.to_toml())
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text in texts:
        text.write_text("words")
    options = [
        *from_scratch,
        "--method",
        "mlm",
        "--budget-tokens",
        "8000",
        "--corpus",
        *map(str, texts),
        "--log-every",
        "3",
    ]
    assert run.main([*options, "--lr", "1e-3", "--output-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    corpus = from_scratch[from_scratch.index("--corpus") + 1]
    changes = f"budget_tokens: 9000.0 → 8000.0; corpus: {corpus} → {texts[0]} {texts[1]}; lr: 0.0005 → 0.001"
    assert error.count("\n") == 1 and f"another configuration ({changes}): give its own options" in error
    assert "or another --output-dir" in error
    older = begun.to_toml().replace("lr = 0.0005\n", "an_option_that_went = 1\n")
    assert begun.changes(older) == ["an_option_that_went: 1 → not set", "lr: not set → 0.0005"]
    other = parse(
        ["--preset", "quickstart", "--method", "minilmv2", "--budget-tokens", "9000", "--relation-heads", "24"]
    )
    assert [change for change in other.changes(begun.to_toml()) if "heads" in change] == []
    assert "method: mlm → minilmv2" in other.changes(begun.to_toml())
    same = parse(
        ["--preset", "quickstart", "--method", "minilmv2", "--budget-tokens", "9000", "--relation-heads", "48"]
    )
    assert other.changes(same.to_toml()) == ["relation_heads: 48 → 24"]


@pytest.mark.parametrize(
    "name",
    ["config.toml", "environment.json", "plan.json", "ledger.jsonl", "metrics.jsonl", "report.html", "glue.json", ".lock",
     "trace.json", "checkpoints", "final", "checkpoints/step-3", "checkpoints/step-3/state.json", "final/README.md",
     "config.toml.7.partial"],
)  # fmt: skip
def test_a_link_in_a_run_folder_is_refused(name: str, from_scratch: list[str], tmp_path: Path, capsys) -> None:
    """A folder that someone hands over does not lead out of itself; the folder may be a link, and what others keep in it."""
    outside, folder = tmp_path / "outside", tmp_path / "real"
    outside.write_text("precious")
    folder.mkdir()
    (tmp_path / "run").symlink_to(folder)
    options = [*from_scratch, "--method", "mlm", "--budget-tokens", "9000", "--output-dir", str(tmp_path / "run")]
    resolved = parse(options)
    (folder / "config.toml").write_text(resolved.to_toml())
    (folder / "wandb").symlink_to(outside)
    refuse_links(tmp_path / "run")
    link = folder / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    assert run.main(options) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1 and f"run/{name} is a link, and a run writes nothing outside its folder: put in" in error
    )
    assert outside.read_text() == "precious"
