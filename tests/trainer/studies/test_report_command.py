"""What writes reports says in a sentence what it wants."""

import pytest

from reflux.trainer.studies.report_command import print_report


def refused(capsys, *words, write=str):
    with pytest.raises(SystemExit) as ended:
        print_report("toy", write, words)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_the_report_of_a_folder_is_printed(tmp_path, capsys):
    (tmp_path / "matrix.json").touch()
    assert print_report("toy", lambda folder: f"of {folder.name}", [str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"of {tmp_path.name}\n"


def test_what_is_no_folder_of_a_matrix_is_refused(tmp_path, capsys):
    assert "no matrix.json there; want the folder of a matrix" in refused(capsys, str(tmp_path))
    assert "toy" in refused(capsys)


def test_a_matrix_with_nothing_to_report_is_refused_in_words(tmp_path, capsys):
    (tmp_path / "matrix.json").touch()

    def write(folder):
        raise ValueError(f"{folder}: no finished run")

    assert "error: " in (said := refused(capsys, str(tmp_path), write=write))
    assert "no finished run" in said and "Traceback" not in said
