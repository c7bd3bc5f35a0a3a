"""What each program needs on a TPU, from the TPU's own compiler; no TPU is needed.

    python -m benchmarks.tpu                                   # solvers on one v5e and on 2x2
    python -m benchmarks.tpu --programs models --mesh 1x4 --topologies v5e:2x2  # on four devices
    python -m benchmarks.tpu --topologies v5p:2x2x1 v6e:2x2 --programs "kmeans update"
    python -m benchmarks.tpu --kernels --topologies v5e:1 v5p:1 v6e:1

Needs libtpu, in an environment of its own: pip install -e '.[tpu-compile]'. Of each program:

    trace, compile   seconds on this machine
    code, arguments, temporaries, output   bytes on each device; and their share of its memory
    collectives      kinds, how many and bytes of their results on each device. Those in a loop
                     whose length is not known before are counted per step: an update, a new token
    reads            how often a solver's program reads Z from main memory, per update
    cycles           the compiler's estimate, loops counted; and the cycles of reading Z once.
                     Those of kernels are not in it: --kernels counts them
    arrays           what is written to main memory in 20 MB and more
    broken           rules that it breaks: it fits; products of float32 are exact; Z is read no more
                     often than promised; no collective or temporary grows with the rows; no
                     parameter over 64 MB lies on every device; no layer gathers or permutes, or
                     writes scores of attention in float32 over 256 MB

The status is 1 if a rule is broken. What of the compiler's answers can be trusted: docs/tpu.md.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from benchmarks import measure
from benchmarks.tpu import bundles, chips, kernel_cases
from benchmarks.tpu.cases import Case
from benchmarks.tpu.measured import growth
from benchmarks.tpu.measured import measure as measured
from benchmarks.tpu.model_cases import model_cases
from benchmarks.tpu.solver_cases import SOLVER_CASES
from ports import parse_mesh


def chosen(names: list[str], whole: bool) -> list[Case]:
    """Returns the cases with these names, or beginnings of names.

    Raises:
        ValueError: no case has such a name.
    """
    of_models = model_cases(whole)
    groups = {"solvers": SOLVER_CASES, "models": of_models}
    found: list[Case] = []
    for name in names:
        fitting = groups.get(name) or [
            case for case in [*SOLVER_CASES, *of_models] if case.name.startswith(name)
        ]
        if not fitting:
            known = ", ".join(case.name for case in [*SOLVER_CASES, *of_models])
            raise ValueError(f"no program {name!r}; choose solvers, models, or of {known}")
        found += [case for case in fitting if case not in found]
    return found


def run(cases: list[Case], places: list[chips.Place], grows: bool) -> list[dict[str, Any]]:
    """Compiles all cases for all places; one that does not compile has its reason in `broken`."""
    rows = []
    for place in places:
        for case in cases:
            if place.mesh is not None and case.name.endswith(" tile"):
                continue  # each host streams to its own devices
            try:
                row = measured(case, place)
                if grows and case.is_solver and not case.name.endswith(" tile"):
                    row["growth"], grown = growth(case, place)
                    row["broken"] += grown
                    print(f"{case.name}: twice the rows {row['growth']}")
            except ValueError as error:
                row = {"program": case.name, "devices": place.name, "broken": [str(error)]}
            rows.append(row)
            print(f"{case.name} on {row['devices']}: {row['broken'] or 'keeps all rules'}")
    return rows


def size(number: float) -> str:
    """Returns bytes in the unit that fits."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def table(rows: list[dict[str, Any]]) -> Table:
    """Returns what is printed of the results."""
    of_memory = ("code", "arguments", "temporaries", "output", "of memory")
    shown = Table(
        "program", "devices", "compile s", *of_memory, "collectives", "reads of Z", "M cycles"
    )
    for row in rows:
        if "code" not in row:
            shown.add_row(row["program"], row["devices"], row["broken"][0])
            continue
        sent = "\n".join(
            f"{each['count']} {each['kind']}{' a step' if each['in loop'] else ''} "
            f"{size(each['bytes'])}"
            for each in row["collectives"]
        )
        shown.add_row(
            row["program"],
            row["devices"],
            f"{row['compile s']:.0f}",
            *(size(row[name]) for name in ("code", "arguments", "temporaries", "output")),
            f"{100 * row['share of memory']:.0f} %",
            sent or "none",
            f"{row['reads']:.1f}" if "reads" in row else "",
            f"{row['cycles'] / 1e6:.1f}"
            + "".join(f" + {kernel}" for kernel in row["kernels"])
            + (f" ({row['cycles of one read'] / 1e6:.1f} a read)" if "reads" in row else ""),
        )
    return shown


def _kernels(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        # Before libtpu is loaded, which describing a place does.
        bundles.dump_to(Path(folder))
        try:
            places = [chips.place(topology) for topology in arguments.topologies]
            with chips.as_on_tpu():
                rows = list(kernel_cases.measure(places, Path(folder)))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    Console().print(kernel_cases.table(rows))
    measure.save(arguments.output, rows, "libtpu", "flax")
    return int(any(row["broken"] for row in rows))


def main() -> int:
    """Compiles, prints and saves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--programs", nargs="+", default=["solvers"], metavar="NAME")
    parser.add_argument(
        "--topologies", nargs="+", default=["v5e:1", "v5e:2x2"], metavar="CHIP:SHAPE"
    )
    parser.add_argument("--mesh", metavar="DATAxMODEL", help="of the devices; default: all on data")
    parser.add_argument("--kernels", action="store_true", help="the solvers' kernels alone")
    parser.add_argument("--whole", action="store_true", help="models in full depth")
    parser.add_argument(
        "--growth", action="store_true", help="compile solvers for twice the rows too"
    )
    output = Path(__file__).parents[1] / "results" / "tpu.json"
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    if not chips.is_installed():
        print("libtpu is not installed: pip install -e '.[tpu-compile]', in an own environment")
        return 0
    jax.config.update("jax_platforms", "cpu")
    if arguments.kernels:
        return _kernels(arguments)
    try:
        cases = chosen(arguments.programs, arguments.whole)
        mesh = parse_mesh(arguments.mesh) if arguments.mesh else (None, 1)
        places = [chips.place(topology, *mesh) for topology in arguments.topologies]
        for case, place in itertools.product(cases, places):
            if case.check is not None:
                case.check(place)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with chips.as_on_tpu():
        rows = run(cases, places, arguments.growth)
    console = Console()
    console.width = max(console.width, 180)
    console.print(table(rows))
    measure.save(arguments.output, rows, "libtpu", "flax")
    console.print(f"saved to {arguments.output}")
    return int(any(row["broken"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
