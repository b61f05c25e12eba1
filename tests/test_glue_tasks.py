"""GLUE's tasks: official layouts with their quirks, the hub's, bad files, task files, metrics."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from fastkd.glue.examples import read_examples
from fastkd.glue.metrics import METRICS, score
from fastkd.glue.tasks import GLUE, TASKS, choose_tasks, load_task

# One training, dev and test file a task as the release has them, and the rows they mean.
NO_LABEL = "index\tsentence\n0\tNo label here.\n"
SST2 = {"train.tsv": "sentence\tlabel\nhide new secretions \t0\nit 's \"good\t1\n", "test.tsv": NO_LABEL}
COLA = {
    "train.tsv": "gj04\t1\t\tOur friends won't buy this analysis.\nks08\t0\t*\tThey drank the pub \"dry.\n",
    "test.tsv": NO_LABEL,
}
MRPC = {
    "train.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    '1\t70\t71\tHe called " the witness " .\t" the witness .\r\n0\t72\t73\tA\u2028b\x85 c .\tD .\r\n',
    "test.tsv": "index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tOne .\tTwo .\n",
}
STSB_HEAD = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
STSB = {
    "train.tsv": f"{STSB_HEAD}\tscore\n"
    "0\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\tA plane.\tAn air plane.\t5.000\n"
    '1\tmain-news\theadlines\t2013\t7\thttp://a\thttp://b\tA "flute.\tA dog.\t0.250\n',
    "test.tsv": f"{STSB_HEAD}\n0\tg\tf\ty\t1\tn\tn\tA.\tB.\n",
}
QQP_HEAD = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
QQP = {
    "train.tsv": QQP_HEAD + "1\t2\t3\tHow is life?\tHow is it?\t1\n"
    '4\t5\t6\tWhat is\n"\tWas he real?\t0\n7\t8\t9\tWho?\t\t0\n',
    "test.tsv": "id\tquestion1\tquestion2\n0\tWho?\tWhy?\n",
}
MNLI_HEAD = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\t"
    "sentence1\tsentence2"
)
MNLI_ROW = "0\t3\t3n\tgovernment\t( A )\t( B )\t(ROOT)\t(ROOT)"
MNLI = {
    "train.tsv": f"{MNLI_HEAD}\tlabel1\tgold_label\n{MNLI_ROW}\tA b.\tC.\tneutral\tneutral\n"
    f"{MNLI_ROW}\tD.\tE.\tentailment\tcontradiction\n",
    "dev_matched.tsv": f"{MNLI_HEAD}\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n"
    f"{MNLI_ROW}\tA.\tB.\tneutral\tneutral\tneutral\tneutral\tneutral\tentailment\n",
    "test_matched.tsv": f"{MNLI_HEAD}\n{MNLI_ROW}\tA.\tB.\n",
}
QNLI = {
    "train.tsv": "index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tentailment\n1\tWhy?\tSo.\tnot_entailment\n",
    "test.tsv": "index\tquestion\tsentence\n0\tWho?\tHe.\n",
}
RTE = {
    "train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tNo.\tYes.\tnot_entailment\n1\tA.\tA.\tentailment\n",
    "test.tsv": "index\tsentence1\tsentence2\n0\tA.\tB.\n",
}
WNLI = {
    "train.tsv": "index\tsentence1\tsentence2\tlabel\n0\tI stuck a pin.\tIt had a hole.\t1\n1\tA.\tB.\t0\n",
    "test.tsv": "index\tsentence1\tsentence2\n0\tA.\tB.\n",
}
OFFICIAL = {
    "sst2": (SST2, (["hide new secretions ", "it 's \"good"],), [0, 1]),
    "cola": (COLA, (["Our friends won't buy this analysis.", 'They drank the pub "dry.'],), [1, 0]),
    "mrpc": (MRPC, (['He called " the witness " .', "A\u2028b\x85 c ."], ['" the witness .', "D ."]), [1, 0]),
    "stsb": (STSB, (["A plane.", 'A "flute.'], ["An air plane.", "A dog."]), [5.0, 0.25]),
    "qqp": (QQP, (["How is life?", "Who?"], ["How is it?", ""]), [1, 0]),
    "mnli": (MNLI, (["A b.", "D."], ["C.", "E."]), [1, 2]),
    "qnli": (QNLI, (["Who?", "Why?"], ["He.", "So."]), [0, 1]),
    "rte": (RTE, (["No.", "A."], ["Yes.", "A."]), [1, 0]),
    "wnli": (WNLI, (["I stuck a pin.", "A."], ["It had a hole.", "B."]), [1, 0]),
}


def write(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
    return folder.parent


@pytest.mark.parametrize("name", TASKS)
def test_official_layout(name: str, tmp_path: Path) -> None:
    files, texts, labels = OFFICIAL[name]
    task = TASKS[name]
    data = write(tmp_path / task.title, files)
    rows = read_examples(task, "train", data)
    assert (rows.texts, rows.labels) == (texts, labels)
    assert rows.broken == (2 if name == "qqp" else 0)
    test = read_examples(task, next(iter(task.test)), data)
    assert len(test) == 1 and test.labels == []


def test_every_task_has_an_official_file_here() -> None:
    assert set(OFFICIAL) == {task.name for task in GLUE}


def test_mnli_has_two_dev_sets_and_a_diagnostic_one(tmp_path: Path) -> None:
    data = write(tmp_path / "MNLI", MNLI)
    write(tmp_path / "diagnostic", {"diagnostic.tsv": "index\tsentence1\tsentence2\n0\tA.\tB.\n1\tC.\tD.\n"})
    assert read_examples(TASKS["mnli"], "dev_matched", data).labels == [0]
    assert len(read_examples(TASKS["mnli"], "diagnostic", data)) == 2
    with pytest.raises(ValueError, match=r"MNLI has no dev_mismatched\.tsv"):
        read_examples(TASKS["mnli"], "dev_mismatched", data)


@pytest.mark.parametrize("layout", ["jsonl", "parquet", "shards"])
def test_hub_columns_in_files_are_the_same_rows(layout: str, tmp_path: Path) -> None:
    official = read_examples(TASKS["rte"], "train", write(tmp_path / "tsv" / "RTE", RTE))
    records = [
        {"sentence1": "No.", "sentence2": "Yes.", "label": 1, "idx": 0},
        {"sentence1": "A.", "sentence2": "A.", "label": 0, "idx": 1},
    ]
    folder = tmp_path / "hub" / "rte"
    folder.mkdir(parents=True)
    if layout == "jsonl":
        (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    elif layout == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "train.parquet")
    else:
        for i, record in enumerate(records):
            name = f"train-{i:05}-of-00002.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), folder / name)
    rows = read_examples(TASKS["rte"], "train", folder.parent)
    assert rows.sha256 == official.sha256 and rows.labels == [1, 0]


def test_validation_is_the_hubs_name_of_dev(tmp_path: Path) -> None:
    data = write(tmp_path / "sst2", {"validation.jsonl": '{"sentence": "Good.", "label": "positive"}\n'})
    assert read_examples(TASKS["sst2"], "dev", data).labels == [1]


def test_entailment_is_class_0_but_in_wnli(tmp_path: Path) -> None:
    row = '{"sentence1": "A.", "sentence2": "B.", "label": "entailment"}\n'
    for name, label in (("rte", 0), ("wnli", 1)):
        assert read_examples(TASKS[name], "train", write(tmp_path / name, {"train.jsonl": row})).labels == [label]


def test_a_hub_data_set_through_datasets(tmp_path: Path) -> None:
    card = "---\nconfigs:\n- config_name: small\n  data_files:\n  - {split: fit, path: fit.jsonl}\n---\n"
    write(tmp_path / "set", {"README.md": card, "fit.jsonl": '{"q": "Who?", "kind": 1}\n{"q": "Why?", "kind": 0}\n'})
    row = (
        f'name = "trec"\ntexts = ["q"]\nlabel = "kind"\nlabels = ["why", "who"]\nmetrics = ["accuracy"]\n'
        f'hub = "{tmp_path / "set"}"\nconfig = "small"\ntrain = "fit"\ndev = "fit"\n'
    )
    (tmp_path / "trec.toml").write_text(row)
    rows = read_examples(load_task(tmp_path / "trec.toml"), "fit")
    assert (rows.texts, rows.labels) == ((["Who?", "Why?"],), [1, 0])


def test_an_unreachable_hub_names_the_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"cannot read nyu-mll/glue:rte:validation from the hub .*HF_HUB_OFFLINE.*--data FOLDER"
    ):
        read_examples(TASKS["rte"], "dev")


BAD = {
    "empty": (b"", r"train.tsv: empty"),
    "header only": (b"sentence\tlabel\n", r"train.tsv: no rows"),
    "wrong columns": (b"text\tlabel\nA\t1\n", r"train.tsv:1: no columns sentence, label .it has text, label"),
    "unknown label": (b"sentence\tlabel\nA\t1\nB\t2\n", r"train.tsv:3: label '2' is neither one of negative, positive"),
    "unlabelled": (b"sentence\tlabel\nA\t-1\n", r"train.tsv:2: label '-1'"),
    "not UTF-8": (b"sentence\tlabel\nA\t1\ncaf\xe9\t1\n", r"train.tsv:3: not UTF-8"),
    "too few": (b"sentence\tlabel\nA\t1\nB\n", r"train.tsv:3: 1 columns where there should be 2"),
    "too many": (b"sentence\tlabel\nA\tb\t1\n", r"train.tsv:2: 3 columns where there should be 2"),
    "blank line": (b"sentence\tlabel\nA\t1\n\nB\t0\n", r"train.tsv:3: 1 columns"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tsv(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_examples(TASKS["sst2"], "train", tmp_path)
    assert "\n" not in str(caught.value)


BAD_OTHERS = {
    "jsonl line": ("train.jsonl", '{"sentence": "A", "label": 1}\n{"sentence"\n', r"train.jsonl:2: not a JSON object"),
    "jsonl column": ("train.jsonl", '{"sentence": "A"}\n', r"train.jsonl:1: lacks one of the columns sentence, label"),
    "jsonl text": ("train.jsonl", '{"sentence": null, "label": 1}\n', r"train.jsonl:1: sentence is None, not a text"),
    "parquet": ("train.parquet", "no parquet", r"train.parquet: not a readable parquet file"),
    "csv": ("train.csv", 'sentence,label\n"A",1\n"B"x,0\n', r"train.csv:3: not a csv row"),
}


@pytest.mark.parametrize("case", BAD_OTHERS)
def test_bad_other_formats(case: str, tmp_path: Path) -> None:
    name, content, message = BAD_OTHERS[case]
    with pytest.raises(ValueError, match=message):
        read_examples(TASKS["sst2"], "train", write(tmp_path / "sst2", {name: content}))


@pytest.mark.parametrize("label", ["nan", "50", "-0.5"])
def test_a_score_must_be_a_number_of_its_range(label: str, tmp_path: Path) -> None:
    bad = STSB["train.tsv"].replace("0.250", label)
    with pytest.raises(ValueError, match=rf"train.tsv:3: label '{label}' is not a number from 0 to 5"):
        read_examples(TASKS["stsb"], "train", write(tmp_path / "STS-B", {"train.tsv": bad}))


def test_test_rows_are_numbered_by_their_place(tmp_path: Path) -> None:
    """Predictions are submitted by number: a row that is missing or moved would give the others' answers away."""
    data = write(tmp_path / "RTE", {"test.tsv": RTE["test.tsv"] + "2\tA.\tB.\n"})
    with pytest.raises(ValueError, match=r"test\.tsv:3: index 2 where 1 is due"):
        read_examples(TASKS["rte"], "test", data)
    write(tmp_path / "QQP", {"test.tsv": QQP["test.tsv"] + "1\tcut\n2\tWho?\tWhy?\n"})
    with pytest.raises(ValueError, match=r"test\.tsv:3: not the columns of the header"):
        read_examples(TASKS["qqp"], "test", tmp_path)


