"""Training of sparse autoencoders against SAELens and overcomplete, on planted dictionaries.

    python -m benchmarks.sae --peer /path/to/python-with-sae-lens
    python -m benchmarks.sae --overcomplete /path/to/python-with-overcomplete
    python -m benchmarks.sae --rows 20000 --width 64 --atoms 128 --runs 1      # a minute

Rows are sums of L0 atoms with sizes in [0.5, 1.5], no noise; both sides train TopK with k = L0 and
as many features as atoms, on the same rows in the same order, each run in a process of its own, in
turn; on a machine that does other work, pin it to one core (taskset), where CPU time is fair.
SAELens and overcomplete run as their documentation shows, with the better of two learning rates.
Printed:

    cosine    mean cosine of planted and found atoms, matched one to one; target 0.95
    seconds   of CPU time until the explained variance of a batch, averaged over 16 updates, reaches
              the target, without compiling or starting: SAELens' over ours should be 2
    memory    the largest that the process held
    rate      rows a second, and as a share of the rate of the five matrix products that an update
              must do, in a program of nothing else, target 50 %
    disk      rows a second from features on disk over those from memory, target 95 %, also by CPU
              time; and the share of the time in which training waits for rows, target below 5 %
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

AVERAGED = 16  # updates
RATES = (1e-3, 3e-3)  # of the others


def planted(rows: int, width: int, atoms: int, active: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows and their unit atoms."""
    rng = np.random.default_rng(0)
    V = rng.normal(size=(atoms, width)).astype(np.float32)
    V /= np.linalg.norm(V, axis=1, keepdims=True)
    Z = np.zeros((rows, width), np.float32)
    for start in range(0, rows, 4096):
        part = Z[start : start + 4096]
        chosen = rng.random((len(part), atoms)).argpartition(active, axis=1)[:, :active]
        sizes = rng.uniform(0.5, 1.5, size=chosen.shape).astype(np.float32)
        for column, size in zip(chosen.T, sizes.T, strict=True):
            part += size[:, None] * V[column]
    return Z, V


