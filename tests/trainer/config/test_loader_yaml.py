"""YAML beside TOML, and whose mistake it was: the file's, a --set's or a program's."""

import pytest

from reflux.trainer.config.loader import load, load_over

MINIMAL = (
    'phase = "distill"\nfolder = "r"\nmodel.path = "m"\nteacher.path = "t"\ndata.source = "d"\n'
)


def write(folder, text, name="x.toml"):
    (folder / name).write_text(text)
    return folder / name


YAML = """
phase: distill
folder: r
model: {path: m}
teacher: {path: t}
data:
  source: d
optim: {lr: 1e-5, betas: [0.9, 0.99]}
"""


def test_yaml_says_what_toml_says(tmp_path):
    toml = MINIMAL + "optim.lr = 1e-5\noptim.betas = [0.9, 0.99]\n"
    assert load(write(tmp_path, YAML, "x.yaml")) == load(write(tmp_path, toml))


def test_words_that_yaml_once_read_as_booleans_stay_words(tmp_path):
    """`off` is a mode here, and 1e-5 without a dot is a number."""
    text = YAML.replace("distill", "calibrate") + "calibration: {mode: off}\ntask: {name: exact}\n"
    cfg = load(write(tmp_path, text, "x.yml"))
    assert cfg.calibration.mode == "off" and cfg.optim.lr == 1e-5


def test_either_kind_is_the_base_of_the_other(tmp_path):
    write(tmp_path, YAML, "base.yaml")
    middle = write(tmp_path, 'base = "base.yaml"\nsteps = 7\n', "middle.toml")
    top = write(tmp_path, "base: middle.toml\nseed: 2\n", "top.yaml")
    assert load(middle).steps == 7 and load(top).seed == 2 and load(top).optim.lr == 1e-5


@pytest.mark.parametrize(
    "more, says",
    [
        ("optim: {lr: fast}", "x.yaml: not valid YAML: key optim occurs twice"),
        ("modle: {path: m}", "x.yaml: unknown key modle, did you mean model?"),
        ("steps: ten", "x.yaml: steps = 'ten'; want int"),
        ("seed: yes", "x.yaml: seed = 'yes'; want int"),
        ("steps: [1", "x.yaml: not valid YAML: "),
        ("1: 2", "x.yaml: not valid YAML: key 1 in the table of line "),
        ("anchor: {beta: 1}", "[anchor] is called [reference] now"),
    ],
)
def test_mistakes_in_yaml_are_named_as_in_toml(tmp_path, more, says):
    with pytest.raises(ValueError) as error:
        load(write(tmp_path, YAML + more + "\n", "x.yaml"))
    assert says in str(error.value)


def test_a_list_is_no_configuration(tmp_path):
    with pytest.raises(ValueError, match="a list at the top; want keys with values"):
        load(write(tmp_path, "- phase\n", "x.yaml"))


# --- who is to blame


@pytest.mark.parametrize(
    "sets, says",
    [
        (("optim.lr=-1",), "--set optim.lr=-1: optim.lr = -1.0"),
        (("steps=3", "optim.lr=fast"), "--set optim.lr=fast: optim.lr = 'fast'"),
        (("seed=1", "take_over_lock=true"), "--set take_over_lock=true: take_over_lock = true"),
        (("lora.targets=['q']",), "--set lora.targets=['q']: lora.targets"),
    ],
)
def test_a_mistake_of_a_set_names_the_set(tmp_path, sets, says):
    with pytest.raises(ValueError) as error:
        load(write(tmp_path, MINIMAL), sets)
    assert str(error.value).startswith(says) and "x.toml" not in str(error.value)


@pytest.mark.parametrize("sets", [(), ("seed=1",), ("seed=1", "folder=other")])
def test_a_mistake_of_the_file_names_the_file(tmp_path, sets):
    file = write(tmp_path, MINIMAL.replace('folder = "r"\n', "") + "optim.lr = -1.0\n")
    with pytest.raises(ValueError) as error:
        load(file, sets)
    assert str(error.value).startswith(f"{file}: optim.lr = -1.0")


def test_what_a_file_lacks_is_not_blamed_on_the_set_that_brings_another_key(tmp_path):
    file = write(tmp_path, 'phase = "calibrate"\nfolder = "r"\n')
    for sets, missing in (((), "model.path"), (("model.path=m",), "data.source")):
        with pytest.raises(ValueError) as error:
            load(file, sets)
        assert str(error.value).startswith(f"{file}: {missing} is missing")
    whole = write(tmp_path, MINIMAL, "whole.toml")
    with pytest.raises(ValueError, match=r"^--set model.path='': model.path is missing"):
        load(whole, ("model.path=''",))


def test_a_mistake_of_a_program_names_its_key(tmp_path):
    file = write(tmp_path, MINIMAL)
    cfg = load_over(file, {"optim.lr": 1e-3, "optim": {"eps": 1e-9}, "model.path": tmp_path})
    assert (cfg.optim.lr, cfg.optim.eps, cfg.model.path) == (1e-3, 1e-9, str(tmp_path))
    for overrides, says in (
        ({"steps": 2, "optim.lr": -1.0}, "overrides['optim.lr']: optim.lr = -1.0"),
        ({"optm.lr": 1.0}, "overrides['optm.lr']: unknown key optm, did you mean optim?"),
    ):
        with pytest.raises(ValueError) as error:
            load_over(file, overrides)
        assert str(error.value).startswith(says)
