"""Greedy answers to the same samples under several conditions: plain, steered, instructed.

B batch, A conditions, M new tokens.

An image is read and preprocessed once for all conditions, and encoded once for all that differ only
in their edits: they are variants of one compiled program, see `VLM.sweep`. Samples are answered
picture by picture, as questions about one picture share its encoding too.
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
from xlvlm_jax.data.batches import Arrays, groups_by_picture, make_batch, read_ahead
from xlvlm_jax.data.frames import to_pandas
from xlvlm_jax.data.sample import Sample
from xlvlm_jax.data.sweeps import sweep_in_runs
from xlvlm_jax.steering.methods import Steering
from xlvlm_jax.steering.sample_vectors import SampleVectors

if TYPE_CHECKING:
    import pandas

Stage = Callable[[str], Callable[..., None]]  # starts a progress bar, returns advance(done, total)
EDITS = ("add", "add_relative", "ablate", "replace")


@dataclasses.dataclass(frozen=True)
class Condition:
    """A condition to answer under; without arguments, the plain model.

    Attributes:
        vectors: the vectors to steer with, all at once.
        alpha: the strength of each vector.
        where: the token positions, see `ports.add`; None for those each vector is meant for.
        edit: how a vector changes the states: one of EDITS, the functions of `ports` of that name.
        instruction: text appended to the prompt, such as "Answer no.".

    Raises:
        ValueError: the edit is unknown.
    """

    vectors: tuple[Steering, ...] = ()
    alpha: float = 1.0
    where: Any = None
    edit: str = "add"
    instruction: str | None = None

    def __post_init__(self) -> None:
        if self.edit not in EDITS:
            raise ValueError(f"unknown edit {self.edit!r}; expected one of {', '.join(EDITS)}")

    def edits(
        self, vlm: VLM, inputs: Any, ids: Sequence[str] | None = None
    ) -> dict[str, tuple[Edit, ...]]:
        """Returns the edits that `VLM.generate` takes.

        Args:
            vlm: the model.
            inputs: the processor's arrays.
            ids: the sample of each row, for vectors that belong to samples.

        Returns:
            {site: edits}.

        Raises:
            ValueError: a vector was fitted on another model, a sample has no vector, or the edit is
                not "add" for what is not a vector, such as a map.
        """
        edits: dict[str, tuple[Edit, ...]] = {}
        for vector in self.vectors:
            if isinstance(vector, SampleVectors) and ids is not None:
                vector = vector.of(ids)
            for site, added in vector.edits_for(vlm, inputs, self.alpha, self.where).items():
                edit = added
                if self.edit != "add":
                    if isinstance(added.vector, tuple):
                        raise ValueError(
                            f"edit is {self.edit!r}; expected 'add', all that a "
                            f"{type(vector).__name__} can do"
                        )
                    kind = getattr(edit_kinds, self.edit)(added.vector, self.alpha)
                    edit = dataclasses.replace(added, change=kind.change)
                edits[site] = (*edits.get(site, ()), edit)
        return edits

    def prompt(self, sample: Sample) -> str:
        """Returns the prompt of a sample, with the instruction."""
        return sample.prompt if self.instruction is None else f"{sample.prompt} {self.instruction}"

    def describe(self) -> dict[str, Any]:
        """Returns JSON values, without the vectors' components."""
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
    """Answers to N samples under A conditions.

    Attributes:
        answers: for each of A conditions N answers; None for a sample without one.
        errors: sample -> why its image could not be read or processed.
    """

    answers: list[list[str | None]]
    errors: dict[str, str]

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
        """Returns the samples that could be read and processed, and the answers to them.

        Args:
            samples: the N samples.

        Returns:
            R samples, and A lists of R answers.

        Raises:
            ValueError: no sample could be read and processed.
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
    """Generates greedy answers to each sample under each condition.

    A sample whose image can't be read, or that the processor refuses under one of the conditions,
    is recorded and skipped. Samples with the same image and prompt, such as those that the files of
    POPE share, are answered once.

    Args:
        vlm: the model.
        samples: N samples.
        conditions: A conditions.
        max_new_tokens: M, maximum number of tokens per answer.
        batch_size: B; smaller batches are padded to it, see `groups_by_picture`.
        max_rows: maximum number of rows, A times B, per run; more conditions take several runs.
            None for 512, or fewer to keep the key-value cache within 4 GiB.
        strict: stop at a sample that can't be read or processed, instead of skipping it.
        progress: called after each batch with (samples done, number of samples).

    Returns:
        The answers, and why samples were skipped.

    Raises:
        ValueError: the batch size is below one, there are no conditions, a vector was fitted on
            another model, or as `VLM.generate`.
    """
    if batch_size < 1 or not conditions:
        raise ValueError(
            f"there are {len(conditions)} conditions and batches of {batch_size}; expected at "
            "least one of each"
        )
    own = any(isinstance(v, SampleVectors) for condition in conditions for v in condition.vectors)
    equal: dict[Any, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        equal[sample.image, sample.prompt, sample.id if own else None].append(i)
    if len(equal) < len(samples):
        once = [samples[first] for first, *_ in equal.values()]
        found = predict(
            vlm,
            once,
            conditions,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            max_rows=max_rows,
            strict=strict,
            progress=progress,
        )
        return _repeated(found, once, list(equal.values()), samples)
    answers: list[list[str | None]] = [[None] * len(samples) for _ in conditions]
    errors: dict[str, str] = {}
    done = 0
    # Questions about one picture share its encoding if they are in one batch (see `VLM.generate`).
    places = {sample.image: place for place, sample in reversed(list(enumerate(samples)))}
    order = sorted(range(len(samples)), key=lambda i: places[samples[i].image])
    groups = groups_by_picture([samples[i] for i in order], batch_size)
    # One prompt per instruction: the processor's arrays depend on nothing else.
    told = {condition.instruction: condition.prompt for condition in conditions}
    options = {"prompts": list(told.values()), "strict": strict}
    make = functools.partial(make_batch, vlm, size=batch_size, **options)
    for batch in read_ahead(groups, make):
        errors |= batch.refused
        # There are no inputs if no sample of the batch has a row.
        inputs = dict(zip(told, batch.inputs, strict=False))
        ids = [batch.samples[row].id for row in batch.rows]
        for number, tokens in _run(vlm, inputs, ids, conditions, max_new_tokens, max_rows):
            for row, text in zip(batch.good, vlm.decode(tokens), strict=False):
                answers[number][order[done + row]] = text.strip()
        done += len(batch.samples)
        if progress is not None:
            progress(done, len(samples))
    return Predictions(answers, {s.id: errors[s.id] for s in samples if s.id in errors})


def _repeated(
    found: Predictions,
    once: Sequence[Sample],
    equal: Sequence[Sequence[int]],
    samples: Sequence[Sample],
) -> Predictions:
    """Returns the answers to all samples from those to one of each set of equal ones."""
    answers: list[list[str | None]] = [[None] * len(samples) for _ in found.answers]
    errors = {}
    for number, (sample, places) in enumerate(zip(once, equal, strict=True)):
        for place in places:
            for every, given in zip(answers, found.answers, strict=True):
                every[place] = given[number]
            if sample.id in found.errors:
                errors[samples[place].id] = found.errors[sample.id]
    return Predictions(answers, {s.id: errors[s.id] for s in samples if s.id in errors})


def _run(
    vlm: VLM,
    batch: Mapping[str | None, Arrays],
    ids: Sequence[str],
    conditions: Sequence[Condition],
    max_new_tokens: int,
    max_rows: int | None,
) -> Iterator[tuple[int, jax.Array]]:
    """Yields (number of a condition, tokens int32[B, M]) for each condition.

    `batch` maps each instruction to the processor's arrays; it is empty for a batch without rows.
    `ids` names the sample of each row.
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
        variants = aligned([conditions[number].edits(vlm, inputs, ids) for number in numbers])
        answers = sweep_in_runs(vlm, inputs, variants, max_new_tokens, max_rows)
        yield from zip(numbers, answers, strict=True)


def aligned(
    variants: Sequence[Mapping[str, Edit | Sequence[Edit]]],
) -> list[dict[str, tuple[Edit, ...]]]:
    """Returns equivalent edits that all have the same structure, as `VLM.sweep` requires.

    At each site, every variant gets the edits of all variants, those of the others with strength
    zero. One program can thus run variants that edit different sites.

    Args:
        variants: {site: edits} per variant, without masks.

    Returns:
        {site: edits} per variant.
    """
    sites = dict.fromkeys(itertools.chain.from_iterable(variants))
    slots: dict[str, list[tuple[Any, Edit]]] = {site: [] for site in sites}
    taken: list[dict[str, dict[int, Edit]]] = []  # variant -> site -> slot -> its edit there
    for variant in variants:
        taken.append({site: {} for site in sites})
        for site, listed in variant.items():
            after = 0
            for edit in (listed,) if isinstance(listed, Edit) else listed:
                shapes = [np.shape(leaf) for leaf in jax.tree.leaves((edit.vector, edit.alpha))]
                key = (edit.change, jax.tree.structure(edit), shapes)
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