def test_a_missing_shard_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "sst2"
    folder.mkdir()
    table = pyarrow.table({"sentence": ["A"], "label": [1]})
    pyarrow.parquet.write_table(table, folder / "train-00000-of-00002.parquet")
    with pytest.raises(ValueError, match=r"00000-of-00002\.parquet: 1 shards of this split are there"):
        read_examples(TASKS["sst2"], "train", tmp_path)
    pyarrow.parquet.write_table(table, folder / "train-00001-of-00002.parquet")
    assert len(read_examples(TASKS["sst2"], "train", tmp_path)) == 2


def test_many_broken_rows_are_another_layout(tmp_path: Path) -> None:
    broken = QQP_HEAD + "1\t2\t3\tA?\tB?\t1\n" + "short\trow\n" * 9
    with pytest.raises(ValueError, match="9 rows have the wrong number of columns"):
        read_examples(TASKS["qqp"], "train", write(tmp_path / "QQP", {"train.tsv": broken}))


def test_two_formats_of_one_split_are_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "SST-2", {**SST2, "train.jsonl": '{"sentence": "A", "label": 1}\n'})
    with pytest.raises(ValueError, match=r"holds both train\.tsv and train\.jsonl"):
        read_examples(TASKS["sst2"], "train", data)


CSV_TASK = {
    "task.toml": 'name = "mood"\ntexts = ["said"]\nlabel = "mood"\nlabels = ["sad", "glad", "mad"]\n'
    'metrics = ["accuracy", "macro_f1"]\ntrain = "train.csv"\ndev = "dev.tsv"\n',
    "train.csv": 'said,mood\n"Oh, ""well""\nthen",glad\nNo,0\n',
    "dev.tsv": 'mood\tsaid\nmad\t"Grr\n',
}


