"""Compiles a case and reads what its program needs; and the rules that programs have to keep."""

import math
import re
import time
from typing import Any

import jax

from benchmarks.tpu.cases import Built, Case
from benchmarks.tpu.chips import Place
from benchmarks.tpu.hlo import Array, Program
from ports.nn.attention import ACCELERATOR_WHOLE

LARGE = 20_000_000  # bytes: arrays of at least so many are listed
REPLICATED = 64_000_000  # bytes of a parameter that has to be divided
# Bytes per row that may come and go: labels, energies and the like; and a share for rounding.
SPARE = 64
SOME = 0.5  # of Z: one block of rows in a loop that runs in rare cases alone
# For arrays in fast memory, which are not counted: what lies there for some rows and no longer for
# twice as many would look like growth.
IN_MAIN_MEMORY = {"xla_msa_enable": "DISABLED"}
_LAYER = re.compile(r"(?:layers|blocks|resblocks|resampler)_\d+/")


def measure(case: Case, place: Place) -> dict[str, Any]:
    """Compiles a case for a place and returns a row of the results; see `__main__`.

    Raises:
        ValueError: the program does not fit; by how much and what would.
    """
    built = case.build(place, 1)
    start = time.perf_counter()
    lowered = jax.jit(built.function, donate_argnums=built.donate).lower(*built.arguments)
    traced = time.perf_counter()
    compiled = _compiled(lowered, case, place)
    ended = time.perf_counter()
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    held += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    row = {
        "program": case.name,
        "devices": place.name if place.mesh is None else _mesh_of(place),
        "trace s": traced - start,
        "compile s": ended - traced,
        "code": memory.generated_code_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "output": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "share of memory": held / place.chip.memory,
        "collectives": collectives(program),
        "arrays": _arrays(program),
        "cycles": program.cycles(),
        "kernels": program.kernels(),
    }
    if built.matrix is not None:
        row["reads"] = program.reads(built.matrix)
        one_read = built.matrix.bytes / place.chip.bandwidth * place.chip.hertz
        row["cycles of one read"] = round(one_read)
    return row | {"broken": broken(built, row, program, place)}


def _mesh_of(place: Place) -> str:
    assert place.mesh is not None, "a place without a mesh has its name"
    return f"{place.name} as {place.mesh.shape['data']}x{place.mesh.shape['model']}"


def _compiled(
    lowered: jax.stages.Lowered, case: Case, place: Place, options: dict[str, Any] | None = None
) -> Any:
    try:
        return lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(too_large(str(error), case.name, place)) from None


def too_large(message: str, program: str, place: Place) -> str:
    """Returns the compiler's refusal in one line: by how much a program is too large, and a way."""
    found = re.search(
        r"Used ([\d.]+\w) of ([\d.]+\w) (\w+)\. Exceeded \w+ capacity by ([\d.]+\w)", message
    )
    # Of arrays that are too large by themselves, the compiler says it in another way.
    array = re.search(
        r"memory required for .+? \(([\d.]+\w)\) exceeds available (\w+) \(([\d.]+\w)\)", message
    )
    if found is not None:
        used, room, kind, excess = found.groups()
    elif array is not None:
        used, kind, room = array.groups()
        kind, excess = kind.lower(), f"{(_bytes(used) - _bytes(room)) / 2**30:.2f}G"
    else:
        return f"{program} does not compile for {place.name}: {message.strip().splitlines()[0]}"
    factor = math.ceil(_bytes(used) / _bytes(room))
    return (
        f"{program} does not fit {place.name}: it needs {used} of {room} {kind}, "
        f"{excess} too many; use {factor} times as many devices, or 1/{factor} of the rows"
    )


def _bytes(text: str) -> float:
    return float(text[:-1]) * 1024.0 ** "BKMGT".index(text[-1])


def collectives(program: Program) -> list[dict[str, Any]]:
    """Returns {kind, in loop, count, bytes} of the collectives, with the bytes of their results."""
    found: dict[tuple[str, bool], list[int]] = {}
    for step in program.collectives():
        kind = step.operation.kind
        size = max((array.bytes for array in step.operation.results), default=0)
        if kind in ("all-reduce", "all-to-all"):  # several arrays at once
            size = sum(array.bytes for array in step.operation.results)
        counted = found.setdefault((kind, step.in_loop), [0, 0])
        counted[0] += step.times
        counted[1] += step.times * size
    return [
        {"kind": kind, "in loop": in_loop, "count": count, "bytes": size}
        for (kind, in_loop), (count, size) in sorted(found.items())
    ]


