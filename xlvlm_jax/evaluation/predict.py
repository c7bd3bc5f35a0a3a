"""Greedy answers to the same samples under several conditions: plain, steered, told in words.

B batch, A conditions, M new tokens.

An image is read, preprocessed and (where conditions differ in their edits alone) encoded once for
all of them: they are variants of one compiled program, see `VLM.sweep`.
"""

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from ports import VLM
from ports.intervene import edits as edit_kinds
from ports.intervene.edits import Edit
from xlvlm_jax.data.batches import Arrays, groups_of, make_batch, read_ahead
from xlvlm_jax.data.frames import to_pandas
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.steering.methods import Steering

if TYPE_CHECKING:
    import pandas

MOST_ROWS, CACHE_BYTES = 512, 4 * 2**30  # of one run
EDITS = ("add", "add_relative", "ablate", "replace")


@dataclasses.dataclass(frozen=True)
class Condition:
    """How the model is asked; without arguments, as it is.

    Attributes:
        vectors: what its states are steered by, all of them at once.
        alpha: the strength of each.
        where: the positions, see `ports.add`; None for those that each is meant for.
        edit: what is done with a vector, one of EDITS: the functions of `ports` of that name.
        instruction: words behind the prompt, such as "Answer no.".

    Raises ValueError for another edit.
    """

    vectors: tuple[Steering, ...] = ()
    alpha: float = 1.0
    where: Any = None
    edit: str = "add"
    instruction: str | None = None

    def __post_init__(self) -> None:
        if self.edit not in EDITS:
            raise ValueError(f"no edit {self.edit!r}; expected one of {', '.join(EDITS)}")

    def edits(self, vlm: VLM, inputs: Any) -> dict[str, tuple[Edit, ...]]:
        """What `VLM.generate` takes. ValueError for vectors of another model, or maps not added."""
        edits: dict[str, tuple[Edit, ...]] = {}
        for vector in self.vectors:
            for site, added in vector.edits_for(vlm, inputs, self.alpha, self.where).items():
                edit = added
                if self.edit != "add":
                    if isinstance(added.vector, tuple):
                        raise ValueError(
                            f"a low-rank map can't {self.edit} states, but add to them"
                        )
                    kind = getattr(edit_kinds, self.edit)(added.vector, self.alpha)
                    edit = dataclasses.replace(added, change=kind.change)
                edits[site] = (*edits.get(site, ()), edit)
        return edits

    def prompt(self, sample: Sample) -> str:
        """What the sample is asked."""
        return sample.prompt if self.instruction is None else f"{sample.prompt} {self.instruction}"

    def describe(self) -> dict[str, Any]:
        """As JSON values, without the vectors' numbers."""
        told = {} if self.instruction is None else {"instruction": self.instruction}
        if not self.vectors:
            return told
        where = [v.where if self.where is None else self.where for v in self.vectors]
        return {
            "sites": [vector.site for vector in self.vectors],
            "edit": self.edit,
            "alpha": self.alpha,
            "where": where[0] if all(each == where[0] for each in where) else where,
            **told,
        }


PLAIN = Condition()


class Predictions(NamedTuple):
    """Answers under A conditions to N samples."""

    answers: list[list[str | None]]  # [A][N]; None where there is none
    errors: dict[str, str]  # sample -> why its image could not be read, or processed

    def to_pandas(self, samples: Sequence[Sample], names: Sequence[str]) -> "pandas.DataFrame":
        """Returns a table with a line per sample and a column "prediction.NAME" per condition.

        Args:
            samples: those that were predicted, N.
            names: of the conditions, A.

        Raises:
            ModuleNotFoundError: pandas is not installed.
            ValueError: other numbers of samples or names.
        """
        shape = len(samples), len(names)
        expected = len(self.answers[0]) if self.answers else shape[0], len(self.answers)
        if shape != expected:
            raise ValueError(
                f"{shape[0]} samples and {shape[1]} names; expected {expected[0]} and "
                f"{expected[1]}, those of the predictions"
            )
        table = to_pandas(samples)
        for name, answers in zip(names, self.answers, strict=True):
            table[f"prediction.{name}"] = answers
        return table.assign(error=[self.errors.get(sample.id) for sample in samples])

    def readable(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[list[str]]]:
        """The samples that could be read and processed, and the answers to them.

        Raises ValueError if there is none.
        """
        kept = [i for i, sample in enumerate(samples) if sample.id not in self.errors]
        if not kept:
            first = next(iter(self.errors.values()), "there are no samples")
            raise ValueError(f"none of the {len(samples)} images could be read; the first: {first}")
        answers = [[each[i] or "" for i in kept] for each in self.answers]
        return [samples[i] for i in kept], answers


