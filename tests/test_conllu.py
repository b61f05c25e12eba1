"""Treebanks: what is read of CoNLL-U, where each word's first sub-word is, and what is refused by file and line."""

import gzip
from pathlib import Path

import made_model
import pytest
from packed_text import word_tokenizer
from transformers import AutoTokenizer

from fastkd.probes import conllu, labelled
from fastkd.probes.conllu import UPOS, Sentence
from fastkd.probes.pos import sentences, tagged_text

TEXT = """\
# newdoc id = a
# text = Don't go to 10 000 places!
1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tDo\tdo\tAUX\tVB\t_\t3\taux\t_\t_
2\tn't\tnot\tPART\tRB\t_\t3\tadvmod\t_\t_
3\tgo\tgo\tVERB\tVB\t_\t0\troot\t_\t_
3.1\tgo\tgo\tVERB\tVB\t_\t_\t_\t0:x\t_
4\tto\tto\tADP\tIN\t_\t6\tcase\t_\t_
5\t10 000\t10 000\tNUM\tCD\t_\t6\tnummod\t_\t_
6\tplaces\tplace\tNOUN\tNNS\t_\t3\tobl\t_\tSpaceAfter=No
7\t!\t!\tPUNCT\t.\t_\t3\tpunct\t_\t_

# text = No.
1\tNo\tno\tINTJ\tUH\t_\t0\troot\t_\t_
2\t.\t.\tPUNCT\t.\t_\t1\tpunct\t_\t_
"""
READ = [
    Sentence(
        ("Do", "n't", "go", "to", "10 000", "places", "!"), ("AUX", "PART", "VERB", "ADP", "NUM", "NOUN", "PUNCT")
    ),
    Sentence(("No", "."), ("INTJ", "PUNCT")),
]


def row(number: object, form: str = "x", tag: str = "X") -> str:
    return f"{number}\t{form}\t_\t{tag}\t_\t_\t_\t_\t_\t_\n"


def write(path: Path, count: int) -> Path:
    """Sentences of one word each."""
    path.write_text("\n".join(row(1, f"w{i}") for i in range(count)))
    return path


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n"])
def test_words_and_their_parts_of_speech(ends: str, last: str, tmp_path: Path) -> None:
    data = (TEXT + last).replace("\n", ends).encode()
    (tmp_path / "a.conllu").write_bytes(data)
    (tmp_path / "b.conllu.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + data))
    assert conllu.read(tmp_path / "a.conllu") == conllu.read(tmp_path / "b.conllu.gz") == READ


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TEXT + row(3) + row(5), "t.conllu:17: word '5', where word 4 of the sentence comes next"),
        (TEXT + row(3).replace("_\n", "\n").replace("\t_\t\n", "\n"), "t.conllu:16: 8 columns, where CoNLL-U has 10"),
        ("\n" + row("one"), "t.conllu:2: word 'one', where word 1"),
        (row(1, " "), "t.conllu:1: word 1 has no form"),
        (row(1) + row(2, "y", "_"), "t.conllu:2: 'y' has the part of speech '_', which is none of ADJ, "),
        ("# text = nothing\n\n", "t.conllu holds no sentence in CoNLL-U"),
        ("", "t.conllu holds no sentence in CoNLL-U"),
        (row(1).encode() + b"2\t\xff\n", "t.conllu:2: not UTF-8"),
        (gzip.compress(TEXT.encode()), "t.conllu is compressed by gzip: name it 't.conllu.gz'"),
    ],
)
def test_a_damaged_file_is_refused_by_line(text: str | bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "t.conllu"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        conllu.read(path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_download_that_broke_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.conllu.gz"
    path.write_bytes(gzip.compress(TEXT.encode())[:-9])
    with pytest.raises(ValueError, match="is not a complete gzip file"):
        conllu.read(path)


def test_which_files_are_fitted_and_which_scored(tmp_path: Path) -> None:
    for name, count in (("dev", 3), ("test", 4), ("train", 5)):
        write(tmp_path / f"xx_y-ud-{name}.conllu", count)
    wanted, data = labelled.read(None, [tmp_path])
    assert wanted == ("tokens", "pos") and data.treebank and [*map(len, data.treebank)] == [3, 4]
    fit, test = sentences([tmp_path / "xx_y-ud-train.conllu"])  # of one file, each third sentence is scored
    assert [sentence.words for sentence in test] == [("w2",)] and len(fit) == 4
    (tmp_path / "zz-dev.conllu").write_text(TEXT)
    with pytest.raises(ValueError, match=r"names 4 CoNLL-U files .*, not one called …-dev.conllu"):
        labelled.read(None, [tmp_path])


def test_first_sub_words(made_teacher: Path) -> None:
    """A word is read at the first token that spells it; one that the tokenizer leaves nothing of is no item."""
    tokenizer = AutoTokenizer.from_pretrained(made_teacher)
    words = made_model.texts(1)[0].split()[:3]
    sentence = Sentence((words[0], "\u200d", f"{words[1]} {words[2]}", "."), ("X", "SYM", "NUM", "PUNCT"))
    fit, test = tagged_text(([sentence] * 6, [sentence]), tokenizer)
    pieces = [tokenizer.tokenize(word) for word in words]
    assert tokenizer.convert_ids_to_tokens(test.ids.tolist()) == [
        *pieces[0],
        *pieces[1],
        *pieces[2],
        *tokenizer.tokenize("."),
    ]
    assert test.rows.tolist() == [0, len(pieces[0]), len(test.ids) - 1]
    assert [UPOS[label] for label in test.labels] == ["X", "NUM", "PUNCT"]
    assert fit.sizes == [3] * 6 and fit.lengths.tolist() == [len(test.ids)] * 6
    assert fit.rows.tolist() == [row + i * len(test.ids) for i in range(6) for row in test.rows]


def test_too_few_sentences_are_refused() -> None:
    sentence = Sentence(("w1",), ("X",))
    with pytest.raises(
        ValueError, match="--probe-data gives 4 items in 4 texts, too few to fit: name a larger treebank"
    ):
        tagged_text(([sentence] * 4, [sentence]), word_tokenizer())
    with pytest.raises(ValueError, match="holds no sentence to score"):
        tagged_text(([sentence] * 9, []), word_tokenizer())
