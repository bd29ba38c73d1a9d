"""Files in, files out: unknown and renamed keys, types, bases, recipes, --set, the round trip."""

import tomllib
from dataclasses import fields, is_dataclass, replace
from difflib import SequenceMatcher
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.config.loader import (
    RENAMED,
    as_table,
    deep_merge,
    fill,
    load,
    to_toml,
)
from reflux.trainer.config.schema import TITAN_SECTIONS, Config, sections
from reflux.trainer.config.sections import TaskSection

MINIMAL = (
    'phase = "distill"\nfolder = "r"\nmodel.path = "m"\nteacher.path = "t"\ndata.source = "d"\n'
)
BASIC = tomllib.loads(MINIMAL)
SECTIONS = {f.name: f.type for f in fields(Config) if is_dataclass(f.type)}
KEYS = [("", name) for name in sections()] + [
    (s, f.name) for s, kind in SECTIONS.items() for f in fields(kind)
]
LEAVES = [  # without tables of named tables, [data.parts.NAME]
    (s, f.name, get_type_hints(kind)[f.name])
    for s, kind in SECTIONS.items()
    for f in fields(kind)
    if f.name != "parts"
]


def write(folder, text, name="x.toml"):
    (folder / name).write_text(text)
    return folder / name


def at(section: str, key: str, value) -> dict:
    return {section: {key: value}} if section else {key: value}


@st.composite
def typos(draw):
    """A key of some section with one letter dropped, doubled or swapped with its neighbour."""
    section, key = draw(st.sampled_from(KEYS))
    i, how = draw(st.integers(0, len(key) - 1)), draw(st.sampled_from(["drop", "double", "swap"]))
    typo = {
        "drop": key[:i] + key[i + 1 :],
        "double": key[:i] + key[i] + key[i:],
        "swap": key[:i] + key[i + 1 : i + 2] + key[i] + key[i + 2 :],
    }[how]
    return section, key, typo


@given(typos())
def test_a_typo_is_answered_with_the_nearest_key(case):
    section, key, typo = case
    known = sections() if not section else [f.name for f in fields(SECTIONS[section])]
    elsewhere = {key for _, key in KEYS}  # is answered with that section
    if typo in (*known, "", *elsewhere):
        return
    with pytest.raises(ValueError) as error:
        fill(Config, deep_merge(BASIC, at(section, typo, 1)), "x.toml")
    prefix, says = f"{section}." if section else "", str(error.value)
    assert (
        says.startswith(f"x.toml: unknown key {prefix}{typo}")
        and f"Known there: {', '.join(known)}" in says
    )
    if len(key) >= 3:
        guess = says.partition(f"did you mean {prefix}")[2].partition("?")[0]
        best = max(SequenceMatcher(None, name, typo).ratio() for name in known)
        assert guess in known
        assert SequenceMatcher(None, guess, typo).ratio() >= best - 0.15, (
            "swapped arguments change difflib's ratio a little"
        )


@pytest.mark.parametrize("section, key", KEYS)
def test_every_key_is_found_again_when_its_last_letter_is_doubled(section, key):
    with pytest.raises(
        ValueError, match=f"did you mean {section + '.' if section else ''}{key}\\?"
    ):
        fill(Config, deep_merge(BASIC, at(section, key + key[-1], 1)), "x.toml")


@pytest.mark.parametrize("section, key, hint", LEAVES)
def test_a_wrong_type_says_what_is_wanted(section, key, hint):
    takes_text = get_origin(hint) is not UnionType or str in get_args(hint)
    wrong = [object()] if takes_text else ["5"]
    for value in (*wrong, [1, 2, 3]):
        with pytest.raises(
            ValueError, match=f"x.toml: {section}.{key}(\\[0\\])? = .*; want \\w*"
        ) as error:
            fill(Config, deep_merge(BASIC, at(section, key, value)), "x.toml")
        assert (
            "typing" not in str(error.value) and "<" not in str(error.value).partition("; want ")[2]
        )


