"""Tasks over published data sets: the same rows from a folder and from the hub, splits apart, errors in plain words."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_data import needs_real_data, real_data

from lori_nb.lab.tasks import Example, expand_tasks, get_task, rows_digest
from lori_nb.lab.tasks.folder import official_rows
from lori_nb.lab.tasks.official import _DATA_SETS, examples_from_hub, split_rows

GLUE = ("rte", "mrpc", "cola", "sst2", "stsb", "qnli")
HERE = (*GLUE, "gsm8k", "boolq")  # what the folder of real data holds
NAMES = (*HERE, "mnli", "qqp")
PAIRED = {"rte", "mrpc", "stsb", "qnli", "mnli", "qqp"}


def counts_in_readme(file: str) -> dict[str, tuple[int, dict[str, int]]]:
    """{part: (rows, {label: rows})} of the data set that holds ``file``, out of the folder's own table."""
    folder = file.rsplit("/", 1)[0]
    lines = (real_data() / "README.md").read_text(encoding="utf-8").splitlines()
    cell = next(line.split("|")[3] for line in lines if line.startswith(f"| {folder} |"))
    found = re.findall(r"([\w-]+) (\d+)(?: \(([^)]*)\))?(?:;|\s*$)", cell.strip())
    return {
        part: (int(rows), {k: int(n) for k, n in re.findall(r"(\w+):(\d+)", labels)}) for part, rows, labels in found
    }


@pytest.fixture
def from_real_data(monkeypatch):
    monkeypatch.setenv("LORI_NB_DATA", str(real_data()))


@needs_real_data
@pytest.mark.usefixtures("from_real_data")
class TestRealData:
    @pytest.mark.parametrize("part", ["train", "test"])
    @pytest.mark.parametrize("name", HERE)
    def test_counts_and_label_histograms_equal_the_readme(self, name, part):
        file = _DATA_SETS[name].file(part, real_data())
        rows = official_rows(name, part)
        count, histogram = counts_in_readme(file)[Path(file).stem]
        assert len(rows) == count
        has_classes = bool(get_task(name).labels or rows[0].choices)
        assert bool(histogram) == has_classes, "a task has classes exactly where the table counts them"
        if histogram:
            words = [row.answer.rpartition(" ")[2] for row in rows]
            by_word = set(histogram) <= set(words)
            assert Counter(words if by_word else (str(row.target) for row in rows)) == histogram

    @pytest.mark.parametrize("name", GLUE)
    def test_every_official_row_is_scored_once(self, name):
        rows = official_rows(name, "test")
        assert get_task(name).rows("test", 10**6) == list(rows)
        repeated = len(rows) - len({row.key for row in rows})
        assert repeated == {"cola": 4, "stsb": 2}.get(name, 0), "repeats of the official file itself count too"
        learned = [row.key for split in ("train", "tune") for row in get_task(name).rows(split, 10**6)]
        assert len(learned) == len(set(learned)), "no row is learned from twice an epoch"

    @pytest.mark.parametrize("name", HERE)
    def test_no_prompt_stands_in_two_splits_and_none_is_lost(self, name):
        task, whole = get_task(name), 10**6
        keys = {split: {row.key for row in task.rows(split, whole)} for split in ("train", "tune", "test")}
        assert not keys["train"] & keys["tune"]
        assert not (keys["train"] | keys["tune"]) & keys["test"]
        official = {row.key for part in ("train", "test") for row in official_rows(name, part)}
        lost = official - set.union(*keys.values())
        folded = {" ".join(key.casefold().split()) for key in keys["test"]}
        assert all(" ".join(key.casefold().split()) in folded for key in lost)
        # one in ten, give or take five standard deviations of a binomial share
        held = len(keys["train"]) + len(keys["tune"])
        assert abs(len(keys["tune"]) - held / 10) < 5 * (held * 0.09) ** 0.5

    @pytest.mark.parametrize(("name", "label"), [("cola", "CoLA"), ("stsb", "STS-B")])
    def test_repeats_between_official_parts_stay_in_test_only(self, name, label):
        defects = (real_data() / "README.md").read_text(encoding="utf-8").split("**Exact train/dev repeats**")[1]
        stated = int(re.search(rf"{label} (\d+)", defects)[1])
        train, test = ({row.key for row in official_rows(name, part)} for part in ("train", "test"))
        assert len(train & test) == stated > 0
        trained_on = {row.key for split in ("train", "tune") for row in get_task(name).rows(split, 10**6)}
        assert not trained_on & test
        assert train & test <= {row.key for row in get_task(name).rows("test", 10**6)}

    def test_first_training_rows_are_a_mixed_sample(self):
        # the first rows of the file are one source of CoLA; a prefix in hash order is spread over the file
        place = {row.key: at for at, row in enumerate(official_rows("cola", "train"))}
        places = [place[row.key] for row in get_task("cola").rows("train", 200)]
        # mean of 200 uniform places: standard error 0.289 / sqrt(200) = 0.0204 of the length; five of them
        assert abs(sum(places) / len(places) / len(place) - 0.5) < 5 * 0.0204
        assert places != sorted(places)

    def test_test_split_is_in_file_order_and_rows_are_the_same_each_time(self):
        assert get_task("rte").rows("test", 20) == list(official_rows("rte", "test")[:20])
        assert rows_digest(get_task("rte").rows("train", 50)) == rows_digest(get_task("rte").rows("train", 80)[:50])
        assert rows_digest(get_task("rte").rows("train", 50)) != rows_digest(get_task("rte").rows("tune", 50))

    def test_gsm8k_answers_are_the_solutions_and_targets_their_numbers(self):
        rows = [row for part in ("train", "test") for row in official_rows("gsm8k", part)]
        assert all(isinstance(row.target, int) and "####" in row.answer for row in rows)
        assert any(f"#### {row.target:,}" in row.answer for row in rows if row.target > 999), "commas are read"

    def test_no_quote_or_mark_swallows_rows(self):
        row = official_rows("mrpc", "train")[0]
        assert row.prompt.startswith("Amrozi accused his brother") and '"' in row.prompt and row.target == 1

    def test_an_unchanged_file_is_read_once(self):
        assert official_rows("sst2", "train") is official_rows("sst2", "train")


