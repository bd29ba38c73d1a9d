"""What a matrix says on the way: pace, time left, accuracies, one line an end, a live table."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from reflux.trainer.runs.cell_progress import (
    CellProgress,
    Cells,
    Grid,
    Item,
    accuracy,
    last_lines,
    show_cells,
    steps_done,
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def write_log(folder: Path, steps: int = 0, total: int = 10, sampled: float | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict] = [{"schema": 1, "config": {"steps": total}}]
    lines += [{"step": i, "loss": 1.0} for i in range(1, steps + 1)]
    if sampled is not None:
        lines.append({"event": "eval", "step": steps, "eval/greedy": 0.1, "eval/sampled": sampled})
    (folder / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def world(folder: Path, clock: Clock) -> Cells:
    items = [Item("slow", folder / "slow", 90.0), Item("fast", folder / "fast", 10.0)]
    return Cells([*items, Item("last", folder / "last", 100.0)], set(), clock)


def test_steps_of_an_earlier_process_are_no_pace(tmp_path):
    """Half of `slow` was done before: 45 of its 90 in 20 s, and 110 are left."""
    write_log(tmp_path / "slow", steps=5)
    clock = Clock()
    cells = world(tmp_path, clock)
    cells.start("slow")
    clock.now += 20
    write_log(tmp_path / "slow", steps=10)
    assert cells.seconds_left() == pytest.approx(110 * 20 / 45)
    cells.end("slow", True)
    assert cells.seconds_left() == pytest.approx(110 * 20 / 45)


def test_the_time_left_follows_the_pace_of_this_machine(tmp_path):
    clock = Clock()
    cells = world(tmp_path, clock)
    assert cells.seconds_left() is None and cells.left() == "", "nothing is known yet"
    cells.start("slow")
    cells.start("fast")
    clock.now += 20
    cells.end("fast", True)
    assert cells.took == {"fast": 20}
    # 10 of 200 in 20 s
    assert cells.seconds_left() == pytest.approx(190 * 2)
    write_log(tmp_path / "slow", steps=5)
    assert cells.fraction("slow") == 0.5
    assert cells.seconds_left() == pytest.approx((200 - 55) * 20 / 55)
    cells.end("slow", False)
    assert cells.failed == {"slow"} and cells.seconds_left() == pytest.approx(100 * 20 / 100)


def test_a_first_short_cell_says_nothing_about_the_time_left(tmp_path):
    """Its seconds are those of starting Python, hardly those of its work."""
    clock = Clock()
    items = [Item("world", tmp_path / "w", 3.0), Item("all", tmp_path / "a", 700.0)]
    cells = Cells(items, set(), clock)
    cells.start("world")
    clock.now += 14
    cells.end("world", True)
    assert cells.seconds_left() is None and cells.left() == ""
    cells.start("all")
    clock.now += 100
    write_log(tmp_path / "a", steps=1)
    assert cells.seconds_left() == pytest.approx(630 * 114 / 73)


def test_cells_of_an_earlier_start_do_not_count_as_pace(tmp_path):
    clock = Clock()
    cells = Cells(world(tmp_path, clock).items, {"slow"}, clock)
    cells.start("fast")
    clock.now += 30
    cells.end("fast", True)
    assert cells.left() == "; about 5m 00s left"


def test_a_log_is_read_while_it_is_written(tmp_path):
    assert last_lines(tmp_path / "no.jsonl") == [] and steps_done(tmp_path) == (0, 0)
    write_log(tmp_path, steps=3, total=7)
    with open(tmp_path / "run.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert steps_done(tmp_path) == (3, 7) and accuracy(tmp_path) is None
    write_log(tmp_path, steps=3000, total=3000, sampled=0.25)
    assert steps_done(tmp_path) == (3000, 3000) and accuracy(tmp_path) == 0.25


def grid_world(folder: Path) -> tuple[Cells, Grid]:
    items = [
        Item(f"{a}-{t}@{s}", folder / f"{a}-{t}-{s}", labels={"attack": a, "teacher": t})
        for a in ("text", "logits")
        for t in ("original", "undistillable")
        for s in (0, 1)
    ]
    cells = Cells([Item("world", folder / "world"), *items], set(), Clock())
    return cells, Grid(cells, ("attack", "teacher"))


def test_a_row_is_said_once_it_is_complete_as_the_mean_over_seeds(tmp_path):
    cells, grid = grid_world(tmp_path)
    assert grid.rows == ["text", "logits"] and grid.columns == ["original", "undistillable"]
    said = []
    for value, item in enumerate(cells.items[:5]):
        write_log(item.folder, sampled=value / 10)
        cells.end(item.name, True)
        said.append(grid.completed_by(item))
    assert said == ["", "", "", "", "text: original 0.150, undistillable 0.350"]
    assert grid.values("logits") == [[], []]


def test_a_failed_cell_leaves_its_row_open(tmp_path):
    cells, grid = grid_world(tmp_path)
    for item in cells.items[1:5]:
        cells.end(item.name, item.name != "text-original@1")
    assert all(not grid.completed_by(item) for item in cells.items)


def test_elsewhere_every_end_is_a_line(tmp_path):
    out, items = io.StringIO(), world(tmp_path, Clock()).items
    said = [Item("fast", tmp_path / "fast", 10.0, says="learns"), items[0], items[2]]
    console = Console(file=out, soft_wrap=True)
    with show_cells(said, done=["last"], console=console) as show:
        show.started("fast")
        write_log(tmp_path / "fast", steps=10, sampled=0.5)
        show.ended("fast", "done")
        show.said("slow: waits")
        show.ended("slow", "failed (exit 1)", succeeded=False)
    lines = out.getvalue().splitlines()
    assert lines[0] == "fast: learns"
    assert lines[1].startswith("[2/3] fast: done, accuracy 0.500, after 0 s; about ")
    assert lines[2:] == ["[2/3] slow: waits", "[2/3] slow: failed (exit 1) after 0 s"]


def test_a_terminal_shows_the_table_and_what_runs(tmp_path):
    out = io.StringIO()
    cells, grid = grid_world(tmp_path)
    console = Console(file=out, width=100, height=30)
    shown = CellProgress(cells, grid, console)
    for item in cells.items[:3]:
        write_log(item.folder, sampled=0.25)
        cells.end(item.name, True)
    write_log(tmp_path / "logits-original-0", steps=4)
    cells.start("logits-original@0")
    console.print(shown)
    text = out.getvalue()
    assert "accuracy by attack" in text and "undistillable" in text and "0.250" in text
    assert "3 of 9 done" in text and "logits-original@0" in text and "step 4 of 10" in text
    small = Console(file=(less := io.StringIO()), width=100, height=6)
    small.print(CellProgress(cells, grid, small))
    assert "accuracy by" not in less.getvalue() and "3 of 9 done" in less.getvalue()


def test_a_live_table_ends_with_its_last_state(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, width=100, height=30)
    with show_cells([Item("a", tmp_path / "a")], console=console) as show:
        show.started("a")
        show.ended("a", "done")
    assert "[1/1] a: done after 0 s" in out.getvalue() and "1 of 1 done" in out.getvalue()
