"""Model folders that cannot be used are refused in one line that names what is wrong, before anything is spent."""

import ast
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import processes
import pytest
import torch
from given_model import SHARDED, WEIGHTS, edit, pickled, rewrite, untie, vocabulary, write
from packed_text import word_tokenizer
from transformers import BertForMaskedLM, GPT2Config, GPT2Model, RobertaForMaskedLM

from fastkd import plan
from fastkd.glue.encoded import load_tokenizer, require_encoder
from fastkd.glue.finetune import load_classifier
from fastkd.glue.tasks import TASKS
from fastkd.models.hf import load, shape
from fastkd.models.student import student_config

ROOT = Path(__file__).parents[1]
HTML = "<!DOCTYPE html>\n<html><body>Sign in to download</body></html>\n"
INDEX = "pytorch_model.bin.index.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sound ones, to be copied."""
    root = tmp_path_factory.mktemp("models")
    made = {"bert": write(root / "bert"), "roberta": write(root / "roberta", RobertaForMaskedLM)}
    made |= {name: write(root / name, shard="20KB") for name in ("shards", "bin shards")}
    made["bin"] = write(root / "bin")
    pickled(made["bin"])
    pickled(made["bin shards"])
    return made


def cut(folder: Path, name: str, size: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:size])


def put(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


def poison(number: float, name: str = "bert.encoder.layer.1.output.dense.weight") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        rewrite(
            folder, lambda state: state | {name: torch.where(state[name] == state[name].max(), number, state[name])}
        )

    return change


def drop(*names: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda state: {n: t for n, t in state.items() if n not in names})


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def of_strangers(folder: Path) -> None:
    """A pickle that would run a program where it is read."""

    class Strange:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (folder / "was run",)

    torch.save({"bert.embeddings.LayerNorm.bias": Strange()}, folder / "pytorch_model.bin")


def names(*others: str) -> Callable[[Path], None]:
    """An index of weights that names other files."""

    def change(folder: Path) -> None:
        index = json.loads((folder / SHARDED).read_text())
        index["weight_map"] |= dict.fromkeys(list(index["weight_map"])[:1], *others)
        put(folder, SHARDED, json.dumps(index))

    return change


def move_away(folder: Path) -> None:
    """A part of the weights is a link that leads out of the folder."""
    part = next(folder.glob("*-00002-*"))
    part.symlink_to(part.rename(folder.parent / "elsewhere.safetensors"))


def slow(folder: Path) -> None:
    vocabulary(folder, tokenizer_class="BertJapaneseTokenizer", word_tokenizer_type="basic")


WEIGHTS_REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "none": ("bert", lambda f: (f / WEIGHTS).unlink(), "holds neither model.safetensors nor other weights"),
    "cut safetensors": ("bert", lambda f: cut(f, WEIGHTS, 3000), r"cannot load .*\(SafetensorError"),
    "empty safetensors": ("bert", lambda f: cut(f, WEIGHTS, 0), "model.safetensors is missing or empty; download it"),
    "HTML as safetensors": ("bert", lambda f: put(f, WEIGHTS, HTML), r"cannot load .*\(SafetensorError"),
    "HTML as bin": ("bin", lambda f: put(f, "pytorch_model.bin", HTML), r"cannot load .*\(UnpicklingError[^.]*\); name a"),
    "cut bin": ("bin", lambda f: cut(f, "pytorch_model.bin", 3000), "cannot load"),
    "empty bin": ("bin", lambda f: cut(f, "pytorch_model.bin", 0), "pytorch_model.bin is missing or empty"),
    "strangers' bin": ("bin", of_strangers, "cannot load"),
    "missing shard": ("shards", lambda f: next(f.glob("*-00002-*")).unlink(), "-00002-of-.* is missing or empty; down"),
    "missing bin shard": ("bin shards", lambda f: next(f.glob("*-00002-*")).unlink(), "-00002-of-.* is missing or empty"),
    "cut shard": ("shards", lambda f: cut(f, next(f.glob("*-00002-*")).name, 99), r"cannot load .*\(SafetensorError"),
    "HTML as index": ("shards", lambda f: put(f, SHARDED, HTML), "index.json is no index of weights; download it again"),
    "empty index": ("bin shards", lambda f: put(f, INDEX, "{}"), "index.json is no index of weights; download it again"),
    "list as index": ("bin shards", lambda f: put(f, INDEX, "[]"), "index.json is no index of weights; download it again"),
    "NaN": ("bert", poison(float("nan")), "1.output.dense.weight holds 1 numbers that are NaN or infinite; take"),
    "infinity": ("bert", poison(float("-inf")), "holds 1 numbers that are NaN or infinite; take a sound"),
    "NaN in the head": ("bert", poison(float("nan"), "cls.predictions.bias"), "cls.predictions.bias holds 1 numbers that are NaN"),
    "half a head": ("bert", drop("cls.predictions.bias"), "lacks cls.predictions.bias and 0 more weights; download or"),
    "untied without decoder": (
        "roberta",
        lambda f: (edit(f, tie_word_embeddings=False), rewrite(f, lambda state: untie(state, weight=False))),
        "lacks lm_head.decoder.weight and 0 more weights",
    ),
    "far deeper": ("bert", lambda f: edit(f, num_hidden_layers=9000), r"a model of [\d,]{10,} numbers, but its weights hold \d"),
    "huge vocabulary": ("bert", lambda f: edit(f, vocab_size=2**31 - 1), r"a model of [\d,]{10,} numbers, but its weights hold"),
    "index above": ("shards", names("../model/model.safetensors"), "names '../model/model.safetensors', which is not in"),
    "absolute index": ("bin shards", lambda f: put(f, INDEX, '{"weight_map": {"a": "/dev/zero"}}'), "names '/dev/zero', which is"),
    "link out": ("shards", move_away, "-00002-of-.*, which is not in its folder: put the file there, or take"),
    "list as bin": ("bin", lambda f: torch.save([torch.ones(3)], f / "pytorch_model.bin"), "holds no named tensors"),
    "lost weight": ("bert", drop("bert.embeddings.LayerNorm.bias"), "lacks bert.embeddings.LayerNorm.bias and 0 more"),
    "deeper": ("bert", lambda f: edit(f, num_hidden_layers=3), "lacks bert.encoder.layer.2.* and 15 more weights"),
    "wider": ("bert", lambda f: edit(f, intermediate_size=64), "intermediate.dense.bias is .52., .*config.json wants .64."),
}  # fmt: skip
CONFIG_REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "HTML": ("bert", lambda f: put(f, "config.json", HTML), "cannot load .*config.*is not a valid JSON file"),
    "empty": ("bert", lambda f: put(f, "config.json", ""), "cannot load"),
    "a list": ("bert", lambda f: put(f, "config.json", "[]"), "cannot load"),
    "no type": ("bert", lambda f: put(f, "config.json", '{"vocab_size": 211}'), "model type None is not supported; use"),
    "wrong type": ("bert", lambda f: edit(f, num_hidden_layers="two"), "cannot load"),
    "own code": ("bert", lambda f: edit(f, model_type="own", auto_map={"AutoConfig": "own.C"}), "model type 'own' is not"),
    "relu": ("bert", lambda f: edit(f, hidden_act="relu"), "activation 'relu' is not supported; use a checkpoint with"),
    "gelu_new": ("roberta", lambda f: edit(f, hidden_act="gelu_new"), "activation 'gelu_new' is not supported; use"),
    "relative": ("bert", lambda f: edit(f, position_embedding_type="relative_key"), "'relative_key' are not supported; use"),
    "decoder": ("bert", lambda f: edit(f, is_decoder=True), "decoders .* are not supported; use an encoder"),
    "cross attention": ("bert", lambda f: edit(f, add_cross_attention=True), "decoders .* are not supported; use an"),
    "quantised": ("bert", lambda f: edit(f, quantization_config={"quant_method": "gptq", "bits": 4}), "use the checkpoint"),
    "heads": ("bert", lambda f: edit(f, num_attention_heads=5), "width 24 is not divisible by 5 heads; change either"),
    **{
        f"{key} {value}": ("bert", partial(edit, **{key: value}), f"{key} is {re.escape(repr(value))}, not a |cannot load")
        for key, value in (
            ("num_hidden_layers", 10**9), ("num_attention_heads", 0), ("num_attention_heads", True), ("hidden_size", -24),
            ("num_hidden_layers", 2.5), ("vocab_size", 10**12), ("vocab_size", "211"), ("vocab_size", None),
            ("intermediate_size", 0), ("max_position_embeddings", [64]), ("layer_norm_eps", float("nan")),
            ("layer_norm_eps", float("inf")), ("layer_norm_eps", "1e-12"), ("layer_norm_eps", -1.0),
            ("initializer_range", float("nan")), ("pad_token_id", -3), ("pad_token_id", "0"), ("type_vocab_size", -1),
        )
    },
    "no types": ("bert", lambda f: edit(f, type_vocab_size=0), "type_vocab_size is 0, but every token has a type; take a sound"),
    "RoBERTa without padding": ("roberta", lambda f: edit(f, pad_token_id=None), "which is null; set it"),
    "padding beyond the table": ("bert", lambda f: edit(f, pad_token_id=999), "pad_token_id is 999, not a row of 211 tokens"),
}  # fmt: skip
TOKENIZER_REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "none": ("bert", without_tokenizer, "holds no tokenizer; put the model's tokenizer.json beside its config.json"),
    "none of RoBERTa": ("roberta", without_tokenizer, "holds no tokenizer; put the model's tokenizer.json beside"),
    "settings only": ("bert", lambda f: (f / "tokenizer.json").unlink(), "tokenizer of .*; put the model's tokenizer.json"),
    "cut": ("bert", lambda f: cut(f, "tokenizer.json", 500), r"cannot load the tokenizer of .*\(JSONDecodeError"),
    "empty": ("bert", lambda f: put(f, "tokenizer.json", ""), "cannot load the tokenizer of .*; put the model's"),
    "of another kind": ("bert", lambda f: put(f, "tokenizer.json", "{}"), "cannot load the tokenizer of"),
    "HTML": ("bert", lambda f: put(f, "tokenizer.json", HTML), "cannot load the tokenizer of"),
    "HTML as settings": ("bert", lambda f: put(f, "tokenizer_config.json", HTML), "cannot load the tokenizer of"),
    "slow": ("bert", slow, "is a BertJapaneseTokenizer, which has no tokenizer.json; take another model"),
    "without mask": (
        "bert",
        lambda f: word_tokenizer(("pad", "unk", "cls", "sep")).save_pretrained(f),
        "has no mask token; name it in tokenizer_config.json",
    ),
}  # fmt: skip


