"""The card names model, parents and recipe, and its two machine-readable parts parse."""

import shutil
import tomllib
from dataclasses import replace

import pytest
import yaml

from reflux.trainer.config.data import DataSection
from reflux.trainer.config.distillation import DistillSection
from reflux.trainer.config.evaluation import EvalSection
from reflux.trainer.config.loader import fill
from reflux.trainer.config.phases import spec_of
from reflux.trainer.config.schema import Config
from reflux.trainer.config.sections import (
    CalibrationSection,
    ExportSection,
    FrozenSection,
    LoraSection,
    ModelSection,
    ReferenceSection,
    TaskSection,
    TeacherSection,
)
from reflux.trainer.data.chat import Chat
from reflux.trainer.data.tokenizer_files import has_template, write_template
from reflux.trainer.runs.model_card import Measured, Outcome, licence_of, model_card


def config(phase="calibrate", **parts) -> Config:
    return Config(
        phase,
        "r",
        model=ModelSection("models/a: b #1"),
        teacher=TeacherSection("the-teacher"),
        proxy=FrozenSection("the-proxy"),
        data=DataSection("train.jsonl"),
        task=TaskSection("math"),
        **parts,
    )


def card_of(cfg: Config) -> tuple[str, str]:
    """What the phase says, without a model."""
    phase = object.__new__(spec_of(cfg.phase).load())
    phase.cfg, phase.spec = cfg, cfg.distill
    phase.teachers = [None] if cfg.needs_teacher else []
    phase.biased = cfg.distill.objective in ("class", "span")
    return phase.card()


@pytest.mark.parametrize(
    "cfg, says",
    [
        (
            config(calibration=CalibrationSection("undistillable", strength=0.25)),
            ["Calibrated teacher: undistillable, strength 0.25", "`the-proxy`", "beta 0.04"],
        ),
        (config(calibration=CalibrationSection("off")), ["task reward only (eta = 0)", "`math`"]),
        (
            config("distill"),
            ["Distilled student", "`the-teacher`", "reverse KL, tail full, 100% on-policy"],
        ),
        *(
            (
                config(
                    "distill",
                    distill=DistillSection(objective, on_policy=0.0, allow_biased=True),
                ),
                ["Distilled student", story, *(["Biased baseline"] * (objective != "nll"))],
            )
            for objective, story in (
                ("nll", "likelihood of the teacher's texts"),
                ("span", "aligned byte spans"),
                ("class", "reverse KL over a partition of both vocabularies (prefix)"),
            )
        ),
        (
            config("distill", distill=DistillSection("nll", source="dataset", on_policy=0.0)),
            ["Fine-tuned model", "on `train.jsonl`"],
        ),
    ],
)
def test_what_a_card_says(cfg, says):
    stats = {"loss": 0.123456789, "reference_kl": 0.01, "eta": "words", "step_s": 3.0}
    card = model_card(cfg, Measured(stats), *card_of(cfg), Outcome(cfg.steps))
    assert all(text in card for text in says)
    assert "no\nclaim that the model cannot be copied" in card
    assert "| loss | 0.12346 |" in card and "| reference_kl | 0.01 |" in card
    assert "step_s" not in card
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "base_model": "models/a: b #1",
        "tags": ["reflux", cfg.phase],
    }
    recipe = body.partition("```toml\n")[2].partition("```")[0]
    assert fill(Config, tomllib.loads(recipe), "card") == cfg


def test_mode_off_does_not_name_a_proxy_it_never_read():
    cfg = config(calibration=CalibrationSection("off"))
    story = model_card(cfg, Measured({}), *card_of(cfg), Outcome(cfg.steps)).partition(
        "## Configuration"
    )[0]
    assert "the-proxy" not in story and "the-teacher" not in story


def test_the_evaluation_stands_with_its_intervals_and_its_step():
    cfg = config("distill")
    fields = {"step": 7, "eval/greedy": 0.5, "eval/greedy_low": 0.25, "eval/greedy_high": 0.75}
    card = model_card(cfg, Measured({}, fields | {"eval/n": 3}), *card_of(cfg), Outcome(cfg.steps))
    assert "the weights of step 7" in card and "| greedy | 0.5 | [0.25, 0.75] |" in card
    assert "eval/n" not in card
    none = model_card(cfg, Measured({}), *card_of(cfg), Outcome(cfg.steps))
    assert "## Evaluation" not in none and "## Guards" not in none


