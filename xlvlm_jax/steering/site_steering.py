"""What is shared by steering at one site that is the same for every prompt: use, save, load."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ports import VLM
from ports.intervene.edits import Edit
from ports.tables import kind
from xlvlm_jax.steering import files

Own = TypeVar("Own", bound="SiteSteering")


class SiteSteering:
    """The base of frozen dataclasses with arrays and the fields `site`, `source` and `where`.

    Attributes:
        KIND: how a file names it.
        TENSORS: the fields that are stored as arrays; the others are stored as JSON values.
        site: the site whose states it changes.
        source: how and on what it was fitted, as JSON values; "model" and "fingerprint" identify
            the checkpoint.
        where: the token positions it is meant for, see `ports.add`.
    """

    KIND: ClassVar[str]
    TENSORS: ClassVar[tuple[str, ...]]
    site: str
    source: dict[str, Any]
    where: Any

    def __repr__(self) -> str:
        arrays = ", ".join(f"{name} {kind(getattr(self, name))}" for name in self.TENSORS)
        return f"{type(self).__name__}({arrays} at {self.site!r}, where={self.where!r})"

    def _repr_html_(self) -> str:
        return files.as_html(self, **{name: kind(getattr(self, name)) for name in self.TENSORS})

    def edits(self, alpha: Any = 1.0, where: Any = None) -> dict[str, Edit]:
        """Returns the edits that `VLM.generate` takes.

        Args:
            alpha: the strength, see `ports.add`.
            where: the token positions; None for those it is meant for.

        Returns:
            {site: edit}.
        """
        raise NotImplementedError

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
            ValueError: it was fitted on another model.
        """
        files.require_fitted_model(self.source, vlm)
        return self.edits(alpha, where)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file; a missing parent directory is created."""
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        tensors = {name: getattr(self, name) for name in self.TENSORS}
        rest = {name: getattr(self, name) for name in names if name not in self.TENSORS}
        files.save(path, self.KIND, tensors, rest)

    @classmethod
    def load(cls: type[Own], path: str | Path) -> Own:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file holds something else, or NaN.
        """
        tensors, rest = files.read_as(path, cls.KIND)
        files.require_numbers(path, tensors)
        with files.assembling(path):
            return cls(**tensors, **rest)
