"""Whether concepts cause what their words say: edits of every concept, and what they change.

    words     the words of concepts as tokens, and other words that are as likely
    changes   what edits change in a batch, gradients that estimate it, losses of spliced states
    scores    a score per concept, with an interval and a null; the loss recovered
    record    the result, and causal.json beside the concepts
    stage     the whole of it for a dictionary and its samples

Examples:
    >>> from xlvlm_jax import causal
    >>> causal.share(own=0.3, others=0.1).round(2).item()
    0.75
"""

from ports import lazy_names

lazy_names.attach(__name__)
