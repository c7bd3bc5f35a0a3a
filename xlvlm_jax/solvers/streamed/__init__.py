"""Solvers for a Z that need not fit into memory: rows come tile by tile from a source.

An update needs only sums over the rows, so it is the same update as in memory, with one pass over
the source instead of one over an array. Semi-NMF and k-means are first solved in few columns (see
`compression`), which do fit: one pass finds them, one computes them. Then updates pass over the
source until the method's stopping rule ends them.

Memory holds one tile, the next tile being read, and what is kept per row: R compressed columns and,
for semi-NMF, two rows of K codes. The columns are computed, rotated and solved in one array, which
a CPU uses where it is; another device keeps them while it solves. Their programs are compiled
before they take memory, and what compiling took is given back.

N rows, D width, K concepts, B rows per tile.
"""

from xlvlm_jax.solvers.streamed import kmeans, pca, semi_nmf
from xlvlm_jax.solvers.streamed.tiles import Source

__all__ = ["Source", "kmeans", "pca", "semi_nmf"]
