"""Kills extractions at random moments and resumes them: the bytes must equal those of one run.

    python -m benchmarks.faults.kills --kills 50            # one process
    python -m benchmarks.faults.kills --kills 20 --hosts 2  # any host of two, then both again

Every run that completes is compared, file by file, with an uninterrupted one; then a new one
starts. SIGTERM and SIGINT are also sent, and the seconds until the process ends are measured.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.measure import save
from xlvlm_jax.data import scenes
from xlvlm_jax.features.manifest import manifest_of

SITES = ("language_model.model.norm", "language_model.model.layers.4")


class Campaign:
    """The command, its output directory, and the expected files."""

    def __init__(self, root: Path, hosts: int, pictures: int):
        self.root, self.hosts = root, hosts
        self.environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(root / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        scenes.write(root / "scenes", val=pictures, seed=0)
        began = time.perf_counter()
        self.wait(self.start(root / "whole", 1))
        self.start_seconds = time.perf_counter() - began
        # Again, with cached programs: the time of a run that is started a second time.
        began = time.perf_counter()
        self.wait(self.start(root / "again", 1))
        # The machine may have been busy during one of these runs.
        self.whole_seconds = min(self.start_seconds, time.perf_counter() - began)
        self.expected = digests(root / "whole")
        assert digests(root / "again") == self.expected, "two undisturbed runs differ"

    def start(self, output: Path, hosts: int) -> list[subprocess.Popen]:
        """Starts the processes of one run."""
        command = [sys.executable, "-c", "from xlvlm_jax.cli import main; main()", "extract"]
        command += ["embedded", str(self.root / "scenes"), "--split", "val", "--batch-size", "2"]
        command += ["--output", str(output), "--tokens", "index:-1", "--generated-only"]
        command += ["--max-new-tokens", "8", *(x for site in SITES for x in ("--site", site))]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        several = [
            ["--hosts", f"127.0.0.1:{port},{hosts},{i}"] if hosts > 1 else [] for i in range(hosts)
        ]
        return [
            subprocess.Popen(
                command + extra,
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for extra in several
        ]

    def wait(self, processes: list[subprocess.Popen]) -> None:
        """Waits until the processes have ended successfully."""
        for process in processes:
            _, errors = process.communicate(timeout=600)
            if process.returncode:
                raise RuntimeError(f"a run ended with {process.returncode}: {errors[-500:]}")


def digests(directory: Path) -> dict[str, str]:
    """Returns {path: digest} of every file in a directory."""
    return {
        str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def kill_until_done(campaign: Campaign, kills: int, rng: random.Random, console: Console) -> dict:
    """Kills runs at random moments, each resuming the one before."""
    killed, completed, committed, unequal = 0, 0, [], 0
    output = campaign.root / "killed"
    while killed < kills or output.exists():
        processes = campaign.start(output, campaign.hosts)
        # Sometimes longer than a whole run, so that some runs complete.
        delay = rng.uniform(0.4, 1.0) * campaign.whole_seconds * (1.6 if campaign.hosts > 1 else 1)
        deadline = time.monotonic() + delay if killed < kills else float("inf")
        while time.monotonic() < deadline and any(p.poll() is None for p in processes):
            time.sleep(0.005)
        alive = [p for p in processes if p.poll() is None]
        if alive:
            killed += 1
            rng.shuffle(alive)
            for process in alive:
                process.kill()
            for process in alive:
                process.communicate()
            state = manifest_of(output) or {"samples": 0, "complete": False}
            committed.append(state["samples"])
            if not state["complete"]:
                continue
        else:
            campaign.wait(processes)
        completed += 1
        if digests(output) != campaign.expected:
            unequal += 1
            console.print(f"run {completed} differs; kept in {output}.{completed}", style="red")
            shutil.copytree(output, output.with_name(f"{output.name}.{completed}"))
        shutil.rmtree(output)
    return {
        "kills": killed,
        "runs": completed,
        "unequal": unequal,
        "samples at the kills": sorted(committed),
    }


def ask_to_end(campaign: Campaign, number: signal.Signals, rng: random.Random) -> dict:
    """Sends a signal that can be handled; returns seconds to the end, status and output."""
    seconds, said = [], 0
    output = campaign.root / "asked"
    for _ in range(5):
        (process,) = campaign.start(output, 1)
        time.sleep(rng.uniform(0.4, 0.9) * campaign.whole_seconds)
        if process.poll() is None:
            began = time.perf_counter()
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
            seconds.append(time.perf_counter() - began)
            said += (
                "run the same command to resume" in errors and process.returncode == 128 + number
            )
        else:
            process.communicate()
    campaign.wait(campaign.start(output, 1))
    equal = digests(output) == campaign.expected
    shutil.rmtree(output)
    return {"sent": len(seconds), "said": said, "seconds": seconds, "equal after": equal}


def main() -> None:
    """Run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    rng, console = random.Random(arguments.seed), Console(markup=False)
    with tempfile.TemporaryDirectory() as root:
        campaign = Campaign(Path(root), arguments.hosts, arguments.pictures)
        console.print(
            f"undisturbed: {campaign.start_seconds:.1f} s, {campaign.whole_seconds:.1f} s with the "
            "programs kept"
        )
        found = {
            "hosts": arguments.hosts,
            **kill_until_done(campaign, arguments.kills, rng, console),
        }
        console.print(found)
        rows = [found]
        if arguments.hosts == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                asked = {"signal": number.name, **ask_to_end(campaign, number, rng)}
                rows.append(asked)
                console.print(asked, f"median {np.median(asked['seconds']):.2f} s")
    name = f"faults_kills_{arguments.hosts}.json"
    save(arguments.output or Path("benchmarks/results") / name, rows)
    if found["unequal"]:
        raise SystemExit("some runs differ")


if __name__ == "__main__":
    main()
