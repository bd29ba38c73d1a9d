"""Raw logits, independent of the batch they were computed in; a text that fails does so alone."""

import shutil

import pytest
import torch
from runs import config, run_here, run_ranks
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from reflux.trainer.data.batch import Prompt, Rollout
from reflux.trainer.data.graders import Grade
from reflux.trainer.data.tasks import build_task

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% "
    "endif %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
)


def rollout(text, role="user", ended=True):
    return Rollout(
        Prompt(0, ({"role": role, "content": "hi"},)), (), (1,), (0.0,), 0.0, text, ended
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward_model")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(
            {letter: i for i, letter in enumerate(letters)} | {"</s>": 256, "<pad>": 257}, []
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    config = Qwen2Config(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_labels=1,
        pad_token_id=257,
    )
    torch.manual_seed(0)
    for name, kind in (("scorer", Qwen2ForSequenceClassification), ("writer", Qwen2ForCausalLM)):
        kind(config).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    return folder


def test_a_logit_does_not_depend_on_its_batch(folder):
    rollouts = [rollout(text) for text in ("a", "a much longer answer", "", "b", "middle one")]
    single = [
        build_task("reward_model", {"path": str(folder / "scorer")}).grade([r])[0] for r in rollouts
    ]
    together = build_task("reward_model", {"path": str(folder / "scorer"), "batch_size": 3}).grade(
        rollouts
    )
    assert len({grade.reward for grade in single}) == 5
    for one, many in zip(single, together, strict=True):
        assert (
            many.reward == pytest.approx(one.reward, abs=1e-5)
            and many.correct is None
            and many.error is None
        )


def test_the_reward_is_the_models_own_logit_at_the_last_token(folder):
    model = Qwen2ForSequenceClassification.from_pretrained(folder / "scorer").eval()
    ids = [
        *map("".join(sorted(pre_tokenizers.ByteLevel.alphabet())).index, "<user>hi"),
        256,
        *map("".join(sorted(pre_tokenizers.ByteLevel.alphabet())).index, "<assistant>ok"),
        256,
    ]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits.item()
    cut = rollout("ok", ended=False)  # scored like any other text
    assert build_task("reward_model", {"path": str(folder / "scorer")}).grade([cut])[
        0
    ].reward == pytest.approx(expected, abs=1e-5)


def test_without_a_pad_token_the_logit_is_read_at_the_last_token_too(folder, tmp_path):
    """The template ends with the EOS: as padding, it would be taken off the text."""
    shutil.copytree(folder / "scorer", tmp_path / "unpadded")
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path / "unpadded")
    fast.pad_token = None
    fast.save_pretrained(tmp_path / "unpadded")
    config = Qwen2Config.from_pretrained(tmp_path / "unpadded")
    config.pad_token_id = None
    config.save_pretrained(tmp_path / "unpadded")
    rollouts = [rollout(text) for text in ("a", "a much longer answer", "ok")]
    want, got = (
        build_task("reward_model", {"path": str(path)}).grade(rollouts)
        for path in (folder / "scorer", tmp_path / "unpadded")
    )
    assert [g.reward for g in got] == pytest.approx([w.reward for w in want], abs=1e-5)


def test_a_text_that_cannot_be_scored_fails_alone(folder):
    task = build_task("reward_model", {"path": str(folder / "scorer"), "max_tokens": 60})
    good, template, long, also_good = task.grade(
        [rollout("a"), rollout("a", role="tool"), rollout("a" * 90), rollout("a")]
    )
    assert good == also_good and good.error is None
    assert "no tools here" in template.error and "max_tokens is 60" in long.error
    assert (long.reward, long.correct) == (0.0, False) == (template.reward, template.correct)
    assert isinstance(good, Grade)


@pytest.mark.parametrize(
    "options, part",
    [
        ({"path": "writer"}, "want a trained reward model"),
        ({"path": "scorer", "dtype": "float23"}, "dtype = 'float23'"),
        ({"path": "scorer", "batchsize": 2}, "did you mean batch_size?"),
        ({"path": "scorer", "batch_size": 0}, "batch_size = 0; want at least 1"),
        ({"path": "scorer", "max_tokens": 0}, "max_tokens = 0; want at least 1"),
        ({"path": "scorer", "device": "gpu"}, "device = 'gpu' is not there"),
    ],
)
def test_a_wrong_model_or_option_is_refused(folder, options, part):
    with pytest.raises(ValueError) as error:
        build_task("reward_model", {**options, "path": str(folder / options["path"])})
    assert part in str(error.value)


def copied(folder, to, name="model.safetensors"):
    """The folder of the scorer with its weights as `name`, a pickle unless it is safetensors."""
    shutil.copytree(folder / "scorer", to)
    weights = to / "model.safetensors"
    if name != weights.name:
        torch.save(load_file(weights), to / name)
        weights.unlink()
    return to


@pytest.mark.parametrize("fault", ["pickle", "missing", "torn", "no config", "no folder"])
def test_a_folder_that_cannot_be_loaded_is_explained(folder, tmp_path, fault):
    name = "pytorch_model.bin" if fault == "pickle" else "model.safetensors"
    path = copied(folder, tmp_path / "copy", name)
    if fault == "missing":
        (path / name).unlink()
    elif fault == "torn":
        (path / name).write_bytes((path / name).read_bytes()[:2000])
    elif fault == "no config":
        (path / "config.json").unlink()
    elif fault == "no folder":
        shutil.rmtree(path)
    with pytest.raises(
        ValueError, match="reward_model: .* cannot be loaded: .*Want a local folder"
    ):
        build_task("reward_model", {"path": str(path)})


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_of_a_whole_run_get_the_rewards_of_one(talkers, folder, tmp_path, titan_process):
    """Each rank scores its own texts, in other batches than one rank alone: the same rewards, and
    the same steps from them.
    """
    options = {"path": str(folder / "scorer"), "batch_size": 3}
    over = {
        "steps": 2,
        "task": {"name": "reward_model", "options": options},
        "calibration": {"mode": "distillable", "cal_gate": "none"},
        "rollout": {"prompts": 2, "group": 4, "max_tokens": 8},
    }
    runs = [
        start(config(talkers, tmp_path / name, "calibrate", **over))
        for name, start in (("one", run_here), ("two", run_ranks))
    ]
    for a, b in zip(*(r.steps for r in runs)):
        assert a["grader_error"] == b["grader_error"] == 0 and abs(a["reward/task"]) > 1e-4
        assert ("reward/cal" in a) == ("reward/cal" in b), "none where no text of the step ended"
        for key in {"reward/task", "reward/cal", "loss", "grad_norm", "reference_kl"} & a.keys():
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), key
