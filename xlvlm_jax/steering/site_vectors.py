"""Vectors of several sites that steer together, in one file: layers at once, or attention heads."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ports import VLM
from ports.intervene.edits import Edit, add
from ports.messages import counted, few
from xlvlm_jax.steering import files
from xlvlm_jax.steering.vectors import SteeringVector

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True, repr=False)
class SiteVectors:
    """Steering vectors of several sites, all of which are added with one strength.

    Attributes:
        vectors: {site: float32[D]}, where D may differ from site to site.
        source: how and on what they were fitted, as JSON values.
        where: the token positions they are meant for, see `ports.add`.

    Examples:
        >>> import numpy as np
        >>> from xlvlm_jax.steering import SiteVectors
        >>> both = SiteVectors({"layers.0": np.float32([1, 0]), "layers.1": np.float32([0, 1])})
        >>> edits = both.edits(alpha=2.0)
        >>> {site: edit(np.zeros((1, 2), "float32")).tolist() for site, edit in edits.items()}
        {'layers.0': [[2.0, 0.0]], 'layers.1': [[0.0, 2.0]]}
    """

    vectors: Mapping[str, Array]
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    where: Any = "all"

    @classmethod
    def of(cls, vectors: Sequence[SteeringVector]) -> "SiteVectors":
        """Joins vectors of different sites of one model, fitted alike.

        Args:
            vectors: each at its own site.

        Returns:
            The vectors, with what all their sources say.

        Raises:
            ValueError: there are none, two have the same site, or they are of different models or
                meant for different positions. A vector that does not say its model passes.
        """
        sites = [vector.site for vector in vectors]
        if not sites or len(set(sites)) < len(sites):
            raise ValueError(
                f"vectors of the sites {few(sites) or 'none'} can't be joined; expected one or "
                "more, each of another site"
            )
        first = vectors[0]
        for vector in vectors:
            ours, theirs = files.plain(first.where), files.plain(vector.where)
            if ours != theirs:
                raise ValueError(
                    f"cannot join vectors of where {ours} and {theirs}; expected the same where"
                )
        model = files.common_model([vector.source for vector in vectors], "join")
        shared = {
            name: value
            for name, value in first.source.items()
            if all(name in v.source and v.source[name] == value for v in vectors)
        }
        joined = {vector.site: np.asarray(vector.vector, np.float32) for vector in vectors}
        return cls(joined, shared | model, first.where)

    def __repr__(self) -> str:
        return f"SiteVectors({counted(len(self.vectors), 'site')}: {self.site})"

    def _repr_html_(self) -> str:
        widths = sorted({len(vector) for vector in self.vectors.values()})
        return files.as_html(self, sites=len(self.vectors), width=few(widths))

    @property
    def site(self) -> str:
        """The sites in short, for tables."""
        return few(self.vectors, 2)

    def at(self, site: str) -> SteeringVector:
        """Returns the vector of one site.

        Raises:
            ValueError: there is none.
        """
        if site not in self.vectors:
            raise ValueError(
                f"there is no vector for {site!r}; expected one of {few(self.vectors)}"
            )
        return SteeringVector(self.vectors[site], site, self.source, self.where)

    def edits(self, alpha: Any = 1.0, where: Any = None) -> dict[str, Edit]:
        """Returns the edits that `VLM.generate` takes.

        Args:
            alpha: the strength of every vector, see `ports.add`.
            where: the token positions; None for those they are meant for.

        Returns:
            {site: edit}.
        """
        where = self.where if where is None else where
        return {site: add(vector, alpha, where) for site, vector in self.vectors.items()}

    def edits_for(
        self, vlm: VLM, inputs: Any, alpha: Any = 1.0, where: Any = None
    ) -> dict[str, Edit]:
        """Returns `edits` for a model; they do not depend on the inputs.

        Args:
            vlm: the model to steer.
            inputs: not used.
            alpha, where: as for `edits`.

        Returns:
            {site: edit}.

        Raises:
            ValueError: the vectors were fitted on another model.
        """
        files.require_fitted_model(self.source, vlm)
        return self.edits(alpha, where)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with a tensor per site; makes missing parent directories."""
        rest = {"sites": list(self.vectors), "where": self.where, "source": self.source}
        files.save(path, "site vectors", self.vectors, rest)

    @classmethod
    def load(cls, path: str | Path) -> "SiteVectors":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file holds something else, or NaN.
        """
        tensors, rest = files.read_as(path, "site vectors")
        files.require_numbers(path, tensors)
        with files.assembling(path):
            # safetensors sorts by name.
            vectors = {site: tensors[site] for site in rest.pop("sites")}
            return cls(vectors, **rest)
