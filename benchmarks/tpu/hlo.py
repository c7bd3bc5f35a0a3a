"""What a compiled program does, read from its text: collectives, arrays, reads of an input, cycles.

A program is a tree of computations: loops, branches, and fusions, whose inside stays in registers.
Each figure is summed over the operations that run, those of a loop times its number of steps. A
loop whose number is only known when it runs counts as one step: figures of a program that is one
such loop, updates or decode steps, are therefore per step. Of a conditional the branch that costs
least counts: others are for rare cases.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Operations that write nothing of their own.
_NO_ARRAYS = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "constant",
    "opt-barrier",
    "copy-start",
    "slice-start",
    "after-all",
}
_SLICES = ("dynamic-slice", "slice", "gather", "slice-start", "dynamic-slice-start")
_SAME = ("bitcast", "get-tuple-element", "copy-done", "reshape", "transpose", "opt-barrier")
_SHAPE = re.compile(r"\b(pred|token|[a-z]+\d+\w*)\[([\d,]*)\](\{[^{}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply)=%?([\w.-]+)")


class Array(NamedTuple):
    """Type and sizes of an array."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False  # in the chip's fast memory, not in its main memory

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        bits = int(re.sub(r"\D.*", "", re.sub(r"^\D*", "", self.dtype)) or 8)  # "pred" has none
        return self.size * bits // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Operation(NamedTuple):
    """A line of a computation."""

    name: str
    kind: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str  # attributes, as they stand there

    @property
    def origin(self) -> str:
        """Where it comes from in the traced function, such as "layers_0/self_attn/dot_general"."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else 0

    def called(self, attribute: str) -> str | None:
        """Name of the computation that it runs as its `attribute`."""
        found = re.search(rf"\b{attribute}=%?([\w.-]+)", self.rest)
        return found[1] if found else None

    @property
    def branches(self) -> tuple[str, ...]:
        """Computations of a conditional."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        if found:
            return tuple(name.strip().lstrip("%") for name in found[1].split(","))
        names = (self.called("true_computation"), self.called("false_computation"))
        return tuple(name for name in names if name)


class Step(NamedTuple):
    """An operation that runs."""

    operation: Operation
    computation: str
    times: int
    in_loop: bool  # in a loop whose number of steps is only known when it runs


