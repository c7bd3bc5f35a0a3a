"""What an extraction is asked for, and what it says afterwards."""

import dataclasses
from typing import NamedTuple

from xlvlm_jax.features.selection import Selection

MODES = ("generate", "teacher-forcing")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is extracted from each sample.

    Attributes:
        sites: whose states; names, or patterns such as "layers.*" (see `VLM.find_sites`).
        selection: which positions of a sample make rows.
        mode: "generate" (greedy, whatever the checkpoint's do_sample says, as XL-VLMs does; its
            penalties apply; states come out of the decode loop) or "teacher-forcing" (one pass
            over prompt and first reference; what lies behind the last site is not computed).
        max_new_tokens: M, in generation.
        batch_size: B, of every batch: the last one is filled up.
        dtype: of the states on disk.

    Raises ValueError for a mode, batch size or length that can't be.
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
        if not self.sites:
            raise ValueError("no site to capture; name one, as `xlvlm sites MODEL` lists them")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Summary(NamedTuple):
    """What a run did; numbers are of the whole directory, seconds of this run."""

    samples: int
    rows: int
    without_token: int  # samples of which the selection kept nothing
    failed: tuple[tuple[str, str], ...]  # (sample, reason): an image unreadable or refused, NaN
    seconds: float
    seconds_of: dict[str, float]  # of those, waiting for "input", for the "device", to "write"