def _arrays(program: Program) -> list[dict[str, Any]]:
    """Returns the large arrays that are written, with where they come from."""
    found: dict[tuple[str, str, int], int] = {}
    for step, array in program.arrays(LARGE):
        key = (str(array), step.operation.origin[-120:], array.bytes)
        found[key] = found.get(key, 0) + step.times
    return [
        {"array": array, "from": origin, "bytes": size, "times": times}
        for (array, origin, size), times in found.items()
    ]


def broken(built: Built, row: dict[str, Any], program: Program, place: Place) -> list[str]:
    """Returns the rules that a program breaks, each in a line."""
    found = []
    if row["share of memory"] > 1:
        found.append(f"needs {row['share of memory']:.2f} of the chip's memory")
    if built.matrix is not None:
        low = [operation.origin for operation, highest in program.products() if not highest]
        found += [f"product of float32 below precision highest: {origin}" for origin in low[:3]]
        if built.reads is not None and row["reads"] > built.reads + SOME:
            found.append(f"reads Z {row['reads']:.1f} times; {built.reads:.0f} are promised")
    if built.params is not None:
        found += [
            f"parameter {name} of {size / 1e6:,.0f} MB is on every device"
            for name, size in _replicated(built.params, place)
        ]
        for step in program.collectives():
            kind, origin = step.operation.kind, step.operation.origin
            if kind in ("all-gather", "collective-permute") and _LAYER.search(origin):
                found.append(f"{kind} in a layer: {origin[-100:]}")
        found += [
            f"scores of attention, {array} of {array.bytes / 1e6:,.0f} MB, in a layer: {origin}"
            for array, origin in scores(program)
        ]
    return found


def scores(program: Program) -> list[tuple[Array, str]]:
    """Returns the float32 arrays [..., T, T] that a layer writes whole, and where.

    Attention makes scores in blocks from `ACCELERATOR_WHOLE` bytes on.
    """
    return [
        (array, step.operation.origin[-100:])
        for step, array in program.arrays(ACCELERATOR_WHOLE)
        if array.dtype == "f32"
        and len(array.shape) > 2
        and array.shape[-1] == array.shape[-2]
        and _LAYER.search(step.operation.origin)
    ]


def _replicated(params: Any, place: Place) -> list[tuple[str, int]]:
    if place.mesh is None or place.mesh.shape["model"] == 1:
        return []
    return [
        (jax.tree_util.keystr(path, simple=True, separator="."), size)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if (size := leaf.size * leaf.dtype.itemsize) > REPLICATED
        and math.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size
    ]


def growth(case: Case, place: Place) -> tuple[dict[str, float], list[str]]:
    """Compiles a solver's case for twice as many rows, with all arrays in main memory.

    Returns:
        {"sent", "sent for twice": bytes of collectives; "temporaries a row": bytes}, and what grows
        and may not, each in a line.
    """
    figures = []
    few, many = case.times
    for times in (few, many):
        built = case.build(place, times)
        lowered = jax.jit(built.function).lower(*built.arguments)
        compiled = _compiled(lowered, case, place, IN_MAIN_MEMORY)
        sent = sum(each["bytes"] for each in collectives(Program(compiled.as_text())))
        figures.append((sent, compiled.memory_analysis().temp_size_in_bytes, built.matrix))
    (sent, temporaries, matrix), (sent_twice, temporaries_twice, larger) = figures
    assert matrix is not None and larger is not None, "a solver has a matrix"
    found = []
    if sent_twice > sent:
        found.append(f"collectives grow with the rows, from {sent:,} to {sent_twice:,} bytes")
    a_row = (temporaries_twice - temporaries) / (larger.shape[0] - matrix.shape[0])
    if built.row_bytes is not None and a_row > built.row_bytes + SPARE:
        found.append(
            f"temporaries grow by {a_row:.0f} bytes a row; {built.row_bytes:.0f} are promised"
        )
    sizes = {"sent": sent, "sent for twice": sent_twice, "temporaries a row": a_row}
    return sizes, found
