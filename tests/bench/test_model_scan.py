"""The scan of model families: what its words and its table say; docs/models.md prints it."""

import json

import pytest

from bench.model_families import FAMILIES, MULTIMODAL, tiny_config
from bench.model_scan import BEGIN, DOCUMENT, END, document_table, table, verdict
from bench.records import FOLDER

GOOD = {"family": "a", "refused": "", "logits": 0.0, "fused": 3e-6, "padded": 1e-6, "packed": 1e-6}
GOOD |= {"decoding": 4e-6, "export": 0.0}
GOOD |= dict.fromkeys(("dry_run", "check", "calibrate", "distill"), "yes")


@pytest.mark.parametrize(
    "changes, want",
    [
        ({}, "whole"),
        ({"packed": "batch.pack = true, but ..."}, "whole"),
        ({"calibrate": "it cannot decode"}, "some"),
        ({"padded": 0.1}, "wrong"),
        ({"export": float("nan")}, "wrong"),
        ({"refused": "a head with a bias"}, "refused"),
    ],
)
def test_a_verdict_is_the_worst_of_its_columns(changes, want):
    assert verdict(GOOD | changes) == want


def test_the_table_gives_numbers_and_the_reason_of_what_is_refused():
    rows = [GOOD, GOOD | {"family": "b", "decoding": "no cache for it"}]
    text = table([*rows, {"family": "c", "refused": "a head with a bias"}])
    assert "| a | 0 | 3e-06 | 1e-06 | 1e-06 | 4e-06 | yes | yes | 0 |" in text
    assert "| b | 0 | 3e-06 | 1e-06 | 1e-06 | no |" in text
    assert "- `b`, decoding: no cache for it" in text and "- `c`: a head with a bias" in text


def test_docs_models_prints_the_newest_record():
    made = {f: json.loads(f.read_text())["date"] for f in FOLDER.glob("*_model_scan_cpu.json")}
    newest = max(made, key=made.__getitem__)
    printed = DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert printed == document_table(json.loads(newest.read_text()), newest.name)


@pytest.mark.parametrize("family", [*FAMILIES, *MULTIMODAL])
def test_every_family_is_small_and_known_to_transformers(family):
    text = tiny_config(family).get_text_config()
    assert text.vocab_size == 512