@pytest.mark.parametrize(
    "section, key, value, says",
    [
        ("", "steps", 10.0, "steps = 10.0; want int"),
        ("", "steps", True, "steps = True; want int"),
        ("log", "quiet", 1, "log.quiet = 1; want bool"),
        ("optim", "lr", "1e-3", "optim.lr = '1e-3'; want a finite float"),
        ("optim", "betas", [0.9], "optim.betas = [0.9]; want [float, float]"),
        ("optim", "betas", [True, 0.9], "optim.betas[0] = True; want a finite float"),
        ("data", "limit", 1.5, "want int | none (leave it out)"),
        ("data", "columns", {"question": 3}, "want a table of strings"),
        ("task", "options", 3, "want a table"),
        ("calibration", "mode", "distilable", "want off | distillable | undistillable"),
        ("model", "path", 3, "model.path = 3; want str"),
        ("diagnose", "prefixes", "teacher", "want a list of dataset | teacher | student"),
        (
            "diagnose",
            "prefixes",
            ["teacher", "studnet"],
            "diagnose.prefixes[1] = 'studnet'; want dataset | teacher | student",
        ),
        (
            "distill",
            "teacher_weights",
            [1.0, True],
            "distill.teacher_weights[1] = True; want a finite float",
        ),
    ],
)
def test_wrong_values_by_hand(section, key, value, says):
    with pytest.raises(ValueError) as error:
        fill(Config, deep_merge(BASIC, at(section, key, value)), "x.toml")
    assert says in str(error.value)


def test_a_section_is_not_a_value():
    for section in ("optim", "training"):
        with pytest.raises(
            ValueError, match=f"{section} is a section; write its keys as {section}.key = value"
        ):
            fill(Config, BASIC | {section: 3}, "x.toml")


def test_lists_come_back_from_toml():
    cfg = fill(
        Config,
        deep_merge(
            BASIC, {"distill": {"more_teachers": ["a", "b"], "teacher_weights": [1, 2, 0.5]}}
        ),
        "x.toml",
    )
    assert cfg.distill.more_teachers == ("a", "b") and cfg.distill.teacher_weights == (
        1.0,
        2.0,
        0.5,
    )
    assert fill(Config, tomllib.loads(to_toml(cfg)), "again") == cfg


def test_an_integer_will_do_for_a_float():
    cfg = fill(Config, deep_merge(BASIC, {"optim": {"lr": 1, "betas": [0, 0.5]}}), "x.toml")
    assert cfg.optim.lr == 1.0 and type(cfg.optim.lr) is float and cfg.optim.betas == (0.0, 0.5)


