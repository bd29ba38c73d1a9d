"""The card names the dial, the parents and the recipe, and its two machine-readable parts parse."""

import tomllib

import pytest
import yaml

from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.config.loader import fill
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import (
    CalibrationSection,
    DataSection,
    FrozenSection,
    ModelSection,
    TaskSection,
)
from reflux.trainer.runs.model_card import model_card


def config(phase="calibrate", model="models/a: b #1", **parts) -> Config:
    return Config(
        phase,
        "r",
        model=ModelSection(model),
        teacher=FrozenSection("the-teacher"),
        proxy=FrozenSection("the-proxy"),
        data=DataSection("train.jsonl"),
        task=TaskSection("math"),
        **parts,
    )


@pytest.mark.parametrize(
    "cfg, says",
    [
        (
            config(calibration=CalibrationSection("undistillable", 0.25)),
            ["Calibrated teacher: undistillable, strength 0.25", "`the-proxy`", "beta 0.04"],
        ),
        (config(calibration=CalibrationSection("off")), ["task reward only (eta = 0)", "`math`"]),
        (
            config("distill"),
            ["Distilled student", "`the-teacher`", "reverse KL, tail full, 100% on-policy"],
        ),
        *(
            (
                config("distill", distill=DistillSection(objective, on_policy=0.0)),
                ["Distilled student", story],
            )
            for objective, story in (
                ("nll", "likelihood of the teacher's texts"),
                ("span", "aligned byte spans"),
                ("class", "reverse KL over classes of both vocabularies (prefix)"),
            )
        ),
        (
            config("distill", distill=DistillSection("nll", source="dataset", on_policy=0.0)),
            ["Fine-tuned model", "on `train.jsonl`"],
        ),
    ],
)
def test_what_a_card_says(cfg, says):
    card = model_card(
        cfg, {"loss": 0.123456789, "reference_kl": 0.01, "eta": "words", "step_s": 3.0}
    )
    assert (
        all(text in card for text in says) and "no\nclaim that the model cannot be copied" in card
    )
    assert (
        "| loss | 0.12346 |" in card and "| reference_kl | 0.01 |" in card and "step_s" not in card
    )
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "base_model": "models/a: b #1",
        "tags": ["reflux", cfg.phase],
    }
    recipe = body.partition("```toml\n")[2].partition("```")[0]
    assert fill(Config, tomllib.loads(recipe), "card") == cfg


def test_mode_off_does_not_name_a_proxy_it_never_read():
    story = model_card(config(calibration=CalibrationSection("off")), {}).partition(
        "## Configuration"
    )[0]
    assert "the-proxy" not in story and "the-teacher" not in story
