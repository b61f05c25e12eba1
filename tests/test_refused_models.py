"""Model folders that cannot be used are refused in one line that names what is wrong, before anything is spent."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from given_model import SHARDED, WEIGHTS, edit, pickled, rewrite, untie, vocabulary, write
from packed_text import word_tokenizer
from transformers import BertForMaskedLM, GPT2Config, GPT2Model, RobertaForMaskedLM

from fastkd import plan
from fastkd.models.hf import load, shape
from fastkd.models.student import student_config

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
    "RoBERTa without padding": ("roberta", lambda f: edit(f, pad_token_id=None), "which is null; set it"),
    "padding beyond the table": ("bert", lambda f: edit(f, pad_token_id=999), "cannot load|pad_token_id"),
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
    if name == "padding beyond the table":  # nothing reads it where no weights are
        return
    with pytest.raises(ValueError) as caught:
        shape(folder)
    assert str(caught.value) == words


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