# quotes, newlines, control characters, DEL
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
VALUES = st.recursive(
    TEXTS | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.dates(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)


@given(
    source=TEXTS,
    options=st.dictionaries(TEXTS, VALUES, max_size=3),
    columns=st.dictionaries(TEXTS, TEXTS, max_size=2),
    lr=st.floats(1e-12, 1.0),
    titan=st.dictionaries(
        st.sampled_from(TITAN_SECTIONS), st.dictionaries(TEXTS, VALUES, max_size=2), max_size=2
    ),
)
def test_what_is_written_reads_back(source, options, columns, lr, titan):
    cfg = fill(
        Config,
        deep_merge(
            BASIC,
            {
                "task": {"name": source, "options": options},
                "data": {"columns": columns},
                "optim": {"lr": lr},
                **titan,
            },
        ),
        "x.toml",
    )
    again = fill(Config, tomllib.loads(to_toml(cfg)), "again")
    assert again == cfg and fill(Config, as_table(cfg), "table") == cfg


WITHOUT_LORA = {
    ("lora", "rank"): 0,
    ("lora", "targets"): (),
    ("lora", "dropout"): 0.0,
    ("export", "merge"): False,
}
WITH_LORA = {
    ("lora", "dropout"): 0.0,
    ("model", "from_scratch"): False,
    ("reference", "offload"): False,
}


@pytest.mark.parametrize("excluded", [WITHOUT_LORA, WITH_LORA])
def test_every_option_survives_the_round_trip(excluded):
    """Each one away from its default, so that an option that is not written fails. excluded: what
    goes together with adapters, or with none.
    """
    flipped = {
        "phase": "calibrate",
        "folder": "f",
        "steps": 7,
        "seed": 9,
        "on_existing_run": "new",
        "activation_checkpoint": "full",
        "titan": {"training": {"seq_len": 8}},
    }

    def away(section, f, hint):
        value = getattr(getattr(Config, section), f.name)
        if get_origin(hint) is None and hint in (str, bool, int, float):
            return {
                str: lambda: "s",
                bool: lambda: not value,
                int: lambda: value + 2,
                float: lambda: value / 2 + 0.25,
            }[hint]()
        other = {"int | None": 3, "bool | None": True, "str | tuple[str, ...]": ("a", "b")}
        return other.get(str(hint), value)

    chosen = excluded | {
        ("calibration", "reward"): "likelihood_ratio",
        ("defence", "proxy"): "",
        ("defence", "temperature"): 1.0,
        ("defence", "antidistillation"): "",
        ("defence", "penalty"): 0.0,
        ("distill", "query_budget"): 0,
        ("distill", "nll_weight"): 0.0,
        ("distill", "correct_only"): False,
        ("distill", "top_k"): 0,
        ("distill", "keep_likeliest"): 1.0,
        ("distill", "paraphraser"): "",
        ("export", "push_to_hub"): "",  # wants an export, which is off here
        ("policy", "minibatches"): 1,
        ("policy", "max_is"): 0.0,
        ("rollout", "tensor_parallel"): 1,
        ("rollout", "overlap"): 0,
        ("rollout", "top_k"): 0,
        ("rollout", "top_p"): 1.0,
        ("distill", "temperature"): 1.0,
        ("teacher", "cache"): "",
        ("distill", "route"): "",
        ("distill", "privileged"): "",
        ("calibration", "proxy_route"): "",
    }
    for section, kind in SECTIONS.items():
        hints = get_type_hints(kind)
        values = {
            f.name: chosen.get((section, f.name), away(section, f, hints[f.name]))
            for f in fields(kind)
        }
        flipped[section] = kind(**values)
    cfg = Config(**flipped)
    assert fill(Config, tomllib.loads(to_toml(cfg)), "x.toml") == cfg


@pytest.mark.parametrize(
    "text, get, want",
    [
        ("optim.lr=1e-3", lambda c: c.optim.lr, 1e-3),
        ("model.path=some/where", lambda c: c.model.path, "some/where"),
        ('model.path="quoted"', lambda c: c.model.path, "quoted"),
        ("data.split=", lambda c: c.data.split, ""),
        ("steps = 3", lambda c: c.steps, 3),
        ("log.quiet=true", lambda c: c.log.quiet, True),
        ("task.options.marker==>", lambda c: c.task.options, {"marker": "=>"}),
        ("training.seq_len=64", lambda c: c.titan["training"]["seq_len"], 64),
        ("optim.betas=[0.5, 0.6]", lambda c: c.optim.betas, (0.5, 0.6)),
        ("model.path=C:\\new", lambda c: c.model.path, "C:\\new"),
    ],
)
def test_set(tmp_path, text, get, want):
    assert get(load(write(tmp_path, MINIMAL), (text,))) == want


def test_the_last_set_wins_and_the_rest_stays(tmp_path):
    file = write(tmp_path, MINIMAL + "[training]\nseq_len = 8\nmax_norm = 1.0\n")
    cfg = load(file, ("training.seq_len=16", "training.seq_len=32", "optim.lr=2e-5"))
    assert (
        cfg.titan == {"training": {"seq_len": 32, "max_norm": 1.0}}
        and cfg.optim.lr == 2e-5
        and cfg.teacher.path == "t"
    )


@pytest.mark.parametrize(
    "text, says",
    [
        ("optim.lt=1", "--set optim.lt=1: unknown key optim.lt, did you mean optim.lr?"),
        ("steps", "--set steps: want a.b=value"),
        ("=3", "--set =3: want a.b=value"),
        ("optim=3", "--set optim=3: optim is a section"),
        ("a b=3'", "--set a b=3': want a.b=value"),
    ],
)
def test_set_refuses(tmp_path, text, says):
    with pytest.raises(ValueError) as error:
        load(write(tmp_path, MINIMAL), (text,))
    assert says in str(error.value)


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_a_renamed_key_is_answered_with_its_new_name(tmp_path, old, new):
    """In a file, in the file's base, by --set, and by --set over a recipe."""
    is_section = "." not in old
    says = f"[{old}] is called [{new}] now" if is_section else f"{old} is called {new} now"
    assignment = f"{old}.key=1" if is_section else f"{old}=1"
    right, recipe = write(tmp_path, MINIMAL, "right.toml"), write(tmp_path, RECIPE, "x.py")
    wrong = write(tmp_path, MINIMAL + assignment, "wrong.toml")
    over = write(tmp_path, 'base = "wrong.toml"\n', "over.toml")
    for source, file, sets in (
        (wrong, wrong, ()),
        (wrong, over, ()),
        (f"--set {assignment}", right, (assignment,)),
        (f"--set {assignment}", recipe, (assignment,)),
    ):
        with pytest.raises(ValueError) as error:
            load(file, sets)
        assert str(error.value) == f"{source}: {says}"


@pytest.mark.parametrize("new", RENAMED.values())
def test_the_new_name_of_a_renamed_key_is_known(new):
    section, _, key = new.partition(".")
    assert (section, key) in KEYS if key else ("", section) in KEYS


def test_bases_are_laid_under_relative_to_their_own_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, MINIMAL + "steps = 1\nseed = 1\n[optim]\nlr = 1.0\n", "root.toml")
    write(tmp_path / "sub", 'base = "../root.toml"\nseed = 2\n[optim]\neps = 0.5\n', "mid.toml")
    cfg = load(write(tmp_path, 'base = "sub/mid.toml"\n[optim]\nweight_decay = 0.25\n'))
    assert (cfg.steps, cfg.seed, cfg.optim.lr, cfg.optim.eps, cfg.optim.weight_decay) == (
        1,
        2,
        1.0,
        0.5,
        0.25,
    )


