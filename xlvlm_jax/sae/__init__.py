"""Sparse autoencoders: dictionaries of thousands of features, from the files of any trainer.

`dictionary` holds what is computed, `saelens`, `scopes`, `dictionary_learning` and `overcomplete`
read the files, `sharing` says what the two sources of a crosscoder share.

Examples:
    >>> import numpy as np
    >>> from xlvlm_jax import sae
    >>> params = {"W_enc": np.eye(2), "W_dec": np.eye(2), "b_enc": [-1, -1], "b_dec": [0, 0]}
    >>> dictionary = sae.Dictionary.of(params, sae.Settings("topk", k=1))
    >>> dictionary.reconstruct(np.float32([[3, 2]])).tolist()
    [[2.0, 0.0]]
"""

from ports import lazy_names

lazy_names.attach(__name__)
