"""verl brings the plugin into a process by itself, by the name that the pages give."""

import os
import subprocess
import sys

import pytest

NAME = "reflux.trainer.integrations.verl_plugin"
ASKED = """
from verl.workers.config import DistillationLossConfig
from verl.utils.experimental import torch_functional
mode = DistillationLossConfig(loss_mode="reflux_reverse_topk", use_policy_gradient=False)
print(mode.loss_settings.use_topk, type(torch_functional.FusedLinearForPPO()).__module__)
"""


@pytest.mark.skipif(
    os.environ.get("REFLUX_INTEGRATIONS") != "verl", reason="make test-integrations installs verl"
)
def test_the_environment_variable_is_enough():
    environ = os.environ | {"VERL_USE_EXTERNAL_MODULES": NAME}
    command = [sys.executable, "-c", ASKED]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["True", NAME.replace("plugin", "losses")]
