"""Specs: impossible choices are errors, and on two ranks the models compute what they do on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reflux.trainer.engine.model_builder import build_spec


def test_choices_that_cannot_work_are_errors(assets, tmp_path):
    qwen2 = str(assets / "qwen2")
    for options, message in (
        (dict(backend="titan"), "want 'auto', 'native' or 'hf'"),
        (dict(attention="fast"), "want 'auto'"),
        (dict(backend="native"), "knows qwen3, llama and not 'qwen2'"),
    ):
        with pytest.raises(ValueError, match=message):
            build_spec(qwen2, **options)
    with pytest.raises(ValueError, match="no config.json"):
        build_spec(str(tmp_path))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            build_spec(qwen2, attention="flash_attention_2")


def test_two_ranks_compute_what_one_does(assets, tmp_path):
    """Two gloo processes, data and tensor parallel: logits, gradients, decoding, export as
    transformers' on one.
    """
    root = Path(__file__).parents[3]
    script = root / "tests" / "two_ranks_engine.py"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        + [str(script), str(assets), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("all equal") == 2