@pytest.mark.parametrize("stopped", [None, "KL above 0.1"])
def test_what_the_guards_did(stopped):
    cfg = config(calibration=CalibrationSection("distillable"))
    measured = Measured({"reference_kl": 0.05})
    card = model_card(cfg, measured, *card_of(cfg), Outcome(cfg.steps, stopped))
    assert "above 0.1 nats per token (the last step had 0.05)" in card
    assert ("One of them did." if stopped else "None of them did.") in card


@pytest.mark.parametrize("every", [0, 1])
def test_a_guard_that_could_not_have_acted_is_not_listed(every):
    cfg = config(calibration=CalibrationSection("distillable"))
    cfg = replace(cfg, steps=10, eval=EvalSection("x.jsonl", every=every))
    card = model_card(cfg, Measured({}), *card_of(cfg), Outcome(cfg.steps))
    assert ("- accuracy more than 0.02 below the start, twice" in card) is (every == 1)
    assert "- KL to the original above" in card


@pytest.mark.parametrize(
    "denominator, measured", [("policy", False), ("marginal", False), ("reference", True)]
)
def test_a_kl_that_nothing_measured_guarded_nothing(denominator, measured):
    cal = CalibrationSection("distillable", denominator=denominator)
    cfg = config(calibration=cal, reference=ReferenceSection(beta=0.0))
    card = model_card(cfg, Measured({}), *card_of(cfg), Outcome(cfg.steps))
    assert ("nats per token" in card.partition("## Configuration")[0]) == measured


def test_weights_that_no_step_has_trained_are_called_so():
    cfg = config(calibration=CalibrationSection("distillable"))
    for steps, weights in ((0, "untrained weights"), (3, "weights of step 3")):
        card = model_card(cfg, Measured({}), *card_of(cfg), Outcome(steps, "KL above 0.1"))
        assert f"A guard ended the run: KL above 0.1. These are the {weights}." in card


@pytest.mark.parametrize("line, says", [("license: mit", "mit"), ("language: en", None)])
def test_the_licence_is_the_base_models(tmp_path, line, says):
    (tmp_path / "README.md").write_text(f"---\n{line}\n---\nlicense: wrong\n")
    assert licence_of(str(tmp_path)) == says
    cfg = replace(config("distill"), model=ModelSection(str(tmp_path)))
    card = model_card(cfg, Measured({}), *card_of(cfg), Outcome(cfg.steps))
    head = yaml.safe_load(card.split("---\n", 2)[1])
    assert head.get("license") == says
    assert ("`mit`, that of the base model" if says else "names none") in card


def test_the_snippet_is_python_that_names_where_the_model_is():
    cfg = config("distill", export=ExportSection(push_to_hub="me/mine"))
    card = model_card(cfg, Measured({}), *card_of(cfg), Outcome(cfg.steps))
    code = card.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert 'AutoModelForCausalLM.from_pretrained("me/mine")' in code
    adapter = replace(cfg, lora=LoraSection(rank=4))
    code = model_card(adapter, Measured({}), *card_of(adapter), Outcome(1))
    assert 'PeftModel.from_pretrained(model, "me/mine")' in code


@pytest.mark.parametrize("template", [True, False])
def test_the_snippet_renders_as_training_did(assets, tmp_path, template):
    """With the template's arguments, which no file holds, and without a template."""
    folder = shutil.copytree(assets / "qwen3", tmp_path / "export")
    write_template(folder, "{{ mood }}: {{ messages[0].content }}" if template else "")
    model = ModelSection(str(folder), template_arguments={"mood": "kind", "n": [1, True]})
    cfg = replace(config("distill"), model=model)
    card = model_card(cfg, Measured({}), *card_of(cfg), Outcome(1), has_template(str(folder)))
    assert ("`mood = 'kind'`" in card and "chat_template_kwargs" in card) is template
    code = card.partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(code.replace("path/to/this/folder", str(folder)).rpartition("print(")[0], names)
    want = Chat.of(model).prompt_ids([{"role": "user", "content": "What is 3 + 4?"}])
    assert tuple(names["ids"]["input_ids"][0].tolist()) == want
