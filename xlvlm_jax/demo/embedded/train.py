"""Trains the embedded model from scratch: `xlvlm train-demo`.

Three stages with warm-up and cosine decay, using AdamW (Loshchilov and Hutter 2019) or Muon:
    contrast   a CLIP model on pictures and texts; its image tower becomes the LLaVA's
    align      projector and decoder with the tower frozen (the decoder is untrained before)
    whole      everything, with Muon
A stage saves its state every `SAVE_EVERY` steps, from which a restarted training resumes. Seed and
step determine the data of a step, so an interrupted run ends like an uninterrupted one.
"""

import dataclasses
import functools
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
from flax import linen as nn
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ports import checkpoint
from ports.models import clip, llava
from xlvlm_jax.data import prompts, scenes
from xlvlm_jax.data.scenes.words import NOUNS
from xlvlm_jax.demo.embedded import blueprint, sequences

SAVE_EVERY = 200
POOL = 40_000  # training pictures; captions and questions are drawn anew each time
CONTINUATIONS, LENGTH = 8, 28  # captions and questions per picture, and their positions
HALVES_UNTIL = 0.15  # share of a stage after which questions are asked without bias
NUMBERS = {1: "one", 2: "two", 3: "three"}
CLIP_TEXT = "A photo is described by the words"


@dataclasses.dataclass(frozen=True)
class Stage:
    """The settings of a stage."""

    name: str
    steps: int
    batch: int
    rate: float
    frozen: tuple[str, ...] = ()  # top-level modules that are not trained
    muon: bool = False  # instead of AdamW


STAGES = (
    Stage("contrast", steps=850, batch=96, rate=1.5e-3),
    Stage("align", steps=150, batch=32, rate=1.5e-3, frozen=("vision_tower",)),
    Stage("whole", steps=1500, batch=32, rate=1.5e-3, muon=True),
)


class Pictures:
    """The pool of training pictures, drawn on first use and then kept in memory (1.5 GB)."""

    def __init__(self, seed: int):
        self.seed = seed
        size = blueprint.IMAGE_SIZE
        self._pixels = np.empty((POOL, size, size, 3), np.uint8)
        self._drawn = np.zeros(POOL, bool)

    def scene(self, index: int) -> scenes.Scene:
        """Returns scene number `index` of the training split."""
        return scenes.sample_scene("train", index, self.seed)

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns uint8[112, 112, 3], equal to what is read from a written file."""
        if not self._drawn[index]:
            self._pixels[index] = scenes.training_image(self.scene(index))
            self._drawn[index] = True
        return self._pixels[index]


def contrast_example(
    pictures: Pictures, tokenizer: Any, rng: np.random.Generator, progress: float = 1.0
) -> dict[str, np.ndarray]:
    """Returns a picture and a text: a caption, or words in CLIPScore's sentence.

    Captions omit attributes, so many fit several pictures of a batch; the words name all
    attributes.
    """
    index = int(rng.integers(POOL))
    scene = pictures.scene(index)
    text = str(rng.choice(scenes.captions(scene)))
    if rng.random() < 0.6:
        one, many = next(iter(NOUNS[scene.kind]))  # the usual name comes first
        noun = one if scene.count == 1 else many
        words = [NUMBERS[scene.count], scene.colour, noun, scene.place]
        words = rng.permutation([*words, *([scene.mood] if scene.mood else [])])
        text = f"{CLIP_TEXT} {', '.join(words)}."
    tokens = tokenizer(text, padding="max_length", max_length=32, truncation=True)
    return {
        "pictures": pictures[index],
        "tokens": np.array(tokens["input_ids"], np.int32),
        "mask": np.array(tokens["attention_mask"], np.int32),
    }


def _shows_a_half(scene: scenes.Scene, question: scenes.Question) -> float:
    """Returns the probability with which a question is asked at the beginning.

    The answer, yes or no, depends on question and picture together and on neither alone. Without a
    gradient until the model attends to both, training stays at chance for long. At first,
    therefore, half of the values that a question can name, and half of those that a picture can
    have, mostly come with yes, the others mostly with no. Each alone is then informative, the model
    learns to attend to both, and learns the rest once the bias is gone.
    """
    if question.answer_type != "yes/no":
        return 1.0
    attribute = "kind" if question.attribute == "exists" else question.attribute
    values = {
        "kind": scenes.KINDS,
        "colour": scenes.COLOURS,
        "count": tuple(NUMBERS),
        "place": scenes.PLACES,
        "mood": scenes.MOODS,
    }[attribute]
    asked = values.index(scenes.named(question.question)[attribute])
    shown = values.index(scenes.attributes(scene)[attribute])
    yes = question.answer == "yes"
    agreeing = (yes == (asked % 2 == 0)) + (yes == (shown % 2 == 0))
    return (0.02, 0.5, 1.0)[agreeing]


def answer_example(
    pictures: Pictures, tokenizer: Any, rng: np.random.Generator, progress: float = 1.0
) -> dict[str, np.ndarray]:
    """Returns a picture with a caption, two open questions and a yes/no question per attribute.

    Yes/no questions are the hardest to learn, so more are drawn than the scene has, with every
    attribute covered. `progress` is the share of the stage that is done; see `_shows_a_half`.
    """
    index = int(rng.integers(POOL))
    scene = pictures.scene(index)
    turns = [sequences.Turn(prompts.CAPTION, str(rng.choice(scenes.captions(scene))))]
    asked = [q for q in scenes.questions(scene) if q.answer_type != "yes/no"]
    asked = [asked[i] for i in rng.permutation(len(asked))[:2]]
    draw = random.Random(int(rng.integers(2**62)))
    for attribute in ("exists", "colour", "place", "count", "mood" if scene.mood else "colour"):
        while True:
            question = scenes.check(scene, attribute, draw)
            if draw.random() < _shows_a_half(scene, question) + progress / HALVES_UNTIL:
                break
        asked.append(question)
    # An answer has one or two tokens, a caption a dozen: the weight balances them.
    turns += [sequences.Turn(prompts.question(q.question), q.answer, weight=2.0) for q in asked]
    rows = sequences.continuations(tokenizer, turns, CONTINUATIONS, LENGTH)
    return {"pictures": pictures[index], **rows._asdict()}


def batches(
    example: Callable[..., dict[str, np.ndarray]], stage: Stage, seed: int, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the stage's batches from step `start` on, prefetched by two threads."""
    number = [s.name for s in STAGES].index(stage.name)

    def make(i: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng([seed, number, i])
        return example(rng, progress=i / (stage.steps * stage.batch))

    dataset = grain.MapDataset.range(start * stage.batch, stage.steps * stage.batch)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * stage.batch)
    return iter(dataset.map(make).to_iter_dataset(options).batch(stage.batch))


