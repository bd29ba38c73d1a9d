"""The pages' tables are the records' numbers, with intervals over seeds."""

import json
import re
from pathlib import Path

import pytest

from bench.records import FOLDER
from bench.report_record import Record, read_record
from bench.tables import BLOCK, BLOCKS, MINIATURE, PAGES, RECORD, fill, headline, main, students

ROOT = Path(__file__).parents[2]
ON_PAGES = {
    m[2]: m[0] for page in PAGES for m in BLOCK.finditer((ROOT / page).read_text(encoding="utf-8"))
}


@pytest.fixture(scope="module")
def record():
    return read_record(RECORD)


def test_the_pages_hold_what_the_records_say():
    found = [m[2] for page in PAGES for m in BLOCK.finditer((ROOT / page).read_text())]
    assert sorted(found) == sorted(BLOCKS)
    for page in PAGES:
        text = (ROOT / page).read_text()
        assert text.count("<!-- bench.tables ") == len(BLOCK.findall(text))
        assert fill(text) == text, f"{page}: --write it"
    assert main(["--check"]) == 0


def test_no_other_page_has_a_block():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "bench").glob("*.md")]
    found = {str(p.relative_to(ROOT)) for p in pages if BLOCK.search(p.read_text())}
    assert found == set(PAGES)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_changed_digit_of_any_row_is_found_and_mended(name, tmp_path, capsys):
    page, right = tmp_path / "page.md", ON_PAGES[name]
    lines = right.splitlines()
    for i, line in enumerate(lines):
        has_numbers = line.startswith(("| ", "At its worst"))
        places = [m.start() for m in re.finditer(r"\d", line)] if has_numbers else []
        if not places:
            continue
        at = places[-1]
        wrong = f"{line[:at]}{(int(line[at]) + 1) % 10}{line[at + 1 :]}"
        page.write_text("\n".join([*lines[:i], wrong, *lines[i + 1 :]]))
        assert main(["--check", str(page)]) == 1
        assert f"{page}: {name} differs from its record" in capsys.readouterr().out
    assert main(["--write", str(page)]) == 0 == main(["--check", str(page)])
    assert page.read_text() == right


def test_a_block_without_a_table_is_named(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- bench.tables techers -->\n| a |\n<!-- end -->\n")
    with pytest.raises(ValueError, match="no block techers; there are teachers, students"):
        main(["--check", str(page)])


def test_a_row_by_hand(record):
    line = next(x for x in students(record).splitlines() if "`seq_kd`" in x)
    assert "0.033 ± 0.054 (-85% [-100%, -27%]) | inconclusive |" in line


def test_no_arm_is_left_out(record):
    for name in ("students", "diagnoses", "defences", "ablations", "teachers"):
        block = BLOCKS[name].compute()
        assert "eta = 0" in block and "nan" not in block
    assert "not run" in students(record)


def test_the_mean_over_attacks_is_that_of_the_bounded_ones(record):
    """stronger_start has a ratio of 7.17 and no bound; with it the mean was 3.26."""
    rows = headline(record).splitlines()[2:]
    which = "without a bounded interval: `cross_tokenizer`, `cross_class`, `stronger_start` |"
    assert all(row.endswith(f"| 22, n = 3 seeds each; 19 of 22 bounded; {which}") for row in rows)
    assert [row.split(" | ")[2] for row in rows] == ["0.28", "3.09"]


def test_one_seed_bounds_no_attack(record):
    runs = [r for r in record.report["runs"] if r["seed"] == record.rows[0]["seed"]]
    rows = headline(Record({"report": record.report | {"runs": runs}})).splitlines()[2:]
    assert all(row.endswith("n = 1 seeds each; no bounded interval |") for row in rows)


def test_another_report_of_the_miniature_is_printed_alone(tmp_path, capsys):
    assert main([str(FOLDER / RECORD)]) == 0
    text = capsys.readouterr().out
    names = re.findall(r"^(\w+)\n\n(?:\||At its worst)", text, re.M)
    assert names == [draw.__name__ for draw in MINIATURE]
    moved = json.loads((FOLDER / RECORD).read_text())
    of_original = {"role": "teacher", "teacher": "original"}
    for row in moved["report"]["runs"]:
        if of_original.items() <= row.items():
            row["sampled"] = 0.5
    (tmp_path / "record.json").write_text(json.dumps(moved))
    assert main([str(tmp_path / "record.json")]) == 0
    assert "| original | 0.500 ± 0.000 |" in capsys.readouterr().out