def batches(Z: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yields shuffled batches without end."""
    rng, held = np.random.default_rng(1), np.zeros(0, np.int64)
    while True:
        while len(held) < size:
            held = np.concatenate([held, rng.permutation(len(Z))])
        yield Z[held[:size]]
        held = held[size:]


def timed(
    step: Callable[[np.ndarray], Any],
    explained: Callable[[Any], float],
    Z: np.ndarray,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Runs the updates, and returns when the target was reached."""
    recent: list[float] = []
    curve, clock, reached = [], 0.0, None
    source = batches(Z, options.batch)
    for number in range(options.updates):
        batch = next(source)
        began = time.process_time()
        value = explained(step(batch))
        clock += time.process_time() - began
        recent = [*recent[1 - AVERAGED :], value]
        mean = float(np.mean(recent))
        if len(recent) == AVERAGED and mean >= options.target and reached is None:
            reached = {"seconds": clock, "updates": number + 1}
        if number % 50 == 49:
            curve.append((number + 1, round(clock, 2), round(mean, 4)))
    return {"reached": reached, "seconds": clock, "curve": curve}


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Trains with this package."""
    import jax
    import jax.numpy as jnp

    from xlvlm_jax.solvers.matching import match_any
    from xlvlm_jax.solvers.sae.start import start
    from xlvlm_jax.solvers.sae.topk import TopK
    from xlvlm_jax.solvers.sae.training import Given, _begin, learning_rate_for, update

    Z, V = planted(options.rows, options.width, options.atoms, options.active)
    settings = TopK(
        k=options.active,
        max_iter=options.updates,
        batch_size=options.batch,
        learning_rate=options.rate or learning_rate_for(options.atoms),
    )
    begun = start(Z[:4096], None)
    params, fixed = settings.begin(begun, jax.random.key(0), options.atoms)
    given = Given(fixed, jnp.float32(begun.scale))
    held = [_begin(params, settings=settings, mesh=None)]
    copy = jax.tree.map(jnp.copy, held[0])
    jax.block_until_ready(update(copy, given, jnp.asarray(Z[: options.batch]), settings=settings))

    def step(batch: np.ndarray) -> Any:
        held[0], figures = update(held[0], given, jax.device_put(batch), settings=settings)
        return figures

    found = timed(step, lambda figures: float(figures.explained), Z, options)
    W = np.asarray(held[0].params["W_dec"])
    return found | {
        "cosine": float(match_any(V, W)[2].mean()),
        "rate": options.batch * options.updates / found["seconds"],
        "limit": limit(options),
    }


def limit(options: argparse.Namespace) -> float:
    """Returns rows a second of the products of an update alone."""
    import jax

    from xlvlm_jax.solvers.sae.products import of_columns, product

    B, D, K = options.batch, options.width, options.atoms
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (B, D), (D, K), (B, K), (K, D), (B, D)
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]

    @jax.jit
    def products(x: Any, W_enc: Any, codes: Any, W_dec: Any, error: Any) -> tuple:
        forward = product(x, W_enc), product(codes, W_dec)
        return *forward, product(error, W_dec.T), of_columns(codes, error), of_columns(x, codes)

    jax.block_until_ready(products(*arrays))
    times = []
    for _ in range(7):
        began = time.process_time()
        jax.block_until_ready(products(*arrays))
        times.append(time.process_time() - began)
    return B / float(np.median(times))


def from_disk(options: argparse.Namespace) -> dict[str, Any]:
    """Trains from memory and from features on disk, and returns rows a second of both."""
    import jax

    from xlvlm_jax.solvers.sae import batches, train
    from xlvlm_jax.solvers.sae.topk import TopK
    from xlvlm_jax.storage.zarr_rows import StoredRows, create_array, wait

    Z, _ = planted(options.rows, options.width, options.atoms, options.active)
    settings = TopK(k=options.active, max_iter=100, batch_size=options.batch)
    found, waited = {}, [0.0]
    given = batches.batches

    def waiting(*arguments: Any) -> Iterator[Any]:
        """Yields the batches, and adds up how long each is waited for."""
        source = given(*arguments)
        while True:
            began = time.perf_counter()
            batch = next(source)
            waited[0] += time.perf_counter() - began
            yield batch

    batches.batches = waiting
    with tempfile.TemporaryDirectory() as folder:
        array = create_array(Path(folder) / "states", "float32", Z.shape)
        wait(array.write(Z))
        stored = StoredRows(Path(folder) / "states", len(Z))
        for name, rows in (("from memory", Z), ("from disk", stored)):
            marks: list[tuple[float, float, float]] = []
            train(
                rows,
                jax.random.key(0),
                settings,
                options.atoms,
                tell=lambda _, marks=marks: marks.append(
                    (time.perf_counter(), waited[0], time.process_time())
                ),
                every=10,
            )
            # The first ten updates include compiling and reading the first window.
            seconds, waits, cpu = (b - a for a, b in zip(marks[0], marks[-1], strict=True))
            rows_of = 90 * options.batch
            found |= {
                name: rows_of / seconds,
                f"{name}, CPU": rows_of / cpu,
                f"waits {name}": waits / seconds,
            }
    return found


def saelens(options: argparse.Namespace) -> dict[str, Any]:
    """Trains with SAELens' trainer."""
    import torch
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    Z, V = planted(options.rows, options.width, options.atoms, options.active)
    config = TopKTrainingSAEConfig(
        d_in=options.width,
        d_sae=options.atoms,
        k=options.active,
        device="cpu",
        normalize_activations="expected_average_only_in",
    )
    sae = TopKTrainingSAE(config)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=options.batch * options.updates,
            train_batch_size_samples=options.batch,
            lr=options.rate,
            lr_end=options.rate / 10,
            lr_warm_up_steps=options.updates // 20,
            lr_decay_steps=options.updates // 5,
            device="cpu",
        ),
        sae,
        (torch.from_numpy(batch) for batch in batches(Z, options.batch)),
    )
    trainer.activation_scaler.scaling_factor = (
        options.width**0.5 / np.linalg.norm(Z[:4096], axis=1).mean()
    )

    def step(batch: np.ndarray) -> Any:
        trainer.maybe_reset_sparsity()
        found = trainer.step(torch.from_numpy(batch))
        trainer.n_training_steps += 1
        return found

    def explained(found: Any) -> float:
        x, y = found.sae_in, found.sae_out.detach()
        return 1 - float(((x - y) ** 2).sum() / ((x - x.mean(0)) ** 2).sum())

    found = timed(step, explained, Z, options)
    W = sae.W_dec.detach().numpy()
    from scipy.optimize import linear_sum_assignment

    cosines = V @ (W / np.linalg.norm(W, axis=1, keepdims=True)).T
    pairs = linear_sum_assignment(cosines, maximize=True)
    rate = options.batch * options.updates / found["seconds"]
    return found | {"cosine": float(cosines[pairs].mean()), "rate": rate}