class Program:
    """A compiled program's computations by name.

    Args:
        text: `Compiled.as_text()`.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Operation]] = {}
        self.entry = ""
        here: dict[str, Operation] = {}
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                here = self.computations.setdefault(found[2], {})
                self.entry = found[2] if found[1] else self.entry
            elif line.startswith("  ") and (operation := _read(line)):
                here[operation.name] = operation

    def steps(self) -> Iterator[Step]:
        """Yields the operations outside of fusions that run."""
        yield from self._steps(self.entry, 1, False)

    def _steps(self, name: str, times: int, in_loop: bool) -> Iterator[Step]:
        for operation in self.computations[name].values():
            yield Step(operation, name, times, in_loop)
            if operation.kind == "while":
                count = self._count(operation)
                inside = in_loop or count is None
                body = operation.called("body")
                assert body is not None, "a loop has a body"
                yield from self._steps(body, times * (count or 1), inside)
            elif operation.kind == "conditional":
                branches = [list(self._steps(b, times, in_loop)) for b in operation.branches]
                yield from min(branches, key=_weight, default=[])
            elif operation.kind == "call":
                called = operation.called("to_apply")
                yield from self._steps(called, times, in_loop) if called else ()

    def _count(self, loop: Operation) -> int | None:
        """Returns the number of steps of a loop from 0 or up to a constant; None if unknown."""
        found = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
        if found:
            return int(found[1])
        condition = self.computations[loop.called("condition") or ""]
        compared = [each for each in condition.values() if each.kind == "compare"]
        inner = [each for each in condition.values() if each.kind in ("fusion", "and")]
        if len(compared) != 1 or inner or "direction=LT" not in compared[0].rest:
            return None
        bound = condition.get(compared[0].operands[-1])
        constant = re.match(r"constant\((\d+)\)", bound.rest) if bound else None
        return int(constant[1]) if constant else None

    def cycles(self) -> int:
        """Returns the compiler's estimate of cycles; operations without one count nothing."""
        return sum(step.times * step.operation.cycles for step in self.steps())

    def kernels(self) -> list[str]:
        """Returns the names of the kernels that run, of which the compiler estimates no cycles."""
        target = 'custom_call_target="tpu_custom_call"'
        return sorted(
            {
                step.operation.name.split(".")[0]
                for step in self.steps()
                if step.operation.kind == "custom-call" and target in step.operation.rest
            }
        )

    def collectives(self) -> list[Step]:
        """Returns the collectives that run, those within fusions too.

        A collective that is spread over several fusions appears in each with the same channel, and
        counts once.
        """
        found, begun = [], set()
        for step in self.steps():
            for operation in (step.operation, *self._inside(step.operation)):
                kind = operation.kind.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                spread = re.search(r"\bchannel_id=(\d+).*\bchain_id=", operation.rest)
                if spread and (step.computation, spread[1]) in begun:
                    continue
                begun |= {(step.computation, spread[1])} if spread else set()
                found.append(step._replace(operation=operation._replace(kind=kind)))
        return found

    def _inside(self, operation: Operation) -> Iterator[Operation]:
        called = operation.called("calls")
        if called in self.computations:
            for inner in self.computations[called].values():
                yield inner
                yield from self._inside(inner)

    def arrays(self, least: int) -> list[tuple[Step, Array]]:
        """Returns the arrays of at least so many bytes that operations outside of fusions write."""
        return [
            (step, array)
            for step in self.steps()
            if step.operation.kind not in _NO_ARRAYS
            for array in step.operation.results
            if array.bytes >= least and not array.on_chip
        ]

    def reads(self, array: Array) -> float:
        """Returns how often the elements of an input are read from main memory, in multiples of it.

        Args:
            array: its type and sizes; any array of this type with as many elements counts as it.
        """

        def same(operands: Mapping[str, Operation], name: str) -> bool:
            operation = operands.get(name)
            if operation is None or len(operation.results) != 1:
                return False
            found = operation.results[0]
            is_same = found.size == array.size and found.dtype == array.dtype
            return is_same and not found.on_chip

        total = 0.0
        for step in self.steps():
            operation, here = step.operation, self.computations[step.computation]
            if operation.kind in _NO_ARRAYS - {"copy-start", "slice-start"}:
                continue
            for index, name in enumerate(operation.operands):
                if same(here, name):
                    total += step.times * self._read_by(operation, index) / array.bytes
        return total

    def _read_by(self, operation: Operation, index: int) -> int:
        """Returns the bytes that an operation reads of its operand number `index`."""
        here = next(
            ops for ops in self.computations.values() if ops.get(operation.name) is operation
        )
        whole = here[operation.operands[index]].results[0].bytes
        if operation.kind in _SLICES:
            return operation.results[-1].bytes if index == 0 else 0
        if operation.kind == "dynamic-update-slice":
            return 0 if index == 0 else whole
        called = operation.called("calls")
        if called not in self.computations:
            return whole
        inside = self.computations[called]
        start = next(
            each.name
            for each in inside.values()
            if each.kind == "parameter" and each.rest.startswith(f"parameter({index})")
        )
        read = 0
        names = [start]
        while names:
            name = names.pop()
            for each in inside.values():
                if name not in each.operands:
                    continue
                if each.kind in _SAME or self._only_passes(each):
                    names.append(each.name)
                else:
                    read += self._read_by(each, each.operands.index(name))
        return min(read, whole)

    def _only_passes(self, operation: Operation) -> bool:
        """Returns whether a fusion hands on its operand, perhaps in another layout."""
        inside = self.computations.get(operation.called("calls") or "", {})
        return bool(inside) and {each.kind for each in inside.values()} <= {"parameter", *_SAME}

    def products(self) -> Iterator[tuple[Operation, bool]]:
        """Yields the products of float32 arrays, and whether at precision "highest"."""
        for computation in self.computations.values():
            for operation in computation.values():
                if operation.kind not in ("convolution", "dot"):
                    continue
                given = [computation[name] for name in operation.operands if name in computation]
                if any(one.results and one.results[0].dtype == "f32" for one in given):
                    yield operation, "operand_precision={highest,highest}" in operation.rest


def _weight(steps: list[Step]) -> tuple[int, int]:
    return sum(step.times * step.operation.cycles for step in steps), len(steps)


def _read(line: str) -> Operation | None:
    """Reads `%name = type kind(operands), attributes`."""
    found = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    results = tuple(
        Array(dtype, tuple(int(n) for n in sizes.split(",") if n), "S(1)" in layout)
        for dtype, sizes, layout in _SHAPE.findall(rest[:end])
    )
    rest = rest[end:].lstrip(") ")
    kind = re.match(r"[\w-]+", rest)
    if not kind:
        return None
    opening = kind.end()
    inner = rest[opening : opening + _closing(rest[opening:]) + 1]
    operands = tuple(re.findall(r"%([\w.-]+)", inner))
    return Operation(found[1], kind[0], results, operands, rest)


def _closing(text: str) -> int:
    """Returns the place of the parenthesis that closes the first one."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return len(text)