# Rows of our own in both schemas: (folder file's text, hub columns). Texts are invented; shapes are the published ones.
TSV_PAIR = 'index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\tentailment\n1\tA "b.\tC d.\tnot_entailment\n'
MRPC = (
    "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t5\t6\tHe ran .\tHe did run .\n0\t7\t8\tHe sat .\tShe ran .\n"
)
STSB = "index\tsentence1\tsentence2\tscore\n0\tA plane lands.\tA jet lands.\t3.800\n1\tA cat.\tA dog.\t1.267\n"
GSM8K = [{"question": "Two and two?", "answer": "2+2=4\n#### 4"}, {"question": "Much?", "answer": "It is\n#### -1,250"}]
INSTRUCTION = "Please answer the following question with true or false, question: {}?\n\nAnswer format: true/false"
BOOLQ = [
    {"instruction": INSTRUCTION.format("is ice cold"), "input": "", "output": "", "answer": "true"},
    {"instruction": INSTRUCTION.format("is fire wet"), "input": "", "output": "", "answer": "false"},
]
PAIRS = {"sentence1": ["It rains.", 'A "b.'], "sentence2": ["It is wet.", "C d."]}
IN_BOTH_SCHEMAS = {
    "rte": (TSV_PAIR, {**PAIRS, "label": [0, 1]}),
    "mrpc": (
        MRPC,
        {"sentence1": ["He ran .", "He sat ."], "sentence2": ["He did run .", "She ran ."], "label": [1, 0]},
    ),
    "cola": (
        "a1\t1\t\tIt rains.\na1\t0\t*\tRains it it.\n",
        {"sentence": ["It rains.", "Rains it it."], "label": [1, 0]},
    ),
    "sst2": ("sentence\tlabel\na fine film \t1\ndull \t0\n", {"sentence": ["a fine film ", "dull "], "label": [1, 0]}),
    "stsb": (
        STSB,
        {
            "sentence1": ["A plane lands.", "A cat."],
            "sentence2": ["A jet lands.", "A dog."],
            "label": [3.8, 1.267],
        },
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n0\tWho?\tA man.\tentailment\n1\tWhen?\tIn Rome.\tnot_entailment\n",
        {"question": ["Who?", "When?"], "sentence": ["A man.", "In Rome."], "label": [0, 1]},
    ),
    "mnli": (
        "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
        "0\ttravel\tIt rains.\tIt is wet.\tneutral\tentailment\n"
        "1\tfiction\tA b.\tC d.\tneutral\tcontradiction\n",
        {"premise": ["It rains.", "A b."], "hypothesis": ["It is wet.", "C d."], "label": [0, 2]},
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWho?\tWhich one?\t1\n1\t3\t4\tWhy?\t\t0\n",
        {"question1": ["Who?", "Why?"], "question2": ["Which one?", ""], "label": [1, 0]},
    ),
    "gsm8k": (
        "\n".join(map(json.dumps, GSM8K)),
        {key: [row[key] for row in GSM8K] for key in ("question", "answer")},
    ),
    "boolq": (
        json.dumps(BOOLQ),
        {"question": ["is ice cold", "is fire wet"], "answer": [True, False], "passage": ["Ice.", "Fire."]},
    ),
}
CLASS_NAMES = {
    "rte": ["entailment", "not_entailment"],
    "mrpc": ["not_equivalent", "equivalent"],
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "qnli": ["entailment", "not_entailment"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "qqp": ["not_duplicate", "duplicate"],
}


def hub_table(name: str) -> datasets.Dataset:
    """The rows above with the hub's column types: class labels, 32-bit scores."""
    table = datasets.Dataset.from_dict(IN_BOTH_SCHEMAS[name][1])
    types = {"stsb": datasets.Value("float32")}
    types |= {known: datasets.ClassLabel(names=words) for known, words in CLASS_NAMES.items()}
    return table.cast_column("label", types[name]) if name in types else table


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder with two invented rows in every file."""
    for name in NAMES:
        for part in ("train", "test"):
            path = tmp_path / _DATA_SETS[name].file(part)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(IN_BOTH_SCHEMAS[name][0], encoding="utf-8")
    monkeypatch.setenv("LORI_NB_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_hub_rows_equal_the_folder_rows(name, folder):
    from_hub = examples_from_hub(_DATA_SETS[name], hub_table(name).to_dict(), "hub")
    assert from_hub == official_rows(name, "train")
    assert from_hub[0] != from_hub[1]
    assert (from_hub[0].second is not None) == (name in PAIRED)


def test_rows_as_they_must_read(folder):
    assert official_rows("rte", "train")[1] == Example('A "b.', "not_entailment", second="C d.", target=1)
    assert official_rows("mrpc", "train")[0] == Example("He ran .", "equivalent", second="He did run .", target=1)
    assert official_rows("cola", "train")[1] == Example("Rains it it.", "unacceptable", target=0)
    assert official_rows("sst2", "train")[0] == Example("a fine film", "positive", target=1)
    assert official_rows("stsb", "train")[1] == Example("A cat.", "1.3", second="A dog.", target=1.267)
    assert official_rows("qnli", "train")[0] == Example("Who?", "entailment", second="A man.", target=0)
    assert official_rows("mnli", "train")[1] == Example("A b.", "contradiction", second="C d.", target=2)
    assert official_rows("qqp", "train")[1] == Example("Why?", "not_duplicate", second="", target=0)
    assert official_rows("gsm8k", "train")[1] == Example("Much?", "It is\n#### -1,250", target=-1250)
    choices = ("the correct answer is true", "the correct answer is false")
    wet = Example(INSTRUCTION.format("is fire wet"), choices[1], target=1, choices=choices)
    assert official_rows("boolq", "train")[1] == wet


def test_what_the_tasks_say_of_themselves():
    assert expand_tasks("glue") == GLUE
    official = {"rte": ["accuracy"], "mrpc": ["f1", "accuracy"], "cola": ["matthews"], "sst2": ["accuracy"]}
    official |= {"stsb": ["pearson", "spearman"], "qnli": ["accuracy"], "mnli": ["accuracy"], "qqp": ["accuracy", "f1"]}
    assert {name: [get_task(name).metric, *get_task(name).also] for name in official} == official
    assert {get_task(name).reads for name in official} == {"encoder"}
    assert _DATA_SETS["mnli"].hub_split("test") == "validation_matched", "the matched part"
    assert {get_task(name).reads for name in ("gsm8k", "boolq")} == {"decoder"}
    assert all(get_task(name).licence and len(get_task(name).source_digest) == 64 for name in NAMES)
    for name, words in CLASS_NAMES.items():
        assert get_task(name).labels == tuple(words)


def test_a_part_of_the_rows_stands_in_for_a_train_file_that_is_not_there(folder):
    whole = official_rows("qnli", "train")
    subset = folder / "glue_subset_10k/QNLI/train.json"
    subset.parent.mkdir(parents=True)
    rows = [{"text_a": r.prompt, "text_b": r.second, "label": r.answer} for r in whole]
    subset.write_text(json.dumps({"0": rows[1], "1": rows[0]}))
    assert official_rows("qnli", "train") == whole, "the official file comes first"
    (folder / "glue/QNLI/train.tsv").unlink()
    assert official_rows("qnli", "train") == whole[::-1], "in the order of the file"
    assert official_rows("qnli", "test") == whole, "the test part is never taken from a part of the rows"
    subset.unlink()
    with pytest.raises(FileNotFoundError, match="LORI_NB_DATA must hold the file glue/QNLI/train.tsv; found none at"):
        official_rows("qnli", "train")


def test_a_row_that_stands_twice_in_the_test_part_counts_twice(folder):
    path = folder / "glue/CoLA/dev.tsv"
    path.write_text(path.read_text() * 2)
    assert len(get_task("cola").rows("test", 10)) == 4
    path = folder / "glue/CoLA/train.tsv"
    path.write_text("a1\t1\t\tIt snows.\n" * 3)
    learned = [row for split in ("train", "tune") for row in split_rows(split, official_rows("cola", "train"), ())]
    assert len(learned) == 3
    split = "train" if split_rows("train", official_rows("cola", "train"), ()) else "tune"
    assert len(get_task("cola").rows(split, 10)) == 1


def test_an_edited_file_is_read_again(folder):
    path = folder / "glue/SST-2/train.tsv"
    before, changed_at = official_rows("sst2", "train"), path.stat().st_mtime_ns
    path.write_text(path.read_text().replace("dull", "dumb"))  # the size stays
    os.utime(path, ns=(changed_at + 10**9, changed_at + 10**9))
    assert [row.prompt for row in official_rows("sst2", "train")] == [before[0].prompt, "dumb"]
    path.write_text(path.read_text() + "so so \t0\n")
    os.utime(path, ns=(changed_at + 10**9, changed_at + 10**9))  # the time stays
    assert len(official_rows("sst2", "train")) == 3


WORDS = st.text(alphabet="abAB \t", min_size=1, max_size=4)
ROWS = st.lists(st.builds(Example, prompt=WORDS, answer=st.just("x")), max_size=30)


@given(train=ROWS, test=ROWS)
def test_splits_share_nothing_and_do_not_depend_on_order(train, test):
    def folded(rows):
        return {" ".join(row.prompt.casefold().split()) for row in rows}

    parts = {split: split_rows(split, train, test) for split in ("train", "tune", "test")}
    assert parts["test"] == test
    assert not folded(parts["train"]) & folded(parts["tune"])
    assert folded(parts["train"]) | folded(parts["tune"]) == folded(train) - folded(test)
    backwards = split_rows("train", train[::-1], test)
    assert sorted(row.prompt for row in backwards) == sorted(row.prompt for row in parts["train"])


BAD_FILES = {
    "missing column": ("rte", "index\tsentence1\tsentence2\n0\ta\tb\n", "row 1: column 'label' is required; found col"),
    "label outside": ("rte", TSV_PAIR + "2\ta\tb\tmaybe\n", "row 3: column 'label' must be one of entailment, not_ent"),
    "label of another kind": (
        "mrpc",
        MRPC.replace("\n0", "\n2"),
        "row 2: column 'Quality' must be one of 0, 1; found '2'",
    ),
    "fields short": (
        "rte",
        TSV_PAIR + "2\ta\n",
        "row 3: must have 4 fields (index, sentence1, sentence2, label); found 2",
    ),
    "blank text": ("sst2", "sentence\tlabel\n \t1\n", "row 1: column 'sentence' must be text that is not blank"),
    "no number": (
        "stsb",
        STSB.replace("1.267", "high"),
        "row 2: column 'score' must be a number from 0 to 5; found 'high'",
    ),
    "not finite": (
        "stsb",
        STSB.replace("1.267", "nan"),
        "row 2: column 'score' must be a number from 0 to 5; found 'nan'",
    ),
    "no final number": ("gsm8k", '{"question": "q?", "answer": "four"}', "row 1: column 'answer' must end in \"####\""),
    "truth value": (
        "boolq",
        json.dumps([{"instruction": INSTRUCTION, "answer": True}]),
        "column 'answer' must be one of true, false; found True",
    ),
    "list value": (
        "boolq",
        json.dumps([{"instruction": INSTRUCTION, "answer": []}]),
        "must be one of true, false; found []",
    ),
    "no format": ("boolq", '[{"instruction": "q", "answer": "true"}]', "must follow an instruction that ends in its"),
    "not a list": ("boolq", '{"a": 1}', "must hold a list of objects; found dict"),
    "not an object": ("gsm8k", "3", "row 1: must be an object of named fields; found int"),
    "not JSON": ("gsm8k", "{", "must be UTF-8 text in jsonl format; found "),
    "empty": ("cola", "", "must hold at least one row; found none"),
}


@pytest.mark.parametrize(("name", "text", "words"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named_with_row_and_column(name, text, words, folder):
    path = folder / _DATA_SETS[name].train_file
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        get_task(name).rows("train", 1)
    assert str(path) in str(caught.value)


def test_a_file_in_another_encoding_is_named(folder):
    (folder / "glue/RTE/train.tsv").write_bytes(TSV_PAIR.replace("b.", "é").encode("latin-1"))
    with pytest.raises(ValueError, match=r"train\.tsv must be UTF-8 text in tsv format; found 'utf-8' codec"):
        official_rows("rte", "train")


def test_missing_folder_file_name_and_part_are_named(folder, monkeypatch):
    (folder / "glue/RTE/dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="LORI_NB_DATA must hold the file glue/RTE/dev.tsv; found none at"):
        get_task("rte").rows("train", 1)
    with pytest.raises(ValueError, match="name must be one of advbench, arc_.*; found 'wnli'"):
        official_rows("wnli", "train")
    with pytest.raises(ValueError, match="part must be one of train, test; found 'tune'"):
        official_rows("rte", "tune")
    monkeypatch.setenv("LORI_NB_DATA", str(folder / "nowhere"))
    with pytest.raises(FileNotFoundError, match="LORI_NB_DATA must name a folder of data files; found .*nowhere"):
        official_rows("rte", "train")


@pytest.mark.parametrize(("label", "found"), [(2, "2"), (-1, "-1")])
def test_a_hub_label_outside_the_classes_is_named(label, found):
    table = {**IN_BOTH_SCHEMAS["rte"][1], "label": [0, label]}
    with pytest.raises(ValueError, match=f"glue rte, row 2: column 'label' must be one of entail.*; found {found}"):
        examples_from_hub(_DATA_SETS["rte"], table, "glue rte")


def test_a_missing_hub_column_is_named():
    with pytest.raises(ValueError, match="hub: column 'sentence2' is required; found columns sentence1, label"):
        examples_from_hub(_DATA_SETS["mrpc"], {"sentence1": ["a"], "label": [1]}, "hub")