def overcomplete(options: argparse.Namespace) -> dict[str, Any]:
    """Trains with overcomplete's `train_sae`."""
    import torch
    from overcomplete.sae import TopKSAE, train_sae

    torch.manual_seed(0)
    Z, V = planted(options.rows, options.width, options.atoms, options.active)
    sae = TopKSAE(options.width, nb_concepts=options.atoms, top_k=options.active)
    values: list[tuple[float, float]] = []  # time without our own part, explained variance
    own, source = [0.0], batches(Z, options.batch)

    def rows() -> Iterator[Any]:
        for _ in range(options.updates):
            began = time.process_time()
            batch = torch.from_numpy(next(source))
            own[0] += time.process_time() - began
            yield batch

    def loss(x: Any, y: Any, *_: Any) -> Any:
        began = time.process_time()
        left = ((x - y.detach()) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
        values.append((began - own[0], 1 - float(left)))
        own[0] += time.process_time() - began
        return ((x - y) ** 2).mean()

    start = time.process_time()
    optimizer = torch.optim.Adam(sae.parameters(), lr=options.rate)
    train_sae(sae, rows(), loss, optimizer, nb_epochs=1, monitoring=0)
    seconds = time.process_time() - start - own[0]
    reached, curve = None, []
    for number in range(AVERAGED, len(values) + 1):
        mean = float(np.mean([value for _, value in values[number - AVERAGED : number]]))
        if mean >= options.target and reached is None:
            reached = {"seconds": values[number - 1][0] - start, "updates": number}
        if number % 50 == 0:
            curve.append((number, round(values[number - 1][0] - start, 2), round(mean, 4)))
    from scipy.optimize import linear_sum_assignment

    W = sae.get_dictionary().detach().numpy()
    cosines = V @ (W / np.linalg.norm(W, axis=1, keepdims=True)).T
    return {
        "reached": reached,
        "seconds": seconds,
        "curve": curve,
        "cosine": float(cosines[linear_sum_assignment(cosines, maximize=True)].mean()),
        "rate": options.batch * options.updates / seconds,
    }


SIDES = {"ours": ours, "saelens": saelens, "overcomplete": overcomplete, "disk": from_disk}


def run(python: str, side: str, options: argparse.Namespace, rate: float | None) -> dict[str, Any]:
    """Runs one side in a process of its own."""
    names = ("rows", "width", "atoms", "active", "batch", "updates", "target")
    arguments = [f"--{name}={getattr(options, name)}" for name in names]
    if rate is not None:
        arguments.append(f"--rate={rate}")
    command = [python, __file__, "--side", side, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Runs the benchmark, or one side of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--atoms", type=int, default=1024)
    parser.add_argument("--active", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--updates", type=int, default=1400)
    parser.add_argument("--target", type=float, default=0.6, help="explained variance")
    parser.add_argument("--rate", type=float, help="learning rate; for SAELens the better of two")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer", help="a Python that has sae-lens")
    parser.add_argument("--overcomplete", help="a Python that has overcomplete")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/sae.json"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        found = SIDES[options.side](options)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps(found | {"memory": peak}))
        return
    from benchmarks import measure

    rows = []
    for number in range(options.runs):
        mine = run(sys.executable, "ours", options, options.rate)
        print(f"ours      {_line(mine)}, {mine['rate'] / mine['limit']:.0%} of the products' rate")
        rows.append({"run": number, "ours": mine})
        for side, python in (("saelens", options.peer), ("overcomplete", options.overcomplete)):
            for rate in RATES if python else ():
                theirs = run(python, side, options, rate)
                print(f"{side:9} {_line(theirs)}, learning rate {rate}")
                rows[-1][f"{side} {rate}"] = theirs
    disk = run(sys.executable, "disk", options, None)
    share, cpu = (disk[f"from disk{x}"] / disk[f"from memory{x}"] for x in ("", ", CPU"))
    print(
        f"from disk {share:.1%} of the rate from memory, {cpu:.1%} by CPU time of all threads, "
        f"waits {disk['waits from disk']:.1%}"
    )
    measure.save(options.output, [*rows, disk], "optax")


def _line(found: dict[str, Any]) -> str:
    reached = found["reached"]
    when = "never" if reached is None else f"{reached['seconds']:.1f} s ({reached['updates']})"
    return (
        f"cosine {found['cosine']:.3f}, target after {when}, {found['memory']:.2f} GB, "
        f"{found['rate']:,.0f} rows/s"
    )


if __name__ == "__main__":
    main()