def normalise(pictures: jax.Array | np.ndarray) -> jax.Array:
    """Maps uint8[B, H, W, 3] to float32[B, 3, H, W], as the image processor does."""
    mean, deviation = jnp.array(OPENAI_CLIP_MEAN), jnp.array(OPENAI_CLIP_STD)
    return jnp.moveaxis((pictures / 255.0 - mean) / deviation, -1, 1)


def contrast_loss(module: clip.CLIP, params: dict, batch: dict) -> tuple[jax.Array, dict]:
    """Returns CLIP's symmetric cross-entropy, and the share of pairs found in the batch."""
    model = module.bind({"params": params})
    logits = model(batch["tokens"], batch["mask"], normalise(batch["pictures"]))
    labels = jnp.arange(len(logits))
    both = jnp.stack([logits, logits.T])
    loss = optax.softmax_cross_entropy_with_integer_labels(both, labels[None]).mean()
    return loss, {"found": (both.argmax(-1) == labels).mean()}


def answer_loss(
    module: llava.Llava, prefix: np.ndarray, params: dict, batch: dict
) -> tuple[jax.Array, dict]:
    """Returns the weighted cross-entropy of the answers' tokens, and accuracies."""
    pixels = normalise(batch["pictures"])
    logits = sequences.logits(module, params, prefix, pixels, batch["input_ids"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["target"])
    weight = batch["weight"]
    right = logits.argmax(-1) == batch["target"]
    # The first token is the answer; the second, the end token, is trivial to predict.
    is_answer = (weight > 1) & (batch["target"] != blueprint.EOS)
    figures = {
        "answers": (right & is_answer).sum() / is_answer.sum(),
        "captions": (right & (weight == 1)).sum() / (weight == 1).sum(),
    }
    return (losses * weight).sum() / weight.sum(), figures


def optimizer(stage: Stage, params: dict) -> optax.GradientTransformation:
    """Returns AdamW or Muon with clipping, warm-up and cosine decay; frozen modules do not change.

    Muon (Jordan et al. 2024) updates the kernels inside the networks, scaled to suit AdamW's
    learning rates; Adam updates embeddings, the head, norms and biases.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0,
        peak_value=stage.rate,
        warmup_steps=min(100, stage.steps // 4),
        decay_steps=stage.steps,
        end_value=0.01 * stage.rate,
    )
    if stage.muon:

        def matrices(tree: optax.Params) -> optax.Params:
            return jax.tree_util.tree_map_with_path(
                lambda path, leaf: (
                    optax.contrib.MuonDimensionNumbers()
                    if leaf.ndim == 2 and path[-1].key == "kernel" and path[-2].key != "lm_head"
                    else None
                ),
                tree,
            )

        step = optax.contrib.muon(
            schedule,
            weight_decay=0.05,
            adam_b2=0.98,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=matrices,
        )
    else:
        decayed = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
        step = optax.adamw(schedule, b2=0.98, weight_decay=0.05, mask=decayed)
    labels = {
        name: jax.tree.map(lambda _, n=name: "frozen" if n in stage.frozen else "train", tree)
        for name, tree in params.items()
    }
    train = optax.chain(optax.clip_by_global_norm(1.0), step)
    return optax.multi_transform({"train": train, "frozen": optax.set_to_zero()}, labels)


def run_stage(
    stage: Stage,
    loss: Callable[[dict, dict], tuple[jax.Array, dict]],
    params: dict,
    example: Callable[..., dict[str, np.ndarray]],
    directory: Path,
    seed: int,
    log: Callable[[dict], None],
) -> dict:
    """Trains `params` through one stage, resuming from the state in `directory`, if any."""
    transform = optimizer(stage, params)
    # A copy, because each update donates its state, and the caller keeps the parameters.
    params = jax.tree.map(jnp.copy, params)
    state = {"params": params, "optimizer": transform.init(params)}

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: dict, batch: dict) -> tuple[dict, dict]:
        (value, figures), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"], batch)
        change, moments = transform.update(gradient, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], change)
        return {"params": params, "optimizer": moments}, {"loss": value, **figures}

    options = ocp.CheckpointManagerOptions(max_to_keep=1, save_interval_steps=SAVE_EVERY)
    with ocp.CheckpointManager(directory.absolute() / stage.name, options=options) as manager:
        start = manager.latest_step() or 0
        if start:
            state = manager.restore(start, args=ocp.args.StandardRestore(state))
        began = time.perf_counter()
        recent: list[dict] = []
        for step, batch in enumerate(batches(example, stage, seed, start), start + 1):
            state, figures = update(state, batch)
            recent.append(figures)
            if step % 25 == 0 or step == stage.steps:
                means = {k: float(np.mean([f[k] for f in recent])) for k in recent[0]}
                seconds = (time.perf_counter() - began) / (step - start)
                log({"stage": stage.name, "step": step, "of": stage.steps, **means, "s": seconds})
                recent = []
            manager.save(step, args=ocp.args.StandardSave(state), force=step == stage.steps)
        manager.wait_until_finished()
    return state["params"]


def train(
    work: Path,
    clip_directory: Path = Path("clip"),
    llava_directory: Path = Path("llava"),
    *,
    seed: int = 0,
    stages: tuple[Stage, ...] = STAGES,
    log: Callable[[dict], None] | None = None,
) -> None:
    """Trains both models and writes them, in float16, in the Hugging Face layout.

    Args:
        work: directory of the stages' states and the log, from which a later call resumes.
        clip_directory, llava_directory: directories to write the trained models to.
        seed: random seed of the pictures, the order of the data and the initial parameters.
        stages: the three stages.
        log: called every 25 steps with a dict of figures, which work/log.jsonl records too.
    """
    work.mkdir(parents=True, exist_ok=True)

    def record(figures: dict) -> None:
        with (work / "log.jsonl").open("a") as file:
            file.write(json.dumps({k: _short(v) for k, v in figures.items()}) + "\n")
        if log is not None:
            log(figures)

    contrast, align, whole = stages
    pictures = Pictures(seed)
    keys = jax.random.split(jax.random.key(seed), 2)

    tokenizer = blueprint.make_tokenizer(end=True)
    config = blueprint.clip_config(len(tokenizer))
    pair = clip.CLIP(clip.Config.from_hf(config))
    params = run_stage(
        contrast,
        functools.partial(contrast_loss, pair),
        _initial(pair, keys[0], *clip.example_inputs(pair.config)),
        functools.partial(contrast_example, pictures, tokenizer),
        work,
        seed,
        record,
    )
    blueprint.save_clip(clip_directory, config)
    checkpoint.save_params(params, clip_directory, dtype=np.float16)
    tower = params["vision_model"]

    tokenizer = blueprint.make_tokenizer()
    config = blueprint.llava_config(len(tokenizer))
    model = llava.Llava(llava.Config.from_hf(config))
    params = _initial(model, keys[1], llava.example_inputs(model.config))
    params["vision_tower"]["vision_model"] = tower
    for stage in (align, whole):
        params = run_stage(
            stage,
            functools.partial(answer_loss, model, sequences.prefix(tokenizer)),
            params,
            functools.partial(answer_example, pictures, tokenizer),
            work,
            seed,
            record,
        )
    blueprint.save_llava(llava_directory, config)
    checkpoint.save_params(params, llava_directory, dtype=np.float16)


def _initial(module: nn.Module, key: jax.Array, *shapes: Any) -> dict:
    """Returns random parameters of a module that takes arguments of these shapes."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.jit(module.init)(key, *zeros)["params"]


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
