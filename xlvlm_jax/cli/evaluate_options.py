"""Options that `xlvlm evaluate` and `xlvlm steer apply` share, and how they are parsed."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from xlvlm_jax.cli.console import refuse_given, require_counts

Data = Annotated[Path, typer.Argument(help="Directory of the data set.")]
Output = Annotated[Path, typer.Option(help="Directory to write, such as RUN/steering/NAME.")]
TaskName = Annotated[
    Literal["pope", "chair", "vqa", "captions", "descriptions"] | None,
    typer.Option(
        "--task",
        help="What to measure: pope (whether objects are there), chair (objects in captions that "
        "are not there), vqa, captions, or descriptions (whether descriptions of POPE's pictures "
        "name the objects asked about). Default: what belongs to --dataset.",
    ),
]
Dataset = Annotated[
    Literal["vqav2", "coco", "pope", "amber", "mmsb", "scenes", "questions"] | None,
    typer.Option(
        help="vqav2, pope or questions (questions.jsonl) for questions, coco for captions, amber "
        "and scenes (of `xlvlm scenes`) for either, mmsb (MM-SafetyBench) for the words of free "
        "answers. Default: that of --task, or vqav2."
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        help="train (default), val or test; for pope random, popular, adversarial or all; for "
        "amber existence, attribute, relation or all, or generative (descriptions); for questions "
        "a type or all; for mmsb all, train or test. Default of these: all."
    ),
]
Negatives = Annotated[
    Literal["random", "popular", "adversarial", "all"],
    typer.Option(help="Questions of scenes: how objects that are not there are drawn."),
]
Instruction = Annotated[
    str | None,
    typer.Option(help='Also evaluate with this text appended to the prompt, e.g. "Answer no.".'),
]
Words = Annotated[
    str | None,
    typer.Option(
        help="Captions: words to count, separated by commas, or the name of a class: colours, "
        "places, sentiments, scenes:colour, scenes:place, scenes:mood. Default: the vector's "
        "target words; for mmsb words of refusals."
    ),
]
Source = Annotated[
    str | None,
    typer.Option(help="Answers to steer from, separated by commas. Default: the vector's."),
]
Target = Annotated[
    str | None,
    typer.Option(help="Answers to steer to, separated by commas. Default: the vector's."),
]
VqaProtocol = Annotated[
    Literal["official", "normalised", "xl-vlms"],
    typer.Option(
        help="Questions: accuracy that comes first in tables and that --choose-on compares; all "
        "three are stored. official: the official script to the letter; normalised: without its "
        "edges; xl-vlms: as XL-VLMs computes it."
    ),
]
Without = Annotated[
    str | None,
    typer.Option(
        help="Questions: also the mean accuracy of the answer types without this one, such as "
        "yes/no."
    ),
]
AnswerTypes = Annotated[
    Path | None,
    typer.Option(
        help="Questions: JSON file of answers by type, as XL-VLMs' --answer_type_to_answer, to "
        "count the types of answers by."
    ),
]
Baseline = Annotated[
    Path | None,
    typer.Option(
        help="Take the plain model's answers from this earlier run (a directory of `evaluate`, or "
        "predictions of XL-VLMs), instead of running it again."
    ),
]
NumSamples = Annotated[int | None, typer.Option(help="Maximum number of samples.")]
NewTokens = Annotated[
    int | None,
    typer.Option(
        help="Maximum number of new tokens. Default: 10 for answers, 32 for captions, 128 for "
        "descriptions of POPE's pictures, 256 for those of AMBER."
    ),
]
BatchSize = Annotated[int, typer.Option(help="Samples per batch.")]
Edit = typer.Option(
    help="How a vector changes the states: add (alpha x vector), add_relative (scaled to the norm "
    "of each state), ablate (remove the vector's direction; alpha 2 mirrors the states) or replace."
)
Java = Annotated[
    bool, typer.Option(help="Captions: also compute METEOR and SPICE, if Java is installed.")
]


# Task -> the data sets it can be measured on, the usual one first.
DATASETS = {
    "pope": ("pope", "amber", "scenes", "questions"),
    "chair": ("coco", "amber", "scenes"),
    "vqa": ("vqav2", "pope", "amber", "scenes", "questions"),
    "captions": ("coco", "mmsb", "scenes"),
    "descriptions": ("pope",),
}


def dataset_of(task: str | None, dataset: str | None) -> str:
    """Returns the data set to evaluate on.

    Args:
        task: value of --task.
        dataset: value of --dataset; None for the usual one of the task.

    Raises:
        ValueError: the task can't be measured on the data set.
    """
    if task is None:
        return dataset or "vqav2"
    if dataset is not None and dataset not in DATASETS[task]:
        raise ValueError(
            f"--task {task} can't be measured on --dataset {dataset}; expected one of "
            f"{', '.join(DATASETS[task])}"
        )
    return dataset or DATASETS[task][0]


def reading_of(task: str | None, dataset: str, split: str | None, negatives: str) -> dict[str, Any]:
    """Returns the options of `read_samples` that depend on the task, with the split by name.

    Args:
        task, split, negatives: values of the options.
        dataset: what `dataset_of` returns.

    Raises:
        ValueError: negatives are chosen for another data set than drawn scenes or for captions, or
            a split of AMBER that the task can't be measured on.
    """
    if negatives != "all" and dataset != "scenes":
        raise ValueError(
            f"--negatives belongs to --dataset scenes, not to {dataset}; omit it"
            + ("; --split chooses the file" if dataset == "pope" else "")
        )
    chosen = split or ("train" if dataset in ("vqav2", "coco", "scenes") else "all")
    if dataset == "pope":
        return {"split": chosen} | ({"describe": True} if task == "descriptions" else {})
    if dataset == "amber" and task == "chair":
        if split not in (None, "generative"):
            raise ValueError(
                f"--task chair describes AMBER's split generative, not {split}; omit --split"
            )
        return {"split": "generative"}
    if dataset == "amber" and split == "generative":
        raise ValueError("AMBER's split generative has no questions; give --task chair too")
    if dataset == "scenes":
        if negatives != "all" and task in ("chair", "captions"):
            raise ValueError("--negatives has no effect on captions; omit it")
        asked = "captions" if task in ("chair", "captions") else "all"
        return {"split": chosen, "ask": asked, "negatives": negatives}
    return {"split": chosen}


def parse_task(
    dataset: str,
    vectors: Sequence[Any],
    source: str | None,
    target: str | None,
    words: str | None,
    java: bool,
    protocol: str,
    without: str | None,
    answer_types: Path | None = None,
    *,
    task: str | None = None,
    data: Path | None = None,
) -> Any:
    """Returns the task to evaluate; words not given are those the first vector was fitted on.

    Args:
        dataset: "coco" for captions, "mmsb" for free answers, otherwise questions if the task says
            nothing else.
        vectors: the loaded steering vectors.
        source, target, words: option values, with commas.
        java: whether to compute metrics that need Java.
        protocol: how the accuracy of answers is computed.
        without: an answer type to leave out of a mean.
        answer_types: a file of answers by type.
        task: value of --task.
        data: the data set's directory, which holds AMBER's words.

    Returns:
        `evaluation.Captions` or `evaluation.Questions`, or those of the hallucination bench.

    Raises:
        ValueError: an option does not belong to this kind of data, or one of a pair is missing.
    """
    from xlvlm_jax import evaluation
    from xlvlm_jax.data.amber import word_lists
    from xlvlm_jax.data.mmsb import REFUSALS
    from xlvlm_jax.data.words import named_words
    from xlvlm_jax.steering.fit import EVERYTHING, OUTCOME

    fitted = vectors[0].source if vectors else {}
    if fitted.get("key") == OUTCOME:
        fitted = {}  # "yes for no" is no answer to count
    if task in ("chair", "captions") or (task is None and dataset in ("coco", "mmsb")):
        if source is not None or target is not None:
            raise ValueError("--source and --target apply to questions; use --words for captions")
        if answer_types is not None:
            raise ValueError("--answer-types applies to questions; omit it for captions")
        of_vector = () if task == "chair" else fitted.get("target") or ()
        usual = REFUSALS if dataset == "mmsb" else of_vector
        kind = evaluation.ObjectCaptions if task == "chair" else evaluation.Captions
        counted = tuple(usual if words is None else named_words(words))
        if dataset == "amber":
            assert data is not None
            return evaluation.Descriptions(counted, java, lists=word_lists(data))
        return kind(counted, java, "scenes" if dataset == "scenes" else "coco")
    if words is not None:
        raise ValueError("--words applies to captions; use --source and --target for questions")
    if source is None and tuple(fitted.get("source") or ()) == EVERYTHING:
        if task not in ("pope", "descriptions"):  # these need no words
            raise ValueError(
                "the vector was fitted on every sample (--source '*'), which names no answers to "
                "steer from; give --source and --target"
            )
        fitted = {}
    sources, targets = (
        # In lower case, as answers are compared.
        tuple(fitted.get(name) or ())
        if text is None
        else tuple(word.strip().lower() for word in text.split(","))
        for name, text in (("source", source), ("target", target))
    )
    if bool(sources) != bool(targets):
        missing = "source" if targets else "target"
        raise ValueError(f"--{missing} is missing; give the {missing} answers, separated by commas")
    types = None if answer_types is None else evaluation.read_types(answer_types)
    kinds = {"pope": evaluation.Presence, "descriptions": evaluation.ObjectDescriptions}
    kind = kinds.get(task or "", evaluation.Questions)
    return kind(sources, targets, protocol=cast(Any, protocol), without=without, types=types)


def refuse_ignored(context: typer.Context, task: Any) -> None:
    """Refuses options of `evaluate`, `steer apply` or `steer sweep` that this run does not read.

    Args:
        context: of the command.
        task: what `parse_task` returns.

    Raises:
        ValueError: one was given.
    """
    from xlvlm_jax import evaluation

    given = context.params
    if not given.get("vector") and "features" not in given:
        refuse_given(context, ("alpha", "where", "edit"), "without --vector")
    if given.get("choose_on", "") is None:
        refuse_given(context, ("wanted", "max_cost", "num_choose"), "without --choose-on")
    if isinstance(task, evaluation.Captions):
        refuse_given(context, ("without", "vqa_protocol"), "on captions")
        if isinstance(task, evaluation.Descriptions) or given.get("dataset") == "mmsb":
            refuse_given(context, ("java",), "on answers without references")
    else:
        refuse_given(context, ("java",), "on questions")


def require_before(task: Any, samples: Sequence[Any], baseline: Path | None) -> None:
    """Checks, before a model is loaded, what the samples and a baseline must hold.

    Raises:
        FileNotFoundError: there is no such baseline.
        ValueError: as `task.require` and `read_baseline`.
    """
    from xlvlm_jax import evaluation

    task.require(samples)
    if baseline is not None:
        evaluation.read_baseline(baseline, samples)


def vectors_at(vectors: Sequence[Any], sites: Sequence[str], together: bool) -> list[Any]:
    """Returns the combinations to try: each vector at each site, or all vectors together.

    Raises:
        ValueError: sites are given for vectors that have several of their own.
    """
    from xlvlm_jax.steering import SiteVectors

    if sites and (fixed := [v for v in vectors if isinstance(v, SiteVectors)]):
        raise ValueError(
            f"--site does not apply to vectors of {len(fixed[0].vectors)} sites ({fixed[0].site}); "
            "omit it"
        )
    if not sites:
        placed = [tuple(vectors)] if together else [(vector,) for vector in vectors]
    elif together:
        placed = [tuple(dataclasses.replace(v, site=site) for v in vectors) for site in sites]
    else:
        placed = [(dataclasses.replace(v, site=site),) for v in vectors for site in sites]
    return placed


def samples_to_choose_on(
    samples: Sequence[Any], of: Sequence[Any], split: str, num_choose: int | None, seed: int = 0
) -> list[Any]:
    """Returns the samples of a split to choose on: some of those that are not evaluated too.

    At most `num_choose` are drawn by the seed, as `--num-samples` draws; all of them stay in their
    order.

    Samples are the same if picture and prompt are: POPE's splits share questions under other IDs,
    and give one ID to different questions.

    Raises:
        ValueError: there are none, or none of a label, or `num_choose` is less than 1.
    """
    from xlvlm_jax.data import select

    require_counts(num_choose=num_choose)
    evaluated = {(sample.image_id, sample.prompt) for sample in samples}
    others = [sample for sample in of if (sample.image_id, sample.prompt) not in evaluated]
    if not others:
        raise ValueError(
            f"--choose-on {split}: every sample in it is also evaluated; give another split, or "
            "evaluate fewer samples (--num-samples)"
        )
    before, left = ({str(s.metadata.get("label")) for s in each} for each in (of, others))
    if lost := before - left:
        raise ValueError(
            f"--choose-on {split}: every question of it with the label "
            f"{', '.join(sorted(lost))} is also evaluated; give another split, or evaluate fewer "
            "samples (--num-samples)"
        )
    # In order, all are those of a sweep of an earlier release, which is then resumed.
    drawn = None if num_choose is None or num_choose >= len(others) else num_choose
    return select.subsample(others, drawn, seed)


def describe_run(
    data: Path,
    dataset: str,
    split: str | None,
    seed: int,
    files: Sequence[Path],
    vectors: Sequence[Any],
) -> dict[str, Any]:
    """Returns where the samples and vectors come from, for the summary."""
    from xlvlm_jax.storage.same_model import MODEL

    names = ("method", "features", "source rows", "target rows", *MODEL)
    return {
        "data": str(data),
        "dataset": dataset,
        "split": split,
        "seed": seed,
        "vectors": [
            {"file": str(file), "site": vector.site, "where": vector.where}
            | {name: vector.source[name] for name in names if name in vector.source}
            for file, vector in zip(files, vectors, strict=True)
        ],
    }
