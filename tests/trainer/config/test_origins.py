"""Where values came from: the source of every option, who is to blame, and the notes of errors."""

import pytest

from reflux.trainer.config.loader import as_table, load, load_over, to_toml
from reflux.trainer.config.origins import (
    blamed,
    leaves,
    mentions,
    origin_notes,
    source_of,
    with_origins,
)

MINIMAL = (
    'phase = "distill"\nfolder = "r"\nmodel.path = "m"\nteacher.path = "t"\ndata.source = "d"\n'
)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "base.toml").write_text(MINIMAL + "steps = 4\n[optim]\nlr = 1.0\neps = 0.5\n")
    (tmp_path / "x.toml").write_text('base = "base.toml"\n[optim]\nlr = 2.0\n')
    return tmp_path


def test_every_option_that_is_set_knows_its_last_source(files):
    cfg = load(files / "x.toml", ("steps=5", "training.seq_len=8"))
    base, top = str(files / "base.toml"), str(files / "x.toml")
    assert source_of(cfg, "optim.eps") == base and source_of(cfg, "optim.lr") == top
    assert source_of(cfg, "steps") == "--set steps=5" and source_of(cfg, "seed") == ""
    assert source_of(cfg, "training") == "--set training.seq_len=8"
    assert source_of(cfg, "optim") == f"{top} and {base}"
    assert (
        str(blamed(cfg, ["optim.lr"], "no")) == f"{top}: no"
        and str(blamed(cfg, ["seed"], "no")) == "no"
    )


def test_origins_are_no_part_of_the_configuration(files):
    cfg = load(files / "x.toml")
    assert cfg == load(files / "x.toml", ("steps=4",))
    assert "origins" not in as_table(cfg) and "origins" not in to_toml(cfg) + repr(cfg)
    with pytest.raises(ValueError, match="unknown key origins"):
        load(files / "x.toml", ("origins.a=1",))


@pytest.mark.parametrize(
    "in_base, in_top, sets, source",
    [
        ("optim.lr = -1.0", "", (), "base.toml"),
        ("", "optim.lr = -1.0", (), "top.toml"),
        ("", "", ("seed=3", "optim.lr=-1.0"), "--set optim.lr=-1.0"),
        ("optim.lr = -1.0", "optim.lr = 1.0", ("optim.lr=-2.0",), "--set optim.lr=-2.0"),
        ('lora.targets = ["q"]', "", (), "base.toml"),  # wants a rank
        ("lora.rank = 2", 'lora.rank = 0\nlora.targets = ["q"]', (), "top.toml"),
        ('distill.objective = "kl"', "teacher.path = ''", (), "top.toml"),  # is missing
    ],
)
def test_the_file_that_holds_a_wrong_value_is_named(tmp_path, in_base, in_top, sets, source):
    (tmp_path / "base.toml").write_text(MINIMAL + in_base)
    (tmp_path / "top.toml").write_text(f'base = "base.toml"\n{in_top}')
    with pytest.raises(ValueError) as error:
        load(tmp_path / "top.toml", sets)
    where = source if source.startswith("--set") else tmp_path / source
    assert str(error.value).startswith(f"{where}: ")


def test_what_is_missing_is_missing_in_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "base.toml").write_text('phase = "distill"\nmodel.path = "m"\n')
    (tmp_path / "top.toml").write_text('base = "base.toml"\nfolder = "r"\n')
    with pytest.raises(ValueError, match=r"top.toml: teacher.path is missing"):
        load(tmp_path / "top.toml")


def test_an_unknown_key_names_the_whole_set(tmp_path):
    (tmp_path / "x.toml").write_text(MINIMAL)
    with pytest.raises(ValueError, match="^--set optim.lt=1: unknown key optim.lt, did you mean"):
        load(tmp_path / "x.toml", ("optim.lt=1",))
    with pytest.raises(ValueError, match=r"^overrides\['optim.lt'\]: unknown key optim.lt"):
        load_over(tmp_path / "x.toml", {"optim.lt": 1})


def test_a_recipe_is_named_for_what_its_tables_refuse(tmp_path):
    (tmp_path / "x.py").write_text(
        "from reflux.trainer.config.sections import LoraSection\n"
        "def config():\n    return LoraSection(rank=-1)\n"
    )
    with pytest.raises(ValueError, match=r"x.py: rank = -1; want >= 0"):
        load(tmp_path / "x.py")


def test_an_error_of_a_run_gets_the_sources_of_what_it_names(files):
    cfg = load(files / "x.toml", ("data.source=rows.jsonl",))
    message = "data.source = 'rows.jsonl': no such file; steps = 4, optim.lr"
    notes = [
        f"steps is set in {files / 'base.toml'}",
        f"optim.lr is set in {files / 'x.toml'}",
        "data.source is set by --set data.source=rows.jsonl",
    ]
    assert sorted(origin_notes(cfg, message)) == sorted(notes)
    with pytest.raises(ValueError) as error, with_origins(cfg), with_origins(cfg):
        raise ValueError(message)
    assert sorted(error.value.__notes__) == sorted(notes), "each once"
    assert origin_notes(cfg, "--set data.source=rows.jsonl: data.source = 'x'") == []


@pytest.mark.parametrize(
    "message, key, does",
    [
        ("optim.lr = 1; want", "optim.lr", True),
        ("lower optim.lr.", "optim.lr", True),
        ("optim.lr_scale = 1", "optim.lr", False),
        ("x/optim.lr/y", "optim.lr", False),
        ("lr = 1", "optim.lr", True),
        ("a folder", "folder", False),
        ("folder = 'x'", "folder", True),
        ("run_folder = 'x'", "folder", False),
    ],
)
def test_which_options_a_message_speaks_of(message, key, does):
    assert mentions(message, key) is does


def test_leaves_open_tables():
    assert list(leaves({"a": 1, "b": {"c": {}, "d": {"e": 2}}})) == ["a", "b.c", "b.d.e"]