@pytest.mark.parametrize(
    "base, says",
    [
        ("base = 3\n", "base = 3; want the name of a .toml or .yaml file"),
        ('base = "x.toml"\n', "leads back to"),
        ('base = "loop.toml"\n', "leads back to"),
        ('base = "rot.toml"\n', "did you mean"),
        ('base = "typo.toml"\n', "typo.toml: unknown key modle, did you mean model?"),
    ],
)
def test_a_wrong_base_is_named(tmp_path, base, says):
    write(tmp_path, MINIMAL, "root.toml")
    write(tmp_path, 'base = "x.toml"\n', "loop.toml")
    write(tmp_path, '[modle]\npath = "m"\n', "typo.toml")
    with pytest.raises(ValueError) as error:
        load(write(tmp_path, base + MINIMAL))
    assert says in str(error.value)


def test_a_missing_or_broken_file_is_named(tmp_path):
    write(tmp_path, "steps = = 3", "broken.toml")
    with pytest.raises(ValueError, match=r"broken.toml: not valid TOML: .*line 1"):
        load(tmp_path / "broken.toml")
    with pytest.raises(ValueError, match=r"no such file, did you mean .*broken.toml\?"):
        load(tmp_path / "brokn.toml")


def test_a_byte_order_mark_is_no_key(tmp_path):
    (tmp_path / "x.toml").write_text("\ufeff" + MINIMAL, encoding="utf-8")
    assert load(tmp_path / "x.toml").phase == "distill"


