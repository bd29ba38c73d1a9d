import struct

from reflux.trainer.runs.plotting import plot_all


def test_without_anything_to_draw_nothing_is_written(tmp_path):
    assert plot_all(tmp_path, [], {"students": {}, "teachers": {}}) == {} and not list(
        tmp_path.iterdir()
    )


def test_a_student_table_alone_gives_one_picture(tmp_path):
    cell = {"sampled": {"mean": 0.5, "std": 0.1, "n": 2}}
    made = plot_all(
        tmp_path,
        [],
        {"students": {"kd": {"original": cell}}, "teachers": {"original": {"styles": {}}}},
    )
    assert (
        list(made) == ["students.png"]
        and (tmp_path / "students.png").read_bytes()[:4] == b"\x89PNG"
    )


def test_many_attacks_are_wrapped(tmp_path):
    """Twenty attacks as three rows of bars, not as one that nobody can read."""
    cell = {"sampled": {"mean": 0.5, "std": 0.1, "n": 2}}
    size = {}
    for count in (7, 20):
        plot_all(
            tmp_path,
            [],
            {
                "students": {f"a{i}": {"original": cell} for i in range(count)},
                "teachers": {"original": {"styles": {}}},
            },
        )
        size[count] = struct.unpack(">II", (tmp_path / "students.png").read_bytes()[16:24])
    assert size[20][0] < 1.2 * size[7][0] and 2.5 < size[20][1] / size[7][1] < 3.6
