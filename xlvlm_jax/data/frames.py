"""Samples and other rows as pandas tables; pandas is needed here alone."""

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from xlvlm_jax.data.sample import Sample

if TYPE_CHECKING:
    import pandas


def pandas_module() -> ModuleType:
    """Returns pandas, imported when it is asked for.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import pandas
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "to_pandas needs pandas, which is not installed; run `pip install 'xlvlm-jax[pandas]'`"
        ) from None
    return pandas


def to_pandas(samples: Iterable[Sample | Mapping[str, Any]]) -> "pandas.DataFrame":
    """Returns a table with a line per sample and a column per value.

    Args:
        samples: as `load` gives them, or `Features.samples`. Mappings within a sample have a column
            per entry: "attributes.colour".

    Raises:
        ModuleNotFoundError: pandas is not installed.
    """
    rows = (sample.to_dict() if isinstance(sample, Sample) else sample for sample in samples)
    return pandas_module().json_normalize([dict(row) for row in rows])
