"""axolotl's trainer with a teacher; axolotl_plugin names it to axolotl."""

from typing import Any

from axolotl.core.trainers.base import AxolotlTrainer

from reflux.trainer.integrations.transformers_trainer import Distils


class AxolotlDistillTrainer(Distils, AxolotlTrainer):
    """set_teacher is called before the first batch, by the plugin's post_trainer_create."""

    def compute_loss(self, *args: Any, **more: Any) -> Any:
        if not hasattr(self, "teacher"):
            raise ValueError(
                "no teacher: want RefluxPlugin.post_trainer_create, which axolotl train calls"
            )
        return super().compute_loss(*args, **more)