def test_a_task_file_adds_a_task(tmp_path: Path) -> None:
    folder = write(tmp_path / "own", CSV_TASK) / "own"
    task = choose_tasks([], [folder / "task.toml"])["mood"]
    train = read_examples(task, task.train)
    assert (train.texts, train.labels) == ((['Oh, "well"\nthen', "No"],), [1, 0])
    assert read_examples(task, task.dev[0]).texts == (['"Grr'],)


STARS, MOODS, TRUTH = ("1", "2", "3"), ("sad", "glad", "mad"), ("false", "true")
LABELS = [  # names, a JSON value of the label's column, its class id or None where it is refused
    (STARS, 1, 0), (STARS, 3.0, 2), (STARS, "2", 1), (STARS, "2.0", 1), (STARS, " 2 ", 1), (STARS, "02", 1),
    (STARS, 0, None), (STARS, "0", None), (STARS, 1.5, None), (STARS, True, None), (STARS, None, None),
    (("01", "02"), 1, 0), (("01", "02"), "02", 1), (("01", "1"), "1", 1), (("01", "1"), "1.0", None),
    (("-1", "1"), -1, 0), (("0.5", "1"), 0.5, 0), (("0", "other"), 1, None), (("0", "other"), "other", 1),
    (MOODS, "glad", 1), (MOODS, 1, 1), (MOODS, 2.0, 2), (MOODS, "2", 2), (MOODS, 3, None), (MOODS, "Glad", None),
    (MOODS, True, None), (MOODS, None, None), (MOODS, "1_0", None), (MOODS, [1], None),
    (TRUTH, True, 1), (TRUTH, False, 0), (TRUTH, "true", 1), (TRUTH, None, None), (("No", "TRUE"), True, 1),
    (("sad", "Sad"), "Sad", 1), (("sad", "Sad"), "SAD", None), (("true", "True"), True, None),
    (("None", "some"), None, None), (("None", "some"), "None", 0), (("nan", "inf"), "nan", 0), (("nan", "inf"), "1", 1),
    ((), 1, 1.0), ((), "2.50", 2.5), ((), True, None), ((), "nan", None), ((), "1_0", None), ((), "1e999", None),
]  # fmt: skip