RECIPE = """
from reflux.trainer.config.schema import Config
from reflux.trainer.config.data import DataSection
from reflux.trainer.config.sections import ModelSection, TeacherSection
def config():
    return Config(
        "distill",
        "r",
        model=ModelSection("m"),
        teacher=TeacherSection("t"),
        data=DataSection("d"),
        titan={"training": {"seq_len": 8}},
    )
"""


def test_a_recipe_is_a_config(tmp_path):
    recipe = write(tmp_path, RECIPE, "x.py")
    table = fill(Config, deep_merge(BASIC, {"training": {"seq_len": 8}}), "x.toml")
    assert load(recipe) == table
    cfg = load(recipe, ("optim.lr=0.5", "training.max_norm=2.0"))
    assert cfg == replace(
        table,
        optim=replace(table.optim, lr=0.5),
        titan={"training": {"seq_len": 8, "max_norm": 2.0}},
    )
    with pytest.raises(
        ValueError,
        match="--set distill.beta=2.0: distill.beta = 2.0; want a|beta = 2.0; want 0 < beta < 1",
    ):
        load(recipe, ("distill.divergence=jsd", "distill.beta=2.0"))


@pytest.mark.parametrize(
    "text, says",
    [
        ("x = 3", "no function config"),
        ("config = 3", "no function config"),
        ("def config(): return 3", "config() returned int; want"),
    ],
)
def test_a_recipe_without_a_config_is_told_what_to_write(tmp_path, text, says):
    with pytest.raises(ValueError) as error:
        load(write(tmp_path, text, "x.py"))
    assert says in str(error.value)


def test_torchtitans_sections_are_kept_unread():
    cfg = fill(Config, BASIC | {name: {"whatever": [1]} for name in TITAN_SECTIONS}, "x.toml")
    assert cfg.titan == {name: {"whatever": [1]} for name in TITAN_SECTIONS}
    assert set(TITAN_SECTIONS).isdisjoint(f.name for f in fields(Config))


def test_a_dataclass_alone_can_be_filled():
    assert fill(DistillSection, {"top_k": 4, "tail": "bucket"}, "x", "distill.").top_k == 4
    assert fill(TaskSection("math"), {"options": {"a": 1}}, "x", "task.") == TaskSection(
        "math", {"a": 1}
    )


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("x.toml", b"a = 1\nsteps = twelve # months", 'neither a number .* quotes: "twelve"$'),
        ("x.toml", b"steps = True", "want true, not True$"),
        ("x.toml", b"[model]\npath = runs/debug/qwen3", 'quotes: "runs/debug/qwen3"$'),
        ("x.toml", b"\xff\xfe", "x.toml: not valid TOML: 'utf-8' codec"),
        ("x.toml", b"phase = " + b"[" * 9999 + b"]" * 9999, "x.toml: not valid TOML: .*recursion"),
        ("x.toml", None, "x.toml: cannot be read: Is a directory"),
        ("x.py", b"def f(:", r"x.py: the recipe failed with SyntaxError: .* \(x.py, line 1\)"),
        ("x.py", b"x = 1\nassert x == 2", r"failed with AssertionError \(.*x.py, line 2\)"),
        ("x.py", b"def config():\n    return 1 / 0", r"config\(\) failed with Zero.*, line 2\)"),
        ("x.py", b"import nothing_like_this", "failed with ModuleNotFoundError"),
        ("none.py", b"", "x.py: no such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, says):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    asked = tmp_path / "x.py" if name == "none.py" else path
    with pytest.raises(ValueError, match=f"(?s){says}"):
        load(asked)


def test_a_deep_value_of_set_is_a_mistake_in_words(tmp_path):
    (tmp_path / "x.toml").write_text("")
    with pytest.raises(ValueError, match="want a.b=value|want"):
        load(tmp_path / "x.toml", ("phase=" + "[" * 9999 + "]" * 9999,))
