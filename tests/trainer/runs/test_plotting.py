import struct

from reflux.trainer.runs.plotting import panels, save_figure


def test_a_grid_of_panels_in_a_file(tmp_path):
    figure, axes = panels(3, 2, width=2.0, height=1.0)
    assert axes.shape == (2, 3) and tuple(figure.get_size_inches()) == (6.0, 2.0)
    axes[1, 2].plot([0, 1], [0, 1])
    save_figure(figure, tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:4] == b"\x89PNG" and 1.5 < width / height < 4


def test_no_figure_is_left_open():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    panels(1)
    assert pyplot.get_fignums() == before
