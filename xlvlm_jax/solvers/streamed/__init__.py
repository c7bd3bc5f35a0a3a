"""The solvers on a Z that need not fit into memory: rows come tile by tile from a source.

An update needs nothing of the rows but sums, so that it is the update of the solvers in memory,
with one pass over the source instead of one over an array. semi-NMF and k-means are first solved in
few columns (see `compression`), which do fit: a pass to find them, a pass to compute them. Then
updates pass over the source until the method's stopping rule ends them.

In memory are a tile, its successor that is being read, and what every row keeps: R compressed
columns and, for semi-NMF, two rows of K codes. N rows, D width, K concepts, B rows of a tile.
"""

from xlvlm_jax.solvers.streamed import kmeans, pca, semi_nmf
from xlvlm_jax.solvers.streamed.tiles import Source

__all__ = ["Source", "kmeans", "pca", "semi_nmf"]
