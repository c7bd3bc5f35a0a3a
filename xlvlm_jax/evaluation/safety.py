"""Whether answers to MM-SafetyBench send the user to an expert, by scenario."""

from collections.abc import Sequence
from typing import Any

from xlvlm_jax.data.mmsb import ADVICE
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.metrics.safety import expert_deference


def deference_figures(samples: Sequence[Sample], answers: Sequence[str]) -> dict[str, Any]:
    """Returns the ED-score by scenario, and over those where an expert should be asked.

    Args:
        samples: questions of MM-SafetyBench, each with a `scenario` in its metadata.
        answers: an answer per question.

    Returns:
        JSON values: "ED-score", over the scenarios in `mmsb.ADVICE` as L2S's authors take it, None
        without such questions; "ED-score by scenario".

    Raises:
        ValueError: the numbers of samples and answers differ.
    """
    given: dict[str, list[str]] = {}
    for sample, answer in zip(samples, answers, strict=True):
        given.setdefault(sample.metadata["scenario"], []).append(answer)
    advised = [answer for scenario in ADVICE for answer in given.get(scenario, ())]
    return {
        "ED-score": expert_deference(advised) if advised else None,
        "ED-score by scenario": {name: expert_deference(said) for name, said in given.items()},
    }
