"""torchtitan's sections with the values of a run: complete, explained, read back as the same."""

import dataclasses

from runs import config

from reflux.trainer.config.loader import as_table, fill
from reflux.trainer.config.schema import TITAN_SECTIONS, Config
from reflux.trainer.engine.titan_options import NOTES, titan_options, titan_table
from reflux.trainer.engine.titan_sections import REPLACED
from reflux.trainer.engine.trainer_config import titan_config


def test_every_option_of_every_section_is_there_and_no_note_is_left_over(talkers, tmp_path):
    cfg = config(talkers, tmp_path / "run", "distill")
    there = {f"{s}.{o.key}" for s, options in titan_options(cfg).items() for o in options}
    assert there == set(NOTES)
    sections = {s: getattr(titan_config(cfg, None), s) for s in TITAN_SECTIONS}
    known = {f"{s}.{f.name}" for s, v in sections.items() for f in dataclasses.fields(v)}
    assert known == there | set(REPLACED)


def test_printed_options_make_the_same_run(talkers, tmp_path):
    cfg = config(talkers, tmp_path / "run", "distill", lr_scheduler={"warmup_steps": 3})
    table = as_table(cfg) | {k: dict(v) for k, v in titan_table(cfg).items()}
    again = fill(Config, table, "printed")
    for section in TITAN_SECTIONS:
        a, b = (getattr(titan_config(c, None), section) for c in (cfg, again))
        assert a == b, section
    assert table["lr_scheduler"]["warmup_steps"] == 3 and table["checkpoint"]["interval"] == 1000
