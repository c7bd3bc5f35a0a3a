"""Coverage-guided fuzzing: inputs that reach new lines of the readers are damaged further.

Run by `python -m benchmarks.faults.fuzz --guided`. Uses libFuzzer through atheris, which ends the
process if a reader crashes the interpreter. An input is the number of a file (one byte) and its
content, with the other files valid; half of the damage follows the file's structure (mutate.py).
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
    """Runs inputs from `first` on, until a time; does not return."""
    running = fuzz.Child(target, seed, output, memory)
    watch = fuzz.Watch(running, first, until)
    names = running.damaged

    def one(data: bytes) -> None:
        if watch.over:
            os._exit(0)  # the only way to end atheris without a finding; all output is written
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
    # libFuzzer's own limits are disabled: the watch and the memory limit replace them.
    largest = 2 * max(map(len, running.valid.values())) + 2**16
    options = ["-timeout=3600", "-rss_limit_mb=0", "-verbosity=0", f"-max_len={largest}"]
    options += [f"-seed={seed + first + 1}"]
    atheris.Setup([sys.argv[0], *options, str(seeds)], one, custom_mutator=damage)
    atheris.Fuzz()


if __name__ == "__main__":
    child(*fuzz.child_arguments())
