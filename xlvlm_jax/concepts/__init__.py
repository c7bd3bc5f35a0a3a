"""Concepts: finding them, storing them, reading them as words and images, and scoring them.

record            `Concepts`, and their directory on disk
methods           the methods and their options
decomposition     `decompose` and `project`
reconstruction    from activations back to states
grounding         words and images
estimators        the same methods as scikit-learn estimators
stage             from one directory to the next, for the command line
scores            how good concepts are
"""

from ports import lazy_names

lazy_names.attach(__name__)
