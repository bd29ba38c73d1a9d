"""Torch's random numbers go on after a restart where they were."""

import torch

from reflux.trainer.engine.random_state import RandomState


def test_numbers_go_on_where_the_saved_ones_were():
    state = RandomState(3, torch.device("cpu"))
    saved = state.state_dict()
    assert list(saved) == ["cpu-3"]
    wanted = torch.rand(5)
    state.load_state_dict(saved)
    torch.rand(7)  # what building a frozen model draws
    state.apply()
    assert torch.equal(torch.rand(5), wanted)
    after = torch.rand(3)
    state.apply()  # a second time it does nothing
    assert not torch.equal(torch.rand(3), after)


def test_a_held_state_is_saved_instead_of_the_one_of_now():
    state = RandomState(0, torch.device("cpu"))
    held = state.read()
    wanted = torch.rand(5)
    state.held = held
    state.load_state_dict(state.state_dict())
    state.held = None
    state.apply()
    assert torch.equal(torch.rand(5), wanted)


def test_nothing_is_drawn_differently_by_looking():
    torch.manual_seed(5)
    wanted = torch.rand(4)
    torch.manual_seed(5)
    state = RandomState(0, torch.device("cpu"))
    state.state_dict(), state.read(), state.apply()
    assert torch.equal(torch.rand(4), wanted)
