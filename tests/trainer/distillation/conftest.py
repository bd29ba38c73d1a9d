"""The texts and samples of a distillation, as they pass through the phase."""

import pytest

from reflux.trainer.distillation.phase import DistillPhase


@pytest.fixture
def seen(monkeypatch) -> dict[str, list]:
    """The texts and samples of every step."""
    calls: dict[str, list] = {"sample": [], "score": []}
    for name in calls:
        real = getattr(DistillPhase, name)

        def wrapped(self, *args, real=real, name=name):
            calls[name].append(real(self, *args))
            return calls[name][-1]

        monkeypatch.setattr(DistillPhase, name, wrapped)
    return calls
