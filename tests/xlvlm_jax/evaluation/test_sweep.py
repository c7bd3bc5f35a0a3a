"""Which conditions are tried, and which one is chosen."""

import math

import numpy as np
import pytest

from xlvlm_jax import SteeringVector, evaluation
from xlvlm_jax.evaluation import Condition, Trial

A, B = (SteeringVector(np.ones(4, np.float32), f"model.layers.{i}") for i in (3, 5))


def trial(alpha: float, effect: float, cost: float) -> Trial:
    return Trial(Condition((A,), alpha), effect, cost, 0.0)


def test_a_grid_is_every_combination():
    conditions = evaluation.grid([A, (A, B)], [0.5, 1.0], ["all", {"from": 3}])
    assert len(conditions) == len(set(map(str, conditions))) == 8
    assert conditions[0] == Condition((A,), 0.5, "all")
    assert conditions[-1].describe() == {
        "sites": ["model.layers.3", "model.layers.5"],
        "edit": "add",
        "alpha": 1.0,
        "where": {"from": 3},
    }


def test_names_say_what_tells_conditions_apart():
    assert evaluation.names([Condition((A,))]) == ["steered"]
    assert evaluation.names(evaluation.grid([A, B], [0.5, 1])) == [
        "3 x 0.5",
        "3 x 1",
        "5 x 0.5",
        "5 x 1",
    ]
    assert evaluation.names(evaluation.grid([A], [1], ["all", {"from": 3}])) == ["all", "from 3"]
    assert evaluation.names([Condition((A,)), Condition((A,))]) == ["1", "2"]
    both = [Condition((A,), edit=edit) for edit in ("add", "ablate")]
    assert evaluation.names(both) == ["add", "ablate"]


def test_the_least_cost_among_those_that_reach_the_target():
    trials = [trial(1, 1.0, 9), trial(0.9, 0.97, 3), trial(0.8, 0.95, 1), trial(0.7, 0.8, 0)]
    assert evaluation.choose(trials, 0.95, 5) is trials[2]
    # Nothing is strong enough within the cost: the strongest within it.
    assert evaluation.choose(trials, 0.99, 5) is trials[1]
    # Nothing is within the cost: the least.
    assert evaluation.choose(trials[:2], 0.95, 2) is trials[1]


def test_what_cannot_be_measured_is_not_chosen():
    unknown = trial(1, math.nan, 0)
    assert unknown.describe()["effect"] is None
    assert evaluation.choose([unknown, trial(2, 0.1, 1)], 0.5, 5).condition.alpha == 2
    with pytest.raises(ValueError, match="none of 1 trials has an effect"):
        evaluation.choose([unknown], 0.5, 5)