def changed(folders: dict[str, Path], kind: str, change: Callable[[Path], object], tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(folders[kind], folder)
    change(folder)
    return folder


def refusal(folder: Path, message: str) -> str:
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not (folder / "was run").exists()
    return str(caught.value)


@pytest.mark.parametrize("name", WEIGHTS_REFUSED)
def test_weights(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    kind, change, message = WEIGHTS_REFUSED[name]
    refusal(changed(folders, kind, change, tmp_path), message)


@pytest.mark.parametrize("name", [*CONFIG_REFUSED, *(f"tokenizer: {name}" for name in TOKENIZER_REFUSED)])
def test_configuration_and_tokenizer(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Whether or not the weights are to be read."""
    kind, change, message = (CONFIG_REFUSED | {f"tokenizer: {n}": row for n, row in TOKENIZER_REFUSED.items()})[name]
    folder = changed(folders, kind, change, tmp_path)
    words = refusal(folder, message)
    with pytest.raises(ValueError) as caught:
        shape(folder)
    assert str(caught.value) == words


CANARY = "from pathlib import Path\nPath({!r}).touch()\n"
AUTO_MAP = {
    "AutoConfig": "own.C",
    "AutoModel": "own.M",
    "AutoModelForMaskedLM": "own.M",
    "AutoTokenizer": ["own.T", "own.T"],
}
OWN_CODE: dict[str, Callable[[Path], object]] = {
    "model": lambda f: edit(f, auto_map=AUTO_MAP),
    "tokenizer": lambda f: edit(f, "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.T", "own.T"]}, tokenizer_class="T"),
    "unknown type": lambda f: edit(f, model_type="own", auto_map=AUTO_MAP),
    "another's": lambda f: edit(f, auto_map=dict.fromkeys(AUTO_MAP, f"{f.parent}/model--own.M")),
    "generation": lambda f: (edit(f, is_decoder=True), put(f, "custom_generate/generate.py", (f / "own.py").read_text())),
}  # fmt: skip


def read_with_answers(folders: list[Path], answers: Path) -> None:
    """In a process whose stdin says yes to all: everything that reads a model folder."""
    with answers.open() as said:
        os.dup2(said.fileno(), 0)
    sys.stdin = os.fdopen(0)
    for folder in folders:
        for read in (
            load,
            shape,
            require_encoder,
            load_tokenizer,
            lambda folder: load_classifier(folder, TASKS["rte"]),
        ):
            with suppress(ValueError):
                read(folder)
    unread = sys.stdin.read()
    (answers.parent / "unread").write_text(unread)


def test_the_code_of_a_folder_is_never_run(folders: dict[str, Path], tmp_path: Path) -> None:
    """And nobody is asked whether it may, though the answer would be yes."""
    made = []
    for name, change in OWN_CODE.items():
        folder = shutil.copytree(folders["bert"], tmp_path / name)
        (folder / "custom_generate").mkdir()
        put(folder, "own.py", CANARY.format(str(tmp_path / "was run")))
        change(folder)
        made.append(folder)
    (tmp_path / "answers").write_text("y\n" * 1000)
    process = processes.FORKS.Process(target=read_with_answers, args=(made, tmp_path / "answers"))
    process.start()
    process.join(300)
    assert process.exitcode == 0 and not (tmp_path / "was run").exists()
    assert (tmp_path / "unread").read_text() == "y\n" * 1000


@pytest.mark.parametrize("path", sorted(path for name in ("fastkd", "bench") for path in (ROOT / name).rglob("*.py")))
def test_every_call_of_transformers_forbids_code(path: Path) -> None:
    """Left out, it means that transformers asks."""
    calls = (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call))
    for call in calls:
        if not isinstance(call.func, ast.Attribute) or call.func.attr not in (
            "from_pretrained",
            "from_config",
            "pipeline",
        ):
            continue
        if ast.unparse(call.func) == "torch.nn.Embedding.from_pretrained":
            continue
        assert "trust_remote_code=False" in [ast.unparse(word) for word in call.keywords], ast.unparse(call)


def test_places_without_a_model(tmp_path: Path) -> None:
    GPT2Model(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9, bos_token_id=None, eos_token_id=None)).save_pretrained(
        tmp_path / "gpt2"
    )  # fmt: skip
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    refusal(tmp_path / "gpt2", "model type 'gpt2' is not supported; use one of bert, roberta, xlm-roberta, camembert")
    refusal(tmp_path / "empty", "holds no config.json and no finished run")
    refusal(tmp_path / "absent", "is no folder; name a hub id, a Hugging Face folder or a finished run")
    refusal(tmp_path / "a.safetensors", "is no folder; name a hub id, a Hugging Face folder or a finished run")
    with pytest.raises(ValueError, match=r"'no-such/model' .*--preset quickstart"):
        load("no-such/model")


def test_a_student_has_a_row_for_every_id(folders: dict[str, Path]) -> None:
    """The largest counts, not how many there are: ids may have gaps."""
    config, tokenizer = shape(folders["bert"])
    tokenizer.add_tokens(["more"])
    with pytest.raises(ValueError, match="the tokenizer has 212 tokens, the model 211; use the model's own"):
        student_config("1L-24H-4A", config, tokenizer)


def test_a_roberta_pads_by_its_own_id(folders: dict[str, Path]) -> None:
    config, tokenizer = shape(folders["roberta"])
    assert student_config("1L-24H-4A", config, tokenizer).position_offset == 2
    with pytest.raises(ValueError, match=r"pads by id 0, but config.json's pad_token_id, .* is 1; use the tokenizer"):
        student_config("1L-24H-4A", config, word_tokenizer())


def test_a_command_refuses_a_teacher_before_it_spends(
    folders: dict[str, Path], small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], shard_cache: Path
) -> None:
    """Positions, tokens and a tokenizer of another model, as --teacher and --tokenizer; nothing is tokenised."""
    few = write(tmp_path / "few", BertForMaskedLM, max_position_embeddings=24)
    rows = shutil.copytree(folders["bert"], tmp_path / "rows")
    word_tokenizer(extra=20).save_pretrained(rows)
    before = sorted(shard_cache.rglob("*"))
    capsys.readouterr()
    for teacher, tokenizer, words in (
        (few, folders["bert"], "--seq-length 32 is beyond the 24 positions of teacher"),
        (few, None, "--seq-length 32 is beyond the model's 24 positions"),
        (rows, None, "the tokenizer has 231 tokens, the model 211; use the model's own"),
        (folders["bert"], folders["roberta"], "has another tokenizer than the student; use one for both"),
    ):
        options = [*small, "--teacher", str(teacher), "--student", "1L-24H-4A", "--budget-tokens", "12000"]
        assert plan.main([*options, *(["--tokenizer", str(tokenizer)] if tokenizer else [])]) == 2
        error = capsys.readouterr().err
        assert words in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert sorted(shard_cache.rglob("*")) == before