def predict(
    vlm: VLM,
    samples: Sequence[Sample],
    conditions: Sequence[Condition] = (PLAIN,),
    *,
    max_new_tokens: int = 10,
    batch_size: int = 16,
    max_rows: int | None = None,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """The model's greedy answers to each sample under each condition.

    Args:
        vlm: the model.
        samples: what is asked.
        conditions: A of them.
        max_new_tokens: M, of an answer at most.
        batch_size: B, of every batch: the last one is filled up.
        max_rows: A times B of one run, at most; more conditions are run in several. None: 512, or
            as many as keep the key-value cache within 4 GiB.
        strict: stop at a sample that can't be read or processed.
        progress: called after each batch with (samples done, samples in all).

    An image that can't be read, or that the processor refuses, alone or with its prompt under one
    of the conditions, is recorded and passed over. Raises ValueError for a batch size below one, no
    conditions, vectors of another model, and as `VLM.generate` does.
    """
    if batch_size < 1 or not conditions:
        raise ValueError(
            f"there are {len(conditions)} conditions and batches of {batch_size}; expected at "
            "least one of each"
        )
    answers: list[list[str | None]] = [[None] * len(samples) for _ in conditions]
    errors: dict[str, str] = {}
    done = 0
    # One condition for each instruction: what the processor makes differs in nothing else.
    told = {condition.instruction: condition.prompt for condition in conditions}
    options = {"prompts": list(told.values()), "strict": strict}
    make = functools.partial(make_batch, vlm, size=batch_size, **options)
    for batch in read_ahead(groups_of(samples, batch_size), make):
        errors |= batch.refused
        # No inputs if none of the samples has a row.
        inputs = dict(zip(told, batch.inputs, strict=False))
        for number, tokens in _run(vlm, inputs, conditions, max_new_tokens, max_rows):
            for row, text in zip(batch.good, vlm.decode(tokens), strict=False):
                answers[number][done + row] = text.strip()
        done += len(batch.samples)
        if progress is not None:
            progress(done, len(samples))
    return Predictions(answers, errors)


def _run(
    vlm: VLM,
    batch: Mapping[str | None, Arrays],
    conditions: Sequence[Condition],
    max_new_tokens: int,
    max_rows: int | None,
) -> Iterator[tuple[int, jax.Array]]:
    """(number of a condition, tokens int32[B, M]) for each condition.

    batch: instruction -> the processor's arrays; nothing of a batch without rows.
    """
    if not batch:
        return
    groups: dict[tuple[str | None, bool], list[int]] = defaultdict(list)
    for number, condition in enumerate(conditions):
        groups[condition.instruction, bool(condition.vectors)].append(number)
    for (instruction, steered), numbers in groups.items():
        inputs = batch[instruction]
        if not steered:
            tokens = vlm.generate(inputs, max_new_tokens=max_new_tokens).tokens
            yield from ((number, tokens) for number in numbers)
            continue
        variants = aligned([conditions[number].edits(vlm, inputs) for number in numbers])
        at_once = max_rows or rows_at_once(vlm, inputs, max_new_tokens)
        runs = -(-len(numbers) * len(inputs["input_ids"]) // at_once)
        size = -(-len(numbers) // runs)
        for start in range(0, len(numbers), size):
            chunk = variants[start : start + size]
            # Filled up, so that every run is of the same program.
            chunk += chunk[:1] * (size - len(chunk))
            result = vlm.sweep(inputs, chunk, max_new_tokens=max_new_tokens)
            yield from zip(numbers[start : start + size], result.tokens, strict=False)


def rows_at_once(vlm: VLM, inputs: dict[str, np.ndarray], max_new_tokens: int) -> int:
    """How many rows of such inputs, conditions times batch, keep the cache within its bound."""
    rows, length = inputs["input_ids"].shape
    make = functools.partial(vlm.module.init_cache, rows, length + max_new_tokens)
    cache = jax.tree.leaves(jax.eval_shape(make))
    row = sum(leaf.size * leaf.dtype.itemsize for leaf in cache) // rows
    return max(min(MOST_ROWS, CACHE_BYTES // row), rows)


def aligned(
    variants: Sequence[Mapping[str, Edit | Sequence[Edit]]],
) -> list[dict[str, tuple[Edit, ...]]]:
    """Edits that do the same and have one structure, as `VLM.sweep` wants them.

    At each site, each variant gets the edits of all, those of the others with a strength of zero:
    they do nothing. So one program runs variants that edit different sites.

    variants: edits without masks.
    """
    sites = dict.fromkeys(itertools.chain.from_iterable(variants))
    slots: dict[str, list[tuple[Any, Edit]]] = {site: [] for site in sites}
    taken: list[dict[str, dict[int, Edit]]] = []  # variant -> site -> slot -> its edit there
    for variant in variants:
        taken.append({site: {} for site in sites})
        for site, listed in variant.items():
            after = 0
            for edit in (listed,) if isinstance(listed, Edit) else listed:
                shapes = jax.tree.map(np.shape, (edit.vector, edit.alpha))
                key = (edit.change, jax.tree.structure(edit), str(shapes))
                fitting = (i for i in range(after, len(slots[site])) if slots[site][i][0] == key)
                slot = next(fitting, None)
                if slot is None:
                    slot = len(slots[site])
                    slots[site].append((key, edit))
                taken[-1][site][slot] = edit
                after = slot + 1
    return [
        {
            site: tuple(
                own[site].get(slot, dataclasses.replace(edit, alpha=0 * edit.alpha))
                for slot, (_, edit) in enumerate(slots[site])
            )
            for site in sites
        }
        for own in taken
    ]
