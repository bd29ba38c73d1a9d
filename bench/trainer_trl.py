"""TRL as a worker of `python -m bench trainer`, in an environment of its own (build/trl/.venv):
trainer_trl.py JOB ASSETS RUNS

SFT: SFTTrainer. KD: GKDTrainer with lmbda = 0. On-policy: DistillationTrainer. GRPO: GRPOTrainer
without a reference model, as in ours. Sampling: transformers' generate. Everything that costs time
and changes no number is off: checkpointing, logging, saving.
"""

import itertools
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import trainer_jobs as jobs


def load(path: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def rows(assets: Path, job: str) -> list[dict]:
    """The data in the form that the trainer of a job takes."""
    found = [json.loads(line) for line in (assets / "data.jsonl").read_text().splitlines()]
    asked = [[{"role": "user", "content": row["prompt"]}] for row in found]
    if job in ("on_policy", "grpo"):
        return [{"prompt": messages} for messages in asked]
    answers = [[{"role": "assistant", "content": row["response"]}] for row in found]
    if job == "sft":
        return [{"prompt": a, "completion": b} for a, b in zip(asked, answers)]
    return [{"messages": a + b} for a, b in zip(asked, answers)]


def common(runs: Path) -> dict:
    return {
        "output_dir": str(runs),
        "per_device_train_batch_size": jobs.PROMPTS * jobs.GROUP,
        "learning_rate": jobs.LR,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_steps": 10**6,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": jobs.SEED,
        "dataloader_num_workers": 0,
    }


def reward_vowels(completions, **_) -> list[float]:
    return [float(text[0]["content"].count("a") % 5) for text in completions]


def build(job: str, assets: Path, runs: Path):
    from datasets import Dataset
    from transformers import AutoTokenizer

    data = Dataset.from_list(rows(assets, job))
    args, student = common(runs), load(assets / "student")
    side = {
        "train_dataset": data,
        "processing_class": AutoTokenizer.from_pretrained(assets / "student"),
    }
    if job == "sft":
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(student, args=SFTConfig(**args, max_length=256), **side)
    if job in ("kd_reverse", "kd_jsd"):
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        beta = 1.0 if job == "kd_reverse" else 0.5
        config = GKDConfig(**args, max_length=256, lmbda=0.0, beta=beta, temperature=1.0)
        return GKDTrainer(student, load(assets / "teacher"), args=config, **side)
    sampling = {"max_completion_length": jobs.NEW_TOKENS, "temperature": 1.0}
    if job == "on_policy":
        from trl import DistillationConfig, DistillationTrainer

        return DistillationTrainer(
            student, load(assets / "teacher"), DistillationConfig(**args, **sampling), **side
        )
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(**args, **sampling, num_generations=jobs.GROUP, beta=0.0)
    return GRPOTrainer(student, reward_vowels, args=config, **side)


def train(job: str, assets: Path, runs: Path) -> None:
    """One optimizer step for every line of the standard input."""
    from transformers import TrainerCallback

    class OneAtATime(TrainerCallback):
        """Waits before a step, reports behind it."""

        began = (0.0, 0.0)

        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 0:
                print("ready", flush=True)
            if not sys.stdin.readline():
                control.should_training_stop = True
                sys.exit(0)
            self.began = time.process_time(), time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            report = {
                "cpu_s": time.process_time() - self.began[0],
                "wall_s": time.perf_counter() - self.began[1],
                "peak_mib": jobs.peak_mib(),
            }
            print(json.dumps(report), flush=True)

    trainer = build(job, assets, runs)
    trainer.add_callback(OneAtATime())
    if hasattr(trainer, "_generate"):  # the share of sampling
        time_part(trainer, "_generate")
    trainer.train()


def time_part(trainer, name: str) -> None:
    """Prints the CPU seconds of a method as a line of its own, in front of the step's."""
    real = getattr(trainer, name)

    def timed(*args, **kwargs):
        start = time.process_time()
        result = real(*args, **kwargs)
        print(json.dumps({"sample_cpu_s": time.process_time() - start}), flush=True)
        return result

    setattr(trainer, name, timed)


def sampling_step(assets: Path):
    """transformers' generate on the same prompts and lengths as trainer_ours.py."""
    from transformers import AutoTokenizer, StoppingCriteria

    tokenizer = AutoTokenizer.from_pretrained(assets / "student", padding_side="left")
    model, count = load(assets / "student").eval(), itertools.count(0)
    prompts = [row["prompt"] for row in rows(assets, "grpo")]

    class EndsByLength(StoppingCriteria):
        def __init__(self, width: int):
            fraction_B = torch.tensor(jobs.TEXT_LENGTHS).repeat(jobs.PROMPTS)
            self.end_B = width + (fraction_B * jobs.NEW_TOKENS).round().long()

        def __call__(self, input_ids, scores, **_):
            return self.end_B <= input_ids.shape[1]

    def step() -> dict:
        first = next(count) * jobs.PROMPTS % len(prompts)
        asked = tokenizer.apply_chat_template(
            prompts[first : first + jobs.PROMPTS],
            add_generation_prompt=True,
            return_tensors="pt",
            padding=True,
            return_dict=True,
        )
        criteria = EndsByLength(asked["input_ids"].shape[1])
        with torch.no_grad():
            out = model.generate(
                **asked,
                do_sample=True,
                top_k=0,
                max_new_tokens=jobs.NEW_TOKENS,
                num_return_sequences=jobs.GROUP,
                stopping_criteria=[criteria],
            )
        width = asked["input_ids"].shape[1]
        lengths = (criteria.end_B - width).clamp(max=out.shape[1] - width)
        return {"tokens": int(lengths.sum())}

    return step


def main() -> None:
    job, assets, runs = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.manual_seed(jobs.SEED)
    if job == "sampling":
        jobs.answer_steps(sampling_step(assets))
    else:
        train(job, assets, runs)


if __name__ == "__main__":
    main()
