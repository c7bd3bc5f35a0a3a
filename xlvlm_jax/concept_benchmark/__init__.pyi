# What `xlvlm_jax.concept_benchmark` exports, imported at first use (see ports/lazy_names.py).
from xlvlm_jax.concept_benchmark.dictionaries import (
    Entry,
    learn,
    parse_entry,
    random_dictionary,
    read,
)
from xlvlm_jax.concept_benchmark.known_pictures import (
    KnownPictures,
    Pictures,
    load_or_make,
    make_pictures,
)
from xlvlm_jax.concept_benchmark.measures import MEASURES, Measure
from xlvlm_jax.concept_benchmark.ranking import agreement, rank
from xlvlm_jax.concept_benchmark.scoring import Ground, Scores, prepare_ground, score_dictionary
from xlvlm_jax.concept_benchmark.sparsity import with_mean_l0
from xlvlm_jax.concept_benchmark.stage import Benchmark, Line, Settings, run_benchmark

__all__ = [
    "MEASURES",
    "Benchmark",
    "Entry",
    "Ground",
    "KnownPictures",
    "Line",
    "Measure",
    "Pictures",
    "Scores",
    "Settings",
    "agreement",
    "learn",
    "load_or_make",
    "make_pictures",
    "parse_entry",
    "prepare_ground",
    "random_dictionary",
    "rank",
    "read",
    "run_benchmark",
    "score_dictionary",
    "with_mean_l0",
]
