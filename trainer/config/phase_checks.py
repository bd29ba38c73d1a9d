"""What a configuration has to hold for each phase, before anything is loaded; ValueError with the
fix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .evaluation import check_options
from .parts import used_tasks

if TYPE_CHECKING:
    from .schema import Config


def check_common(cfg: Config) -> None:
    """Every phase: the model and its adapters, a teacher where one is loaded, a grader where texts
    are graded.
    """
    check_lora(cfg)
    if not cfg.model.path:
        raise ValueError("model.path is missing; want a Hugging Face folder")
    if cfg.needs_teacher and not cfg.teacher.path:
        raise ValueError(
            "teacher.path is missing; only distill.objective = 'nll' with distill.source = "
            "'dataset' (plain SFT) runs without a teacher"
        )
    check_teacher_source(cfg)
    check_sampler(cfg)
    graded = used_tasks(cfg, "eval") + used_tasks(cfg, "data") * cfg.distill.correct_only
    if not all(task.name for task in graded):
        raise ValueError("task.name is missing; eval.source and distill.correct_only need a grader")


def check_teacher_source(cfg: Config) -> None:
    """A teacher whose weights are not loaded: phase distill only, and one teacher."""
    source = cfg.teacher.source
    if (source == "cache") != bool(cfg.teacher.cache):
        raise ValueError(
            f"teacher.cache = {cfg.teacher.cache!r} with teacher.source = {source!r}; want both, "
            'source = "cache" and the folder <run>/cache of a run of phase = "cache", or neither'
        )
    if source == "local":
        return
    if cfg.phase != "distill":
        raise ValueError(
            f"teacher.source = {source!r} with phase = {cfg.phase!r}; want 'local', or phase = "
            "'distill'"
        )
    if cfg.distill.more_teachers:
        raise ValueError(
            f"teacher.source = {source!r} with distill.more_teachers; want source = 'local' for "
            "several teachers"
        )
    if cfg.distill.privileged:
        raise ValueError(
            f"distill.privileged = {cfg.distill.privileged!r} with teacher.source = {source!r}; "
            "want 'local': only a teacher that is loaded reads another prompt"
        )
    if cfg.defence.changes_text:
        raise ValueError(
            f"{_defence(cfg)} with teacher.source = {source!r}: a defence changes what a local "
            "teacher samples; whoever serves a teacher sets its own. Use teacher.source = 'local'"
        )


def check_cached_teacher(cfg: Config) -> None:
    """A cache knows its own texts only, and the likeliest tokens of each position."""
    d = cfg.distill
    if cfg.teacher.source != "cache":
        return
    if d.on_policy > 0:
        raise ValueError(
            f"distill.on_policy = {d.on_policy} with teacher.source = 'cache': a cache cannot "
            "score the student's own texts. Set on_policy = 0.0, or source = 'local' or 'server'"
        )
    if (d.rewrite or d.paraphraser) and d.objective != "nll":
        raise ValueError(
            "distill.rewrite with teacher.source = 'cache': a cache has no rows for a rewritten "
            "text. Use objective = 'nll', or source = 'local'"
        )
    if d.objective == "class" or (d.objective == "span" and d.source == "dataset"):
        raise ValueError(
            f"distill.objective = {d.objective!r}, source = {d.source!r} with teacher.source = "
            "'cache': it asks the teacher for more than a cache holds. Use objective = 'kl' or "
            "'nll', or source = 'local'"
        )
    if d.objective == "kl" and d.tail == "full":
        raise ValueError(
            "distill.tail = 'full' with teacher.source = 'cache': it holds the likeliest tokens, "
            "or draws. Use tail = 'bucket' with its top_k, or 'sampled'"
        )
    if d.support != "teacher":
        raise ValueError(
            f"distill.support = {d.support!r} with teacher.source = 'cache': its ids were chosen "
            "before the student. Use support = 'teacher', or source = 'local'"
        )


def check_served_teacher(cfg: Config) -> None:
    """A server says the top-k of each position at temperature 1, and writes texts."""
    d = cfg.distill
    if cfg.teacher.source != "server":
        return
    if d.objective not in ("kl", "nll"):
        raise ValueError(
            f"distill.objective = {d.objective!r} with teacher.source = 'server': it asks the "
            "teacher for more than a server answers. Use 'kl' or 'nll', or source = 'local'"
        )
    if d.objective == "kl" and d.tail not in ("bucket", "renorm", "drop", "zero_outside_topk"):
        raise ValueError(
            f"distill.tail = {d.tail!r} with teacher.source = 'server': it answers the likeliest "
            "tokens. Use tail = 'bucket' with its top_k, which is exact, or source = 'local'"
        )
    if d.objective == "kl" and d.temperature != 1:
        raise ValueError(
            f"distill.temperature = {d.temperature} with teacher.source = 'server': what it "
            "answers holds at temperature 1; the tail at another is not known. Use temperature = "
            "1.0, or source = 'local'"
        )
    if d.support != "teacher":
        raise ValueError(
            f"distill.support = {d.support!r} with teacher.source = 'server'; want 'teacher', or "
            "source = 'local'"
        )


def check_sampler(cfg: Config) -> None:
    """Who samples, and what that excludes."""
    engine = cfg.rollout.engine
    if engine != "embedded" and cfg.defence.changes_text:
        raise ValueError(
            f"{_defence(cfg)} with rollout.engine = {engine!r}: a defence changes logits while "
            "they are decoded. Use rollout.engine = 'embedded'"
        )
    if cfg.policy.max_is and cfg.rollout.old_logp != "trainer":
        raise ValueError(
            f"policy.max_is = {cfg.policy.max_is} with rollout.old_logp = "
            f"{cfg.rollout.old_logp!r}: the weights compare the sampler's log-probabilities with "
            "the trainer's. Set rollout.old_logp = 'trainer'"
        )


def check_lora(cfg: Config) -> None:
    """Whether there is anything that adapters could be trained on."""
    if not cfg.lora.rank:
        if cfg.export.merge:
            raise ValueError("export.merge = true without [lora]: there is no adapter to merge")
        return
    if not cfg.trains:
        raise ValueError(
            f"lora.rank = {cfg.lora.rank} with phase = {cfg.phase!r}, which trains nothing; leave "
            "[lora] out. A saved adapter is read where model.path is its folder"
        )
    if cfg.model.from_scratch:
        raise ValueError(
            f"lora.rank = {cfg.lora.rank} with model.from_scratch = true: an adapter beside random "
            "weights is of no use; want a trained model, or rank = 0"
        )
    if cfg.reference.offload:
        raise ValueError(
            "reference.offload = true with lora.rank > 0: the reference is the policy with its "
            "adapter off, there is no second model to move. Leave it out"
        )


def check_prompts(cfg: Config) -> None:
    if not (cfg.data.source or cfg.data.parts):
        raise ValueError("data.source is missing; want prompts, e.g. 'train.jsonl'")


def check_minibatches(cfg: Config) -> None:
    prompts, count = cfg.rollout.prompts, cfg.policy.minibatches
    if prompts % count:
        raise ValueError(
            f"rollout.prompts = {prompts} with policy.minibatches = {count}: each mini-batch holds "
            f"the same number of whole groups. Use a multiple of {count}, for instance "
            f"{-(-prompts // count) * count}"
        )


def check_no_gates(cfg: Config) -> None:
    """No [accept] and no eval.harness: they belong to phase = 'evaluate'."""
    if cfg.accept:
        raise ValueError(
            f"accept.{next(iter(cfg.accept))} with phase = {cfg.phase!r}: an exported model is "
            "evaluated by a run of its own. Put [accept] into a config with phase = 'evaluate'"
        )
    if cfg.eval.harness:
        raise ValueError(
            f"eval.harness = {list(cfg.eval.harness)} with phase = {cfg.phase!r}; want phase = "
            "'evaluate' on the exported folder"
        )


def check_no_defence(cfg: Config) -> None:
    if cfg.defence.changes_text:
        raise ValueError(
            f"{_defence(cfg)} with phase = {cfg.phase!r}; want phase = 'distill' (its teacher is "
            "served) or 'evaluate'"
        )


def check_calibrate(cfg: Config) -> None:
    check_prompts(cfg)
    check_minibatches(cfg)
    check_no_gates(cfg)
    check_no_defence(cfg)
    trained = used_tasks(cfg, "data")
    if not all(task.name for task in trained):
        raise ValueError(
            "task.name is missing; calibration needs a task reward, which keeps the teacher's "
            "accuracy up"
        )
    if cfg.calibration.mode != "off" and not cfg.proxy.path:
        raise ValueError(
            f"proxy.path is missing; calibration.mode = {cfg.calibration.mode!r} needs a frozen "
            "proxy"
        )
    judged = any(task.name == "reward_model" for task in trained)
    if judged and cfg.calibration.cal_gate == "skip_degenerate":
        raise ValueError(
            "calibration.cal_gate = 'skip_degenerate' with task.name = 'reward_model': its grades "
            "are neither correct nor incorrect and never equal, so no group would be skipped. Use "
            "'scale_by_task_std' or 'none'"
        )
    if cfg.calibration.margin_guarded and cfg.calibration.eta and not cfg.reference.beta:
        raise ValueError(
            "calibration.mode = 'undistillable' with reference.beta = 0.0 and "
            "calibration.margin_guard = true: the guard holds the strength in use below 0.75 beta "
            "std_cal, which is 0, so nothing would be calibrated. Set reference.beta above 0 (0.04 "
            "is the default), or margin_guard = false and watch reference_kl"
        )
    if cfg.rollout.group < 2:
        raise ValueError(
            f"rollout.group = {cfg.rollout.group}; want >= 2, rewards are normalised inside the "
            "group"
        )
    if (
        cfg.calibration.score_norm == "length_free"
        and cfg.calibration.eta
        and cfg.rollout.group < 3
    ):
        raise ValueError(
            f"rollout.group = {cfg.rollout.group} with calibration.score_norm = 'length_free'; "
            "want >= 3: two texts are always on one line, so nothing would be left. Or score_norm "
            "= 'sum'"
        )
    if cfg.rollout.top_p < 1 or cfg.rollout.top_k:
        raise ValueError(
            f"rollout.top_p = {cfg.rollout.top_p}, top_k = {cfg.rollout.top_k}: the policy ratio "
            "is that of the full softmax, which is not what is sampled from. Set top_p = 1 and "
            "top_k = 0"
        )


def check_distill(cfg: Config) -> None:
    check_prompts(cfg)
    check_minibatches(cfg)
    check_no_gates(cfg)
    check_cached_teacher(cfg)
    check_served_teacher(cfg)
    d, r = cfg.distill, cfg.rollout
    if d.correct_only and any(task.name == "reward_model" for task in used_tasks(cfg, "data")):
        raise ValueError(
            "distill.correct_only with task.name = 'reward_model': its grades are neither correct "
            "nor wrong, so no text would pass. Use another task, or leave correct_only out"
        )
    if d.objective == "policy_gradient" and (r.temperature, r.top_p, r.top_k) != (1.0, 1.0, 0):
        raise ValueError(
            f"distill.objective = 'policy_gradient' with rollout.temperature = {r.temperature}, "
            f"top_p = {r.top_p}, top_k = {r.top_k}: the reward is of the student's full softmax. "
            "Set temperature = 1.0, top_p = 1.0, top_k = 0"
        )
    by_teacher = d.source == "teacher" and d.on_policy < 1
    if d.objective == "span" and by_teacher and (r.temperature, r.top_p, r.top_k) != (1.0, 1.0, 0):
        raise ValueError(
            f"distill.objective = 'span' with rollout.temperature = {r.temperature}, top_p = "
            f"{r.top_p}, top_k = {r.top_k}: a span's likelihood is that with which the teacher "
            "sampled it, and the student would learn that distribution, not the teacher's. Set "
            "temperature = 1.0, top_p = 1.0, top_k = 0"
        )
    if d.objective == "policy_gradient" and r.old_logp != "sampler":  # policy.max_is needs it
        raise ValueError(
            f"rollout.old_logp = {r.old_logp!r}, policy.max_is = {cfg.policy.max_is} with "
            "distill.objective = 'policy_gradient': its ratios are to the sampler's own "
            "log-probabilities. Leave both out, they are of phase = 'calibrate'"
        )
    if cfg.defence.changes_text and (d.objective != "nll" or d.source != "teacher"):
        raise ValueError(
            f"{_defence(cfg)} with distill.objective = {d.objective!r}, source = {d.source!r}: "
            "only sampled text is served with a defence; the teacher's logits are not. Use "
            "objective = 'nll' and source = 'teacher'"
        )


def check_measuring(cfg: Config) -> None:
    """Of a phase that reads models over prompts and trains none."""
    check_prompts(cfg)
    check_no_gates(cfg)
    check_no_defence(cfg)


def check_evaluate(cfg: Config) -> None:
    e = cfg.eval
    if not (e.asks and all(task.name for task in used_tasks(cfg, "eval"))):
        raise ValueError("phase = 'evaluate' needs eval.source and task.name")
    for task in used_tasks(cfg, "eval"):
        check_options(e, task.name)
    for name, rule in cfg.accept.items():
        if not rule.run and rule.metric not in e.metrics:
            measured = ", ".join(e.metrics) or "an evaluation that answers (eval.by, eval.samples)"
            raise ValueError(
                f"accept.{name}.metric = {rule.metric!r} is not measured; want {measured}, or "
                "change eval.by, eval.samples or eval.pass_at"
            )
    if cfg.defence.changes_text and (e.scores_options or e.harness):
        raise ValueError(
            f"{_defence(cfg)} with eval.by = {e.by!r}, eval.harness = {list(e.harness)}: only "
            "generated answers are served with a defence. Use eval.by = 'generation', no harness"
        )


def _defence(cfg: Config) -> str:
    d = cfg.defence
    named = f"defence.proxy = {d.proxy!r}, defence.temperature = {d.temperature}"
    copies = f"defence.antidistillation = {d.antidistillation!r}"
    return f"{named}, {copies}" if d.antidistillation else named
