"""Scores any dictionary on drawn pictures whose contents are known, and ranks dictionaries.

    known_pictures   pictures, what they show, and a model's states on them
    dictionaries     learnt here by a method's name, or read from the files of any tool
    sparsity         the same number of active concepts for all
    measures         names, ranges, and which direction is better
    scoring          the scores of one dictionary
    ranking          places, and whether they hold over seeds
    stage            the whole of it, resumable

Examples:
    >>> import numpy as np
    >>> from xlvlm_jax import concept_benchmark
    >>> concept_benchmark.rank(np.array([[0.9], [0.5], [0.7]]), [True])[:, 0].tolist()
    [1.0, 3.0, 2.0]
"""

from ports import lazy_names

lazy_names.attach(__name__)
