"""torchtitan's sections: laid over its own dataclasses; unknown keys, wrong types, numbers out of
range and settings that would fail silently are errors, which name the file or the `--set`.
"""

import math
import re
import tomllib
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from runs import config

from reflux.trainer.config.loader import fill, load, load_over
from reflux.trainer.config.schema import Config
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
    "checkpoint.initial_load_in_hf = false": "checkpoint.initial_load_in_hf = false; leave it out",
    "checkpoint.create_seed_checkpoint = true": "checkpoint.create_seed_checkpoint = true; leave",
    "lr_scheduler.total_steps = 2": "lr_scheduler.total_steps = 2 with steps = ",
    "lr_scheduler.decay_ratio = 1.5": "lr_scheduler.decay_ratio = 1.5; want 0 to 1",
    "profiler.profile_freq = 0": "profiler.profile_freq = 0; want >= 1",
    "profiler.profiler_repeat = -1": "profiler.profiler_repeat = -1; want >= 0",
    "profiler.memory_snapshot_freq = 0": "profiler.memory_snapshot_freq = 0; want >= 1",
}


@pytest.mark.parametrize("line", WRONG)
def test_an_error_names_where_the_value_came_from(tmp_path, line):
    """The file, the base that holds it, the `--set`, the key of a program's overrides."""
    key, _, value = line.partition(" = ")
    good, bad, over = (tmp_path / name for name in ("good.toml", "bad.toml", "over.toml"))
    good.write_text(MINIMAL)
    bad.write_text(f"{MINIMAL}{line}\n")
    over.write_text('base = "bad.toml"\ntraining.enable_cpu_offload = false\nsteps = 7\n')
    program = {"true": True, "false": False}.get(value, value.strip('"'))
    if re.fullmatch(r"-?[0-9.]+", value):
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


@given(
    total=st.none() | st.integers(1, 12),
    steps=st.integers(0, 12),
    warmup=st.integers(0, 14),
    decay=st.none() | st.floats(0.0, 1.0),
    kind=st.sampled_from(["linear", "sqrt", "cosine"]),
)
@example(total=6, steps=12, warmup=0, decay=1.0, kind="linear")
@example(total=6, steps=12, warmup=0, decay=0.0, kind="cosine")
def test_no_step_lies_behind_the_schedule(total, steps, warmup, decay, kind):
    """Refused, or every step has a rate: warmup and decay that are too long are cut."""
    schedule = dict(total_steps=total, warmup_steps=warmup, decay_ratio=decay, decay_type=kind)
    table = {**tomllib.loads(MINIMAL), "steps": steps, "lr_scheduler": schedule}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        config = titan_config(fill(Config, table, "x"), SPEC)
    except ValueError as error:
        assert total < steps and f"total_steps = {total} with steps = {steps}" in str(error)
        return
    rates = config.lr_scheduler.build(optimizers=[optimizer], training_steps=config.training.steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rates.step()
    assert all(0 < rate <= 1 for rate in seen)
    behind = seen[warmup:]
    assert behind == sorted(behind, reverse=True), "it never rises again"


def test_a_run_is_not_made_longer_than_its_schedule(talkers, tmp_path):
    """A resume with more steps; a phase without steps reads no schedule."""
    of = {"lr_scheduler": {"total_steps": 6}}
    assert titan_config(config(talkers, tmp_path / "run", "distill", steps=6, **of), SPEC)
    with pytest.raises(ValueError, match="total_steps = 6 with steps = 7; want at least steps"):
        titan_config(config(talkers, tmp_path / "run", "distill", steps=7, **of), SPEC)
    asked = {"eval": {"source": "d"}, "task": {"name": "math"}}
    assert titan_config(config(talkers, tmp_path / "run", "evaluate", steps=7, **of, **asked), SPEC)


def test_a_profile_holds_its_warmup(talkers, tmp_path):
    def titan(**profiler):
        return titan_config(config(talkers, tmp_path / "run", "distill", profiler=profiler), SPEC)

    assert titan(profile_freq=3) and titan(profile_freq=4, enable_profiling=True)
    with pytest.raises(ValueError, match="profile_freq = 3 with .* want at least their sum, 4"):
        titan(profile_freq=3, enable_profiling=True)


@pytest.mark.parametrize("over", [{"lora": {"rank": 2}}, {"model": {"from_scratch": True}}])
def test_what_a_run_starts_from_is_not_torchtitans_to_say(talkers, tmp_path, over):
    """true was an assertion without words where the adapters are loaded by the engine."""
    for said in (True, False):
        start = {"checkpoint": {"initial_load_in_hf": said}}
        cfg = config(talkers, tmp_path / "run", "distill", **over, **start)
        if not said:
            assert not titan_config(cfg, SPEC).checkpoint.initial_load_in_hf
            continue
        with pytest.raises(ValueError, match="initial_load_in_hf = true; leave it out"):
            titan_config(cfg, SPEC)
