"""Steering: fits, saves and loads vectors, maps and networks that shift a model's hidden states.

    coarse    mean(target states) - mean(source states)           steering_vector, fit_coarse
    fine      centroid_j - centroid_i of the source states        fine_vectors, fit_fine
    learned   the shift that makes the wanted answers likely      fit_learned
    l2s       a network from the prompt's state to the shift      fit_l2s
    p2s       a shift for each sample, from forced answers        fit_p2s

Each has `save` and `load`, and returns the edits (changes of states) that `ports.steer` and
`VLM.generate` take.
"""

from pathlib import Path

from xlvlm_jax.features.reader import samples_of
from xlvlm_jax.steering import files
from xlvlm_jax.steering.fit import fit_coarse, fit_fine
from xlvlm_jax.steering.l2s import L2S, fit_l2s
from xlvlm_jax.steering.learned import LowRankMap, fit_learned
from xlvlm_jax.steering.lessons import Lesson, contrast_prompts, forced_answers, lesson
from xlvlm_jax.steering.methods import METHODS, Fitted, Method, Request, Steering, method_named
from xlvlm_jax.steering.pth import (
    export_vectors,
    import_l2s,
    import_sample_vectors,
    import_vector,
)
from xlvlm_jax.steering.rank import (
    MainAnswers,
    RankedVector,
    answer_shift,
    main_answers,
    rank_vectors,
    top_by_lead,
)
from xlvlm_jax.steering.sample_vectors import SampleVectors, fit_p2s
from xlvlm_jax.steering.site_vectors import SiteVectors
from xlvlm_jax.steering.vectors import (
    FineVectors,
    SteeringVector,
    concept_vectors,
    fine_vectors,
    shift_vectors,
    steering_vector,
)

__all__ = [
    "L2S",
    "METHODS",
    "FineVectors",
    "Fitted",
    "Lesson",
    "LowRankMap",
    "MainAnswers",
    "Method",
    "RankedVector",
    "Request",
    "SampleVectors",
    "SiteVectors",
    "Steering",
    "SteeringVector",
    "answer_shift",
    "concept_vectors",
    "contrast_prompts",
    "export_vectors",
    "fine_vectors",
    "fit_coarse",
    "fit_fine",
    "fit_l2s",
    "fit_learned",
    "fit_p2s",
    "forced_answers",
    "import_l2s",
    "import_sample_vectors",
    "import_vector",
    "lesson",
    "load",
    "main_answers",
    "method_named",
    "rank_vectors",
    "samples_of",
    "shift_vectors",
    "steering_vector",
    "top_by_lead",
]

_KINDS = {
    "vector": SteeringVector,
    "low-rank map": LowRankMap,
    "l2s": L2S,
    "sample vectors": SampleVectors,
    "site vectors": SiteVectors,
}


def load(path: str | Path) -> SteeringVector | LowRankMap | L2S | SampleVectors | SiteVectors:
    """Reads a saved vector, map, network, or vectors of samples or sites.

    Runs on the host and cannot be traced.

    Args:
        path: the .safetensors file.

    Returns:
        What was saved there.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file holds something else, or is a directory.
    """
    kind = files.read(path)[0]
    if kind not in _KINDS:
        *others, last = map(repr, _KINDS)
        raise ValueError(f"{path} holds {kind!r}; expected {', '.join(others)} or {last}")
    return _KINDS[kind].load(path)
