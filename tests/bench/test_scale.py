"""The scale model: parameter counts of the models, limits that it has to have, and the page."""

from dataclasses import replace

import pytest

from bench.scale import (
    GEMMA3_1B,
    GEMMA3_12B,
    PAGE,
    PAIRS,
    QWEN3_06B,
    QWEN3_8B,
    QWEN3_32B,
    Machine,
    Work,
    page_part,
    plan,
)

BILLIONS = {QWEN3_8B: 8.19, QWEN3_06B: 0.596, QWEN3_32B: 32.76, GEMMA3_12B: 11.77, GEMMA3_1B: 1.0}


@pytest.mark.parametrize("model", BILLIONS, ids=lambda m: m.name)
def test_parameters_are_those_of_the_model_cards(model):
    assert model.parameters / 1e9 == pytest.approx(BILLIONS[model], rel=0.01)


def test_the_page_shows_what_the_script_counts():
    assert f"<!-- model -->\n{page_part()}\n<!-- end -->" in PAGE.read_text(), (
        "python -m bench.scale --write"
    )


@pytest.mark.parametrize("engine", [True, False])
def test_limits(engine):
    m, w = Machine(), Work()
    for policy, proxy in PAIRS:
        plans = [plan(policy, proxy, n, engine=engine, m=m, w=w) for n in (8, 64, 1024)]
        assert plans[0].step_s > plans[1].step_s and plans[0].hours < plans[1].hours
        faster = replace(m, bandwidth=2 * m.bandwidth, launch=m.launch / 2)
        assert plan(policy, proxy, 8, engine=engine, m=faster, w=w).sample_s < plans[0].sample_s
        longer = plan(policy, proxy, 8, engine=engine, m=m, w=replace(w, response=2048, mean=1000))
        assert longer.hours > 1.9 * plans[0].hours
        assert all(p.tokens_per_s == pytest.approx(p.responses * w.mean / p.step_s) for p in plans)
