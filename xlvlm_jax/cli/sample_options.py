"""Options that choose samples, shared by the commands that read a data set."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Prompt = Annotated[
    str | None,
    typer.Option(
        help="Prompt of every sample; for questions, with {question} in place of the question. "
        "Default: XL-VLMs' prompts."
    ),
]
Annotations = Annotated[
    Path | None,
    typer.Option(
        help="Annotation file, if not at its default path: captions of a folder, Karpathy's file "
        "of coco, the answers of vqav2."
    ),
]
QuestionsFile = Annotated[
    Path | None,
    typer.Option(
        "--questions",
        help="Questions of vqav2, pope, amber or questions, if not at their default path.",
    ),
]
Objects = Annotated[
    Path | None,
    typer.Option(
        help="Captions of coco: its file of instances, such as "
        "annotations/instances_val2014.json, to score hallucination by CHAIR."
    ),
]
DatasetSize = Annotated[
    int | None,
    typer.Option(
        help="Draw this many samples before any are selected, the same ones that XL-VLMs draws."
    ),
]
First = Annotated[
    bool,
    typer.Option("--first/--draw", help="Take the first --num-samples, or draw them by the seed."),
]
SampleIds = Annotated[
    Path | None,
    typer.Option(help="Only samples whose IDs this file lists; for vqav2, IDs of questions."),
]
ContainingMatch = Annotated[
    Literal["inflected", "word", "substring"],
    typer.Option(
        help="How --containing finds a word: also in another form, such as dogs for dog "
        "(inflected); as written (word); or anywhere in the text, as XL-VLMs does (substring)."
    ),
]
ContainingIn = Annotated[
    Literal["any", "first"],
    typer.Option(help="Whether --containing searches all references (any), or only the first."),
]
_ANNOTATIONS = {"coco": "file", "vqav2": "annotations", "folder": "captions"}


def read_samples(
    dataset: str,
    data: Path,
    split: str | None,
    *,
    prompt: str | None = None,
    annotations: Path | None = None,
    questions: Path | None = None,
    objects: Path | None = None,
    dataset_size: int | None = None,
    seed: int = 0,
    **reading: Any,
) -> list[Any]:
    """Returns the samples of a split.

    Args:
        dataset, data, split: as for `xlvlm_jax.data.load`.
        prompt, annotations, questions: instead of the data set's own.
        objects: COCO's file of instances.
        dataset_size: number of samples to draw as XL-VLMs does; None for all.
        seed: random seed of the draw.
        **reading: further options of the data set's reader.

    Raises:
        ValueError: as `xlvlm_jax.data.load`, or the data set has no such file.
    """
    from xlvlm_jax import data as datasets
    from xlvlm_jax.data import select

    if questions is not None and dataset not in ("vqav2", "pope", "amber", "questions"):
        raise ValueError(
            f"--questions belongs to --dataset vqav2, pope, amber or questions, not to {dataset}"
        )
    if annotations is not None and dataset not in ("coco", "vqav2", "folder", "amber"):
        raise ValueError(
            f"--annotations does not belong to --dataset {dataset}; "
            + ("give --questions" if dataset in ("pope", "questions") else "omit it")
        )
    if objects is not None and dataset != "coco":
        raise ValueError(f"--objects belongs to --dataset coco, not to {dataset}")
    given = {"prompt": prompt, _ANNOTATIONS.get(dataset, "annotations"): annotations}
    given |= {"questions": questions, "objects": objects}
    options = reading | {name: value for name, value in given.items() if value is not None}
    if dataset == "vqav2" and dataset_size is not None:
        options["order"] = "annotations"
    samples = datasets.load(dataset, data, split, **options)
    if dataset_size is None:
        return samples
    return select.drawn_as_xl_vlms(samples, dataset_size, seed)


def few_samples(
    samples: list[Any], num_samples: int | None, seed: int | None, sample_ids: Path | None = None
) -> list[Any]:
    """Returns the samples with listed IDs, and of these at most `num_samples`.

    Args:
        samples: samples to choose from.
        num_samples: maximum number of samples; None for all.
        seed: random seed of the choice; None for the first ones.
        sample_ids: file of IDs; None for all.
    """
    from xlvlm_jax.data import select

    if sample_ids is not None:
        samples = select.of_samples(samples, select.read_ids(sample_ids))
    return select.subsample(samples, num_samples, seed)


def selected(
    samples: list[Any],
    containing: str | None,
    *,
    key: str,
    any_case: bool,
    match: Any,
    which: Any,
    image_ids: Path | None,
) -> list[Any]:
    """Returns the samples that the options choose; all of them by default.

    Args:
        samples: samples to choose from.
        containing: a word, a class of words, or words separated by commas.
        key, any_case, match, which: see `xlvlm_jax.data.select.containing`.
        image_ids: a file of IDs.

    Raises:
        ValueError: no sample is left, or a file is invalid.
    """
    from xlvlm_jax.data import select
    from xlvlm_jax.data.words import class_words, is_class

    if containing is not None:
        words = class_words(containing) if is_class(containing) else containing
        samples = select.containing(
            samples, words, key=key, any_case=any_case, match=match, which=which
        )
    if image_ids is not None:
        samples = select.of_images(samples, select.read_ids(image_ids))
    return samples
