"""The largest resident size of extracting, and of generating alone: a process of its own each.

python -m benchmarks.extraction.memory extract DIR dog     # prints KiB
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import ports
from benchmarks.extraction.ours import full, groups_of, prepare, run_generate, settings
from xlvlm_jax.data import coco
from xlvlm_jax.demo import embedded
from xlvlm_jax.features import extract

AIM = 1.1


def peak(what: str, directory: Path, word: str) -> int:
    """Largest resident KiB of a process that does `what`."""
    command = [sys.executable, "-m", "benchmarks.extraction.memory", what, str(directory), word]
    return int(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def print_peak(what: str, directory: Path, word: str) -> None:
    """Does `what` in this process, and prints its largest resident KiB."""
    # As where PyTorch is not installed: transformers would import it, on both sides of the ratio.
    sys.modules["torch"] = None
    samples = coco.load(directory, "test")
    vlm = ports.load(embedded.LLAVA)
    if what == "extract":
        with tempfile.TemporaryDirectory() as scratch:
            extract(vlm, samples, Path(scratch) / "features", settings(word))
    else:
        for group in groups_of(samples):
            jax.block_until_ready(run_generate(vlm, [prepare(vlm, full(group))]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def memory(directory: Path, word: str, repeats: int) -> dict[str, Any]:
    """Peaks of extracting and of generating, in turn."""
    pairs = np.array(
        [[peak(what, directory, word) for what in ("extract", "generate")] for _ in range(repeats)]
    )
    extracting, generating = np.median(pairs, axis=0) / 1024
    return {
        "what": "memory",
        "extract_mib": float(extracting),
        "generate_mib": float(generating),
        "ratio": float(np.median(pairs[:, 0] / pairs[:, 1])),
        "aim": AIM,
        "runs": repeats,
    }


if __name__ == "__main__":
    print_peak(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
