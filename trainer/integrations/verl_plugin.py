"""What VERL_USE_EXTERNAL_MODULES names: importing it brings our losses into a process of verl's.

VERL_USE_EXTERNAL_MODULES=reflux.trainer.integrations.verl_plugin python -m verl.trainer.main_ppo
"""

from reflux.trainer.integrations import verl_losses

verl_losses.register_distillation_losses()
verl_losses.use_in_fused_kernels()
