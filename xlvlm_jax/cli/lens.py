"""`xlvlm lens`: what every layer would say at every token of a prompt and its answer."""

from pathlib import Path
from typing import Annotated

import typer

from xlvlm_jax.cli.console import (
    Adapter,
    Dtype,
    Model,
    Overwrite,
    console,
    load_model,
    parse_where,
    refuse_existing,
    refuse_given,
    require_counts,
    spinner,
)


def lens(
    context: typer.Context,
    model: Model,
    image: Annotated[Path, typer.Argument(help="The picture.")],
    prompt: Annotated[
        str, typer.Option(help="What to ask about it.")
    ] = "Provide a one-sentence caption for the provided image.",
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("lens.html"),
    arrays: Annotated[
        Path | None, typer.Option(help="Also write the words and probabilities to this .npz file.")
    ] = None,
    vector: Annotated[
        list[Path] | None, typer.Option(help="Steer with this vector; may be repeated.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Strength of --vector.")] = 1.0,
    where: Annotated[
        str | None, typer.Option(help="Positions to steer; default: those of the vector.")
    ] = None,
    jacobian: Annotated[
        Path | None,
        typer.Option(
            help="Carry states to the last layer by this Jacobian lens: a file of ours, or a "
            "published .pt file."
        ),
    ] = None,
    neighbours: Annotated[
        Path | None,
        typer.Option(help="Also show the nearest states in these features, at their layers."),
    ] = None,
    num_words: Annotated[int, typer.Option(help="Words per layer and token.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to answer.")] = 20,
    adapter: Adapter = None,
    dtype: Dtype = "float32",
    overwrite: Overwrite = False,
) -> None:
    """Show what every layer would say at every token, as a page (logit lens)."""
    import numpy as np

    from xlvlm_jax import Features, evaluation, lenses, steering
    from xlvlm_jax.data.images import read_image
    from xlvlm_jax.lenses.run import run_lens
    from xlvlm_jax.report.lens_page import write_lens_page
    from xlvlm_jax.storage import atomic

    if not vector:
        refuse_given(context, ("alpha", "where"), "without --vector")
    for file in (output, arrays):
        if file is not None:
            refuse_existing(file, overwrite, directory=False)
    require_counts(num_words=num_words, max_new_tokens=max_new_tokens)
    picture = read_image(image)
    fitted = None if jacobian is None else lenses.load_jacobian_lens(jacobian)
    index = None if neighbours is None else Features.open(neighbours)
    steered = evaluation.Condition(
        tuple(steering.load(path) for path in vector or ()),
        alpha,
        None if where is None else parse_where(where),
    )
    vlm = load_model(model, dtype, adapter=adapter)
    inputs = vlm.process([vlm.render(prompt)], [picture])
    edits = steered.edits(vlm, inputs)
    with spinner("reading the layers"):
        run = run_lens(
            vlm,
            inputs,
            sizes=[(picture.height, picture.width)],
            k=num_words,
            max_new_tokens=max_new_tokens,
            edits=edits,
            carried=None if fitted is None else fitted.carried(vlm),
            index=index,
        )
    names = ", ".join(path.name for path in vector or ())
    facts = {
        "Model": model,
        "Prompt": prompt,
        "Answer": run.prediction,
        "Steering": f"{names}, strength {alpha:g}" if names else "",
        "Lens": f"Jacobian lens, {fitted.num_prompts} prompts" if fitted else "logit lens",
        "Neighbours": "" if neighbours is None else neighbours.name,
    }
    write_lens_page(run, output, decode=vlm.tokenizer.decode, images=[picture], facts=facts)
    if arrays is not None:
        with atomic.writing(arrays) as file:
            np.savez(file, allow_pickle=False, **run.arrays())
        console.print(f"arrays -> {arrays}")
    console.print(f"{run.prediction}")
    console.print(f"{len(run.tokens)} tokens, {len(run.reading.sites)} layers -> {output}")