@pytest.mark.parametrize(("names", "value", "expected"), LABELS)
def test_what_a_label_means(names: tuple[str, ...], value: object, expected: float | None, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"said": "A", "mood": value}) + "\n")
    labels = f"labels = {json.dumps(names)}\n" if names else ""
    (tmp_path / "task.toml").write_text(
        f'name = "mood"\ntexts = ["said"]\nlabel = "mood"\n{labels}metrics = ["{"accuracy" if names else "pearson"}"]\n'
        'train = "train.jsonl"\ndev = "train.jsonl"\n'
    )
    task = load_task(tmp_path / "task.toml")
    if expected is None:
        with pytest.raises(ValueError, match=r"train\.jsonl:1: label .* is (not|neither)"):
            read_examples(task, task.train)
    else:
        assert read_examples(task, task.train).labels == [expected]


def test_stars_are_read_alike_from_every_format(tmp_path: Path) -> None:
    """csv writes 1 where pandas, with a gap in the column, writes 1.0; parquet holds integers or floats."""
    text = 'name = "stars"\ntexts = ["said"]\nlabel = "stars"\nlabels = ["1", "2"]\nmetrics = ["f1"]\n'
    (tmp_path / "task.toml").write_text(text + 'train = "a.csv"\ndev = ["b.csv", "c.parquet", "d.parquet"]\n')
    (tmp_path / "a.csv").write_text("said,stars\nA,1\nB,2\n")
    (tmp_path / "b.csv").write_text("said,stars\nA,1.0\nB,2.0\n")
    pyarrow.parquet.write_table(pyarrow.table({"said": ["A", "B"], "stars": [1, 2]}), tmp_path / "c.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"said": ["A", "B"], "stars": [1.0, 2.0]}), tmp_path / "d.parquet")
    task = load_task(tmp_path / "task.toml")
    assert {tuple(read_examples(task, split).labels) for split in (task.train, *task.dev)} == {(0, 1)}


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    long = "word " * 60_000
    folder = write(tmp_path / "own", {**CSV_TASK, "train.csv": f"said,mood\n{long},glad\n"}) / "own"
    task = load_task(folder / "task.toml")
    assert read_examples(task, task.train).texts == ([long],)


BAD_TASKS = {
    "a class twice": (CSV_TASK["task.toml"].replace("glad", "sad"), "labels names a class twice: sad, sad, mad"),
    "no TOML": ("name =", "not a readable TOML file"),
    "missing key": ('name = "x"', "lacks 'texts'"),
    "unknown key": (CSV_TASK["task.toml"] + 'metric = "f1"\n', "unknown key 'metric'"),
    "a task of GLUE": (CSV_TASK["task.toml"].replace("mood", "rte", 1), "'rte' is a task of GLUE"),
    "three texts": (CSV_TASK["task.toml"].replace('["said"]', '["a", "b", "c"]'), "one or two columns, not 3"),
    "kind": (CSV_TASK["task.toml"].replace('"train.csv"', "3"), "train must be a string, not 3"),
    "metric": (CSV_TASK["task.toml"].replace("macro_f1", "pearson"), "metrics of classes are .*, not 'pearson'"),
    "f1": (CSV_TASK["task.toml"].replace("macro_f1", "f1"), "use macro_f1 for 3"),
    "name of a path": (CSV_TASK["task.toml"].replace("mood", "../mood", 1), "'../mood' cannot name files"),
    "name of a key": (CSV_TASK["task.toml"].replace("mood", "average", 1), "'average' cannot name files"),
    "test that is train": (CSV_TASK["task.toml"] + 'test = "train.csv"\n', "test 'train.csv' is train or dev too"),
}


@pytest.mark.parametrize("case", BAD_TASKS)
def test_bad_task_files(case: str, tmp_path: Path) -> None:
    content, message = BAD_TASKS[case]
    (tmp_path / "task.toml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path / "task.toml")


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown task 'sst': choose from cola, sst2"):
        choose_tasks(["sst"], [])
    folder = write(tmp_path / "own", {"task.toml": CSV_TASK["task.toml"]}) / "own"
    task = load_task(folder / "task.toml")
    with pytest.raises(ValueError, match=r"train\.csv is not a file"):
        read_examples(task, task.train)


ORACLES = {
    "accuracy": sklearn.metrics.accuracy_score,
    "f1": lambda y, p: sklearn.metrics.f1_score(y, p, zero_division=0),
    "macro_f1": lambda y, p: sklearn.metrics.f1_score(y, p, average="macro", zero_division=0),
    "matthews": sklearn.metrics.matthews_corrcoef,
    "pearson": lambda y, p: scipy.stats.pearsonr(y, p).statistic,
    "spearman": lambda y, p: scipy.stats.spearmanr(y, p).statistic,
}


@pytest.mark.filterwarnings("ignore:.*(onstant|single label|not defined)")
@pytest.mark.parametrize("name", METRICS)
@given(pairs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40))
def test_metrics_equal_their_sources(name: str, pairs: list[tuple[int, int]]) -> None:
    labels, predictions = (np.array(values) for values in zip(*pairs, strict=True))
    expected = ORACLES[name](labels, predictions)
    assert METRICS[name](labels, predictions) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    scored = score([name], labels, predictions)[name]
    assert scored == pytest.approx(0.0 if math.isnan(expected) else 100 * expected)


def test_metrics_by_hand() -> None:
    labels, predictions = np.array([1, 1, 1, 0, 0]), np.array([1, 1, 0, 1, 0])
    found = score(["accuracy", "f1", "matthews"], labels, predictions)
    # 2 true positives, 1 false negative, 1 false positive, 1 true negative
    assert found == pytest.approx(
        {"accuracy": 60, "f1": 200 / 3, "matthews": 100 * (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)}
    )


@pytest.mark.parametrize("constant", [0, 1])
def test_one_class_only_scores_without_a_warning(constant: int) -> None:
    labels, predictions = np.array([0, 1, 1]), np.full(3, constant)
    found = score(["accuracy", "f1", "matthews"], labels, predictions)
    assert found["matthews"] == 0 and found["f1"] == pytest.approx(80 if constant else 0)
    assert score(["pearson", "spearman"], labels.astype(float), predictions.astype(float)) == {
        "pearson": 0,
        "spearman": 0,
    }
