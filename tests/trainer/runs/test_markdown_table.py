import json

from reflux.trainer.runs.markdown_table import (
    mean_and_spread,
    plain,
    points,
    score,
    table,
    write_whole,
)
from reflux.trainer.runs.stats import over_seeds


def test_numbers_as_reports_write_them():
    several, one, none = (over_seeds(v)._asdict() for v in ([0.1, 0.3], [0.25], []))
    assert [mean_and_spread(e) for e in (several, one, none)] == ["0.200 +- 0.141", "0.250", ""]
    assert [points(e) for e in (several, one, none)] == ["+20.0 +- 14.1", "+25.0", ""]
    assert (
        score({"mean": 0.5, "low": 0.25, "high": 1.0}) == "0.50 [0.25, 1.00]" and score(None) == ""
    )
    assert table(("a", "b"), [(1, "x"), (2, "")]) == "| a | b |\n|---|---|\n| 1 | x |\n| 2 |  |"


def test_json_without_nan():
    assert (
        json.dumps(plain({"a": (1.0, float("nan"), [float("inf"), "x"])}))
        == '{"a": [1.0, null, [null, "x"]]}'
    )


def test_a_file_is_replaced_whole(tmp_path):
    (tmp_path / "f").write_text("old")
    write_whole(tmp_path / "f", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "new"
