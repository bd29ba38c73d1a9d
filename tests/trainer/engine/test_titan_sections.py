"""torchtitan's sections: laid over its own dataclasses; unknown keys, wrong types, numbers out of
range and settings that would fail silently are errors, which name the file or the `--set`.
"""

import math
import re
from types import SimpleNamespace

import pytest
from runs import config

from reflux.trainer.config.loader import load, load_over
from reflux.trainer.engine.titan_options import titan_options
from reflux.trainer.engine.titan_sections import RANGES
from reflux.trainer.engine.trainer_config import titan_config

SPEC = SimpleNamespace(name="x", flavor="x", model=None)
MINIMAL = """phase = "distill"
folder = "r"
model.path = "m"
teacher.path = "t"
data.source = "d"
"""


@pytest.mark.parametrize(
    "section, values, message",
    [
        ("training", {"seq_length": 3}, "did you mean training.seq_len?"),
        ("training", {"seq_len": "64"}, "training.seq_len = '64'"),
        ("training", {"seq_len": True}, "training.seq_len = True"),
        ("training", {"seq_len": 1.5}, "training.seq_len = 1.5"),
        ("training", {"mixed_precision_param": "float8"}, "float8"),
        ("training", {"steps": 3}, "set steps instead"),
        ("training", {"local_batch_size": 3}, "set batch.tokens"),
        ("debug", {"seed": 3}, "set seed instead"),
        ("checkpoint", {"folder": "x"}, "set folder instead"),
        ("parallelism", {"spmd_backend": "spmd_types"}, "partial_dtensor"),
    ],
)
def test_what_is_unknown_wrong_or_without_effect_is_an_error(
    talkers, tmp_path, section, values, message
):
    cfg = config(talkers, tmp_path / "run", "calibrate", **{section: values})
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        titan_config(cfg, SPEC)


# what is wrong -> how the error goes on behind its source
WRONG = {
    "training.seq_length = 3": "unknown key training.seq_length, did you mean training.seq_len?",
    'training.seq_len = "64"': "training.seq_len = '64'; want int",
    "training.seq_len = 0": "training.seq_len = 0; want >= 1 (tokens of the longest row",
    "training.max_norm = 0.0": "training.max_norm = 0.0; want > 0",
    "training.gc_freq = 0": "training.gc_freq = 0; want >= 1",
    "training.steps = 3": "training.steps is torchtitan's and has no effect here; set steps",
    'parallelism.spmd_backend = "spmd_types"': "parallelism.spmd_backend = 'spmd_types'; want",
    "checkpoint.interval = 0": "checkpoint.interval = 0; want >= 1",
    "checkpoint.keep_latest_k = 1": "checkpoint.keep_latest_k = 1; want >= 0, and not 1 (0 keeps",
    "checkpoint.last_save_in_hf = true": "[checkpoint] is refused by torchtitan: last_save_in_hf "
    "requires last_save_model_only=True. Given: last_save_in_hf = True",
    'compile.backend = "inducter"': "compile.backend = 'inducter', did you mean inductor? Want ",
    "lr_scheduler.decay_ratio = 1.5": "lr_scheduler.decay_ratio = 1.5; want 0 to 1",
    "profiler.profile_freq = 0": "profiler.profile_freq = 0; want >= 1",
}


@pytest.mark.parametrize("line", WRONG)
def test_an_error_names_where_the_value_came_from(tmp_path, line):
    """The file, the base that holds it, the `--set`, the key of a program's overrides."""
    key, _, value = line.partition(" = ")
    good, bad, over = (tmp_path / name for name in ("good.toml", "bad.toml", "over.toml"))
    good.write_text(MINIMAL)
    bad.write_text(f"{MINIMAL}{line}\n")
    over.write_text('base = "bad.toml"\ntraining.enable_cpu_offload = false\nsteps = 7\n')
    program = {"true": True}.get(value, value.strip('"'))
    if re.fullmatch(r"[0-9.]+", value):
        program = float(value) if "." in value else int(value)
    for source, cfg in (
        (bad, load(bad)),
        (bad, load(over)),
        (f"--set {key}={value}", load(good, ("steps=3", f"{key}={value}"))),
        (f"overrides['{key}']", load_over(good, {"steps": 3, key: program})),
    ):
        with pytest.raises(ValueError) as error:
            titan_config(cfg, SPEC)
        assert str(error.value).startswith(f"{source}: {WRONG[line]}")


def test_the_last_source_of_a_value_is_named(tmp_path):
    (tmp_path / "x.toml").write_text(MINIMAL + "training.seq_len = 0\n")
    with pytest.raises(ValueError, match="^--set training.seq_len=-2: training.seq_len = -2; want"):
        titan_config(load(tmp_path / "x.toml", ("training.seq_len=-2",)), SPEC)


def test_the_ends_of_the_ranges_are_inside_and_defaults_too(tmp_path):
    (tmp_path / "x.toml").write_text(MINIMAL)
    cfg = load(tmp_path / "x.toml")
    options = {f"{s}.{o.key}": o.value for s, known in titan_options(cfg).items() for o in known}
    for name, allowed in RANGES.items():
        assert allowed.holds(options[name]), name
        assert allowed.holds(allowed.low) and not allowed.holds(
            math.nextafter(allowed.low, -math.inf)
        )
        assert allowed.why
