"""Steering: fits, saves and loads vectors, maps and networks that shift a model's hidden states.

    coarse    mean(target states) - mean(source states)           steering_vector, fit_coarse
    pca       along the first principal direction of differences    fit_direction, pca_vector
    lat       linear artificial tomography                        fit_direction, lat_vector
    probe     along the normal of a linear probe                  fit_direction, probe_vector
    iti       outputs of the heads that tell answers apart best   fit_iti
    adaptive  up to the mean target state along coarse (ASTRA)    fit_adaptive
    conditional  coarse, where states are like source states     fit_conditional
    memory    the difference within the state's cluster           fit_memory
    sae       decoder rows of a few features of an autoencoder    fit_sae_vector
    sae-clamp codes of a few features, set to their target means  fit_sae_clamp, clamp_features
    fine      centroid_j - centroid_i of the source states        fine_vectors, fit_fine
    learned   the shift that makes the wanted answers likely      fit_learned
    l2s       a network from the prompt's state to the shift      fit_l2s
    p2s       a shift for each sample, from forced answers        fit_p2s
    vti-image what masking pictures does, a vector per layer      fit_vti_image
    vti-text  what the vectors of samples share, per layer        fit_vti_text

Each has `save` and `load`, and returns the edits (changes of states) that `ports.steer` and
`VLM.generate` take.
"""

from pathlib import Path
from typing import Any

from xlvlm_jax.features.reader import samples_of
from xlvlm_jax.steering import files
from xlvlm_jax.steering.adaptive import (
    AdaptiveVector,
    VectorMemory,
    fit_adaptive,
    fit_conditional,
    fit_memory,
)
from xlvlm_jax.steering.directions import (
    lat_vector,
    pca_vector,
    principal_direction,
    probe_vector,
)
from xlvlm_jax.steering.fit import AnswerStates, answer_states, fit_coarse, fit_direction, fit_fine
from xlvlm_jax.steering.iti import fit_iti
from xlvlm_jax.steering.l2s import L2S, fit_l2s
from xlvlm_jax.steering.learned import LowRankMap, fit_learned
from xlvlm_jax.steering.lessons import (
    Contrast,
    Lesson,
    contrast_labels,
    contrast_prompts,
    forced_answers,
    lesson,
    read_contrasts,
)
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
from xlvlm_jax.steering.sae_features import (
    FeatureClamp,
    clamp_features,
    fit_sae_clamp,
    fit_sae_vector,
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
from xlvlm_jax.steering.vti import fit_vti_image, fit_vti_text

__all__ = [
    "L2S",
    "METHODS",
    "AdaptiveVector",
    "AnswerStates",
    "Contrast",
    "FeatureClamp",
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
    "VectorMemory",
    "answer_shift",
    "answer_states",
    "clamp_features",
    "concept_vectors",
    "contrast_labels",
    "contrast_prompts",
    "export_vectors",
    "fine_vectors",
    "fit_adaptive",
    "fit_coarse",
    "fit_conditional",
    "fit_direction",
    "fit_fine",
    "fit_iti",
    "fit_l2s",
    "fit_learned",
    "fit_memory",
    "fit_p2s",
    "fit_sae_clamp",
    "fit_sae_vector",
    "fit_vti_image",
    "fit_vti_text",
    "forced_answers",
    "import_l2s",
    "import_sample_vectors",
    "import_vector",
    "lat_vector",
    "lesson",
    "load",
    "main_answers",
    "method_named",
    "pca_vector",
    "principal_direction",
    "probe_vector",
    "rank_vectors",
    "read_contrasts",
    "samples_of",
    "shift_vectors",
    "steering_vector",
    "top_by_lead",
]

_KINDS: dict[str, Any] = {
    **{kind.KIND: kind for kind in (SteeringVector, LowRankMap)},
    "l2s": L2S,
    "sample vectors": SampleVectors,
    "site vectors": SiteVectors,
    **{kind.KIND: kind for kind in (AdaptiveVector, VectorMemory, FeatureClamp)},
}


def load(path: str | Path) -> Any:
    """Reads a saved vector, map, network, or vectors of samples or sites.

    Runs on the host and cannot be traced.

    Args:
        path: the .safetensors file.

    Returns:
        What was saved there: a `SteeringVector`, `LowRankMap`, `L2S`, `SampleVectors`,
        `SiteVectors`, `AdaptiveVector`, `VectorMemory` or `FeatureClamp`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file holds something else, or is a directory.
    """
    kind = files.read(path)[0]
    if kind not in _KINDS:
        *others, last = map(repr, _KINDS)
        raise ValueError(f"{path} holds {kind!r}; expected {', '.join(others)} or {last}")
    return _KINDS[kind].load(path)
