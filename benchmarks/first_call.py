"""The first call: CPU seconds of a whole process from `python` to the result, and where they go.

Each side runs in a process of its own, alternately: ours without a cache of programs, ours with a
cache that an earlier process filled, and scikit-learn's. Seconds are user plus system time, which a
busy machine distorts less than wall time.

    python -m benchmarks.first_call [--repeats 3] [--methods kmeans pca snmf] [--sizes 620x192]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.solvers.matrices import planted

OUTPUT = Path("benchmarks/results/first_call.json")
K = 20
METHODS = ("kmeans", "pca", "snmf")
SIZES = ("620x192", "3000x4096")
# JAX's names of the durations that it reports.
STAGES = {
    "trace": "/jax/core/compile/jaxpr_trace_duration",
    "lower": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "compile": "/jax/core/compile/backend_compile_duration",
}


def ours(method: str, Z: np.ndarray) -> dict[str, Any]:
    """Runs `decompose` once; returns the number of programs and the seconds of each stage."""
    from jax import block_until_ready, monitoring, random

    from xlvlm_jax import decompose

    stages, count = dict.fromkeys(STAGES, 0.0), 0

    def listen(event: str, seconds: float, **_: Any) -> None:
        nonlocal count
        for name, of in STAGES.items():
            stages[name] += seconds * (event == of)
        count += event == STAGES["compile"]

    monitoring.register_event_duration_secs_listener(listen)
    concepts = decompose(Z, K, method, key=random.key(0))
    block_until_ready(concepts.activations)
    return {"programs": count} | {name: round(value, 3) for name, value in stages.items()}


def theirs(method: str, Z: np.ndarray) -> dict[str, Any]:
    """Runs scikit-learn's estimator once."""
    if method == "kmeans":
        from sklearn.cluster import KMeans

        KMeans(K, random_state=0).fit(Z)
    elif method == "pca":
        from sklearn.decomposition import PCA

        PCA(K, random_state=0).fit_transform(Z)
    else:
        from sklearn.decomposition import MiniBatchDictionaryLearning

        how = {"alpha": 1.0, "transform_alpha": 1.0, "positive_code": True, "random_state": 0}
        how |= {"fit_algorithm": "cd", "transform_algorithm": "lasso_cd"}
        MiniBatchDictionaryLearning(K, batch_size=256, max_iter=100, **how).fit_transform(Z)
    return {}


def process(side: str, method: str, size: str, cache: str) -> tuple[float, dict[str, Any]]:
    """Returns the CPU seconds of a process, and what it reports."""
    environment = os.environ | {"XLVLM_COMPILATION_CACHE": cache}
    command = [sys.executable, "-m", "benchmarks.first_call", "--child", side, method, size]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, json.loads(done.stdout.splitlines()[-1])


def compare(method: str, size: str, repeats: int) -> dict[str, Any]:
    """Returns the medians of all three sides."""
    with tempfile.TemporaryDirectory() as cache:
        process("ours", method, size, cache)
        runs = [
            (
                process("ours", method, size, "off"),
                process("ours", method, size, cache),
                process("theirs", method, size, "off"),
            )
            for _ in range(repeats)
        ]
    cold, cached, peer = np.median([[spent for spent, _ in run] for run in runs], axis=0)
    return {
        "method": method,
        "size": size,
        "cold": round(float(cold), 2),
        "cached": round(float(cached), 2),
        "scikit-learn": round(float(peer), 2),
        "cold/peer": round(float(cold / peer), 2),
        "cached/peer": round(float(cached / peer), 2),
        **runs[-1][0][1],
    }


def main() -> None:
    """Prints one line per method and size, and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="NxD")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        side, method, size = asked.child
        N, D = map(int, size.split("x"))
        print(json.dumps((ours if side == "ours" else theirs)(method, planted(N, D, K))))
        return
    from benchmarks.measure import save

    rows = []
    for size in asked.sizes:
        for method in asked.methods:
            rows.append(compare(method, size, asked.repeats))
            print(" ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
    save(asked.output, rows, "jaxlib", "scikit-learn")


if __name__ == "__main__":
    main()
