"""Settings of fine-tuning: steps, learning rates, weight decay, messages."""

import jax.numpy as jnp
import pytest

from xlvlm_jax.finetune import FinetuneSettings


def test_steps_by_hand():
    assert FinetuneSettings(epochs=2, batch_size=4, accumulate=2).num_steps(100) == 25
    assert FinetuneSettings(batch_size=16).num_steps(3) == 1
    assert FinetuneSettings(steps=7, epochs=2).num_steps(100) == 7


def test_learning_rates_by_hand():
    rate = FinetuneSettings(rate=1.0, warmup=0.4, schedule="linear").learning_rate(10)
    expected = [0.2, 0.4, 0.6, 0.8, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert [float(rate(step)) for step in range(10)] == pytest.approx(expected)
    rate = FinetuneSettings(rate=1.0, warmup=0.0, schedule="cosine").learning_rate(4)
    assert [float(rate(s)) for s in (0, 2, 4)] == pytest.approx([1, 0.5, 0], abs=1e-6)
    rate = FinetuneSettings(rate=0.5, warmup=0.5, schedule="constant").learning_rate(4)
    assert float(rate(100)) == 0.5


def test_weights_decay_and_biases_do_not():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    settings = FinetuneSettings(rate=0.1, warmup=0.0, schedule="constant", weight_decay=0.5)
    transform = settings.optimizer(10)
    nothing = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    change, _ = transform.update(nothing, transform.init(params), params)
    assert change["kernel"].tolist() == [[pytest.approx(-0.05)] * 2] * 2
    assert change["bias"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "dora"}, "method must be one of lora, full; got 'dora'"),
        ({"schedule": "steps"}, "schedule must be one of cosine, linear, constant"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"rate": float("nan")}, "rate must be above 0, got nan"),
        ({"warmup": 2.0}, "warmup must be between 0 and 1"),
        ({"targets": "q_proj"}, r"the text 'q_proj'; expected several patterns, .* \['q_proj'\]"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"method": "full", "targets": ("q_proj",)}, "method 'full' trains all parameters; leave"),
    ],
)
def test_messages(values, message):
    with pytest.raises(ValueError, match=message):
        FinetuneSettings(**values)


def test_targets_may_be_a_list():
    assert hash(FinetuneSettings(targets=["q_proj"])) == hash(FinetuneSettings(targets=("q_proj",)))
