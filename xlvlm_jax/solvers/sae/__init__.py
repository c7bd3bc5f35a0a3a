"""Sparse autoencoders, trained: dictionaries of thousands of features, of which a row uses few.

training      loss, constraint, schedule, loop; what all methods share
topk, batchtopk, matryoshka, jumprelu, relu, archetypal   one method each, its formula at the head
transcoder, crosscoder   the same between two sites, or of two models at once
side_by_side  rows of two sources as one
start         scale, geometric median, first features
batches       rows in shuffled order, from memory or disk
selection, products, sharding   what a step is made of
checkpoint    states of an unfinished run
"""

from xlvlm_jax.solvers.sae.archetypal import Archetypal
from xlvlm_jax.solvers.sae.batchtopk import BatchTopK
from xlvlm_jax.solvers.sae.crosscoder import (
    BatchTopKCrosscoder,
    ReLUCrosscoder,
    TopKCrosscoder,
)
from xlvlm_jax.solvers.sae.jumprelu import JumpReLU
from xlvlm_jax.solvers.sae.matryoshka import Matryoshka
from xlvlm_jax.solvers.sae.relu import ReLU
from xlvlm_jax.solvers.sae.topk import TopK
from xlvlm_jax.solvers.sae.training import Trained, Training, train
from xlvlm_jax.solvers.sae.transcoder import (
    BatchTopKTranscoder,
    ReLUTranscoder,
    TopKTranscoder,
)

METHODS: dict[str, type[Training]] = {
    "topk-sae": TopK,
    "batchtopk-sae": BatchTopK,
    "jumprelu-sae": JumpReLU,
    "relu-sae": ReLU,
    "matryoshka-sae": Matryoshka,
    "archetypal-sae": Archetypal,
    "transcoder": ReLUTranscoder,
    "topk-transcoder": TopKTranscoder,
    "batchtopk-transcoder": BatchTopKTranscoder,
    "crosscoder": ReLUCrosscoder,
    "topk-crosscoder": TopKCrosscoder,
    "batchtopk-crosscoder": BatchTopKCrosscoder,
}

__all__ = ["METHODS", "Trained", "Training", "train"]
