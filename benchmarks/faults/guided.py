"""Fuzzing led by coverage: the inputs that reach new lines of the readers are damaged further.

Run by `python -m benchmarks.faults.fuzz --guided`; libFuzzer through atheris, which ends the
process where a reader takes down the interpreter. An input is the number of a file (one byte) and
its content, the other files staying valid; half of the damage is by the file's build (mutate.py).
"""

import os
import random
import shutil
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["xlvlm_jax", "ports"]):
    import benchmarks.faults.targets  # noqa: F401, imported here for its instrumentation
    from benchmarks.faults import fuzz, mutate


def child(target: str, seed: int, output: Path, memory: int, first: int, until: float) -> None:
    """Inputs from `first` on, until a time; does not return."""
    running = fuzz.Child(target, seed, output, memory)
    watch = fuzz.Watch(running, first, until)
    names = running.damaged

    def one(data: bytes) -> None:
        if watch.over:
            os._exit(0)  # atheris has no other end without a finding; all is written
        if not data:
            return
        with watch.input() as number:
            contents = {**running.valid, names[data[0] % len(names)]: data[1:]}
            running.place(contents, fitted=True)
            running.judge(number)

    def damage(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if not data or rng.random() < 0.5:
            return atheris.Mutate(data, max_size)
        others = [data[1:], running.valid[rng.choice(names)]]
        changed = mutate.mutate(names[data[0] % len(names)], data[1:], others, rng)
        return (data[:1] + changed)[:max_size]

    seeds = output / "seeds"
    shutil.rmtree(seeds, ignore_errors=True)
    seeds.mkdir()
    for index, name in enumerate(names[:256]):
        (seeds / str(index)).write_bytes(bytes([index]) + running.valid[name])
    # libFuzzer's own limits are out of the way: the watch and the limit on memory see to both.
    largest = 2 * max(map(len, running.valid.values())) + 2**16
    options = ["-timeout=3600", "-rss_limit_mb=0", "-verbosity=0", f"-max_len={largest}"]
    options += [f"-seed={seed + first + 1}"]
    atheris.Setup([sys.argv[0], *options, str(seeds)], one, custom_mutator=damage)
    atheris.Fuzz()


if __name__ == "__main__":
    child(*fuzz.child_arguments())
