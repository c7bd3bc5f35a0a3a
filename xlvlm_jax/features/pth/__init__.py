"""Saved features of the reference implementation, XL-VLMs, read and written without PyTorch.

unpickle            a machine that builds plain values and tensors from a pickle and calls nothing
pth, pth_writer     the files of torch.save, read and written
foreign, export     the reference's dictionary of hidden states <-> a directory of features
"""

from xlvlm_jax.interop.export import export_features
from xlvlm_jax.interop.foreign import import_features
from xlvlm_jax.interop.pth import read_pth
from xlvlm_jax.interop.pth_writer import write_pth
from xlvlm_jax.interop.unpickle import PthError, StoredTensor

__all__ = [
    "PthError",
    "StoredTensor",
    "export_features",
    "import_features",
    "read_pth",
    "write_pth",
]
