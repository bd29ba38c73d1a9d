"""Files, folders and ids of the hub: the same rows whatever file they lie in. What is torn:
test_sources.py.
"""

import bz2
import csv
import gzip
import json
import lzma

import pytest

from reflux.trainer.config.data import SourceSection
from reflux.trainer.data.prompts import load_prompts
from reflux.trainer.data.sources import source_files

ROWS = [{"prompt": f"question {i}", "answer": str(i)} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))


def read(source, **options):
    return [
        (p.messages[0]["content"], p.answer) for p in load_prompts(SourceSection(source, **options))
    ]


WANTED = [(row["prompt"], row["answer"]) for row in ROWS]


def as_csv(path, separator):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"], delimiter=separator)
        writer.writeheader()
        writer.writerows(ROWS)


def test_every_kind_of_file_holds_the_same_rows(tmp_path):
    (tmp_path / "lines.jsonl").write_text(LINES)
    (tmp_path / "lines.json").write_text(LINES)
    (tmp_path / "array.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (tmp_path / "array.json.bz2").write_bytes(bz2.compress(LINES.encode()))
    (tmp_path / "lines.jsonl.xz").write_bytes(lzma.compress(LINES.encode()))
    as_csv(tmp_path / "table.csv", ",")
    as_csv(tmp_path / "table.tsv", "\t")
    for file in sorted(tmp_path.iterdir()):
        assert read(str(file)) == WANTED, file.name


@pytest.mark.parametrize(
    "answers",
    [
        ["42", "", "7"],  # pandas makes floats of them
        ["007", "012"],
        ["100000000000000000000001", "2"],
        ["1e3", "2.50"],
        ["NA", "None", "null", "nan"],
        ["True", "-0"],
    ],
    ids=str,
)
def test_answers_of_a_csv_file_are_its_cells(tmp_path, answers):
    for name in ("answer", "target"):
        lines = [f"prompt,{name},points", *(f"{i},{x},{i}" for i, x in enumerate(answers))]
        file = tmp_path / name / "train.csv"
        file.parent.mkdir()
        file.write_text("\n".join(lines) + "\n")
        for source in (file, file.parent):  # a folder is read by another door
            columns = {"answer": name, "prompt": "prompt"}
            prompts = load_prompts(SourceSection(str(source), columns=columns))
            assert [p.answer for p in prompts] == [x or None for x in answers]
            asked = [p.messages[0]["content"] for p in prompts]
            assert asked == [str(i) for i in range(len(answers))]
            assert [p.extra["points"] for p in prompts] == list(range(len(answers)))


def test_zst(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    file = tmp_path / "lines.jsonl.zst"
    file.write_bytes(zstandard.compress(LINES.encode()))
    assert read(str(file)) == WANTED


def test_zst_without_its_package_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    file = tmp_path / "lines.jsonl.zst"
    file.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"reading \.zst wants the package zstandard"):
        read(str(file))


def test_several_files_and_patterns_are_joined_in_order(tmp_path):
    for k, part in enumerate((ROWS[:2], ROWS[2:3], ROWS[3:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"part-{k}.jsonl").write_text(text)
    pattern = str(tmp_path / "part-*.jsonl")
    assert read(pattern) == WANTED and read(pattern, limit=3) == WANTED[:3]
    names = [str(tmp_path / f"part-{k}.jsonl") for k in (2, 0)]
    assert read(tuple(names)) == WANTED[3:] + WANTED[:2]
    assert load_prompts(SourceSection(pattern)).location(3).endswith("part-2.jsonl, line 1")
    assert [file.name for file in source_files(pattern)] == [f"part-{k}.jsonl" for k in range(3)]


def test_text_files_have_a_document_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("first\n\nsecond\n  \n")  # a blank line is no document
    prompts = load_prompts(SourceSection(str(tmp_path / "a.txt")))
    assert [(p.messages, p.response) for p in prompts] == [((), "first"), ((), "second")]


@pytest.mark.parametrize(
    "source, says",
    [
        ("{tmp}/nothing-*.jsonl", "no file matches this pattern"),
        (
            ("{tmp}/a.jsonl", "{tmp}/b.jsonl"),
            "b.jsonl: no such file; a list of sources holds files",
        ),
        (("{tmp}/a.jsonl", "{tmp}/a.csv"), "files of several kinds"),
        ("{tmp}/torn.json", "no data set that can be read"),
    ],
)
def test_what_cannot_be_read(tmp_path, source, says):
    (tmp_path / "a.jsonl").write_text(LINES)
    as_csv(tmp_path / "a.csv", ",")
    (tmp_path / "torn.json").write_text(json.dumps(ROWS)[:-20])
    texts = [source] if isinstance(source, str) else source
    filled = tuple(text.format(tmp=tmp_path) for text in texts)
    with pytest.raises(ValueError) as error:
        read(filled[0] if isinstance(source, str) else filled)
    assert says in str(error.value)


def test_an_id_of_the_hub_that_cannot_be_had(monkeypatch):
    """No network is asked: the answer of the hub's own client stands in for it."""
    import huggingface_hub

    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError) as error:
        read("someone/some-data")
    words = str(error.value)
    assert (
        "no route to host" in words and "--repo-type dataset --local-dir someone/some-data" in words
    )


def test_a_data_set_of_the_hub_is_asked_for_with_subset_revision_and_split(monkeypatch):
    import datasets
    import huggingface_hub

    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("someone/some-data", subset="main", revision="abc", split="test") == WANTED
    assert asked == [(("someone/some-data", "main"), {"revision": "abc"})]
    with pytest.raises(ValueError, match="no split 'train'.* There are: test"):
        read("someone/some-data")
