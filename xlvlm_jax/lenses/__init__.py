"""Lenses: what the states at every layer and token would say, or resemble.

    reading       the logit lens: states through the final norm and the head
    jacobian      states carried to the last layer by the average Jacobian, then read the same way
    neighbours    the states of other tokens, in features on disk, that are nearest
    run           a lens on one prompt and the model's answer, for the page

Examples:
    >>> import numpy as np
    >>> from xlvlm_jax import lenses
    >>> lenses.nearest(np.float32([[2, 1]]), np.eye(2, dtype="float32"), 1).rows.tolist()
    [[0]]
"""

from ports import lazy_names

lazy_names.attach(__name__)
