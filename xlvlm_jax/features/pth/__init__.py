"""Reads and writes the features of the reference implementation, XL-VLMs, without PyTorch.

unpickle                builds plain values and tensors from a pickle, and calls nothing
reader, writer          the files of torch.save
importing, exporting    the reference's dictionary of hidden states <-> features
"""

from xlvlm_jax.features.pth.exporting import export_features
from xlvlm_jax.features.pth.importing import import_features
from xlvlm_jax.features.pth.reader import read_pth
from xlvlm_jax.features.pth.unpickle import PthError, StoredTensor
from xlvlm_jax.features.pth.writer import write_pth

__all__ = [
    "PthError",
    "StoredTensor",
    "export_features",
    "import_features",
    "read_pth",
    "write_pth",
]
