"""Settings and summary of an extraction."""

import dataclasses
from typing import NamedTuple

from xlvlm_jax.features.manifest import STATE_DTYPES
from xlvlm_jax.features.selection import Selection

MODES = ("generate", "teacher-forcing")


@dataclasses.dataclass(frozen=True)
class ExtractionSettings:
    """What is extracted from each sample.

    Attributes:
        sites: sites whose states to capture; names, or patterns such as "layers.*" (see
            `VLM.find_sites`).
        selection: which positions of a sample become rows.
        mode: "generate" (greedy, whatever the checkpoint's do_sample says, like XL-VLMs; its
            penalties apply; states come from the decode loop) or "teacher-forcing" (one pass over
            the prompt and the first reference; layers after the last site are not computed).
        max_new_tokens: M, for generation.
        batch_size: B; the last batch is padded to it.
        dtype: dtype of the states on disk.

    Raises:
        ValueError: the mode, batch size, length or dtype is invalid, or there is no site.
    """

    sites: tuple[str, ...]
    selection: Selection
    mode: str = "generate"
    max_new_tokens: int = 20
    batch_size: int = 16
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}; got {self.mode!r}")
        if self.dtype not in STATE_DTYPES:
            raise ValueError(
                f"states are one of {', '.join(STATE_DTYPES)}; got dtype {self.dtype!r}"
            )
        if not self.sites:
            raise ValueError("no site to capture; name one from `xlvlm sites MODEL`")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class ExtractionSummary(NamedTuple):
    """What a run did; counts are of the whole directory, seconds of this run.

    Attributes:
        samples: samples that were processed.
        rows: stored states per site.
        without_token: samples in which the selection kept nothing.
        failed: (sample, reason) of each that was skipped: an image unreadable or refused, NaN.
        seconds: duration of this call.
        seconds_of: seconds that it waited for "input", for the "device", and to "write".
    """

    samples: int
    rows: int
    without_token: int
    failed: tuple[tuple[str, str], ...]
    seconds: float
    seconds_of: dict[str, float]
