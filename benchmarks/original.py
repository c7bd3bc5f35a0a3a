"""XL-VLMs beside this project, stage by stage, on the bundled model and drawn scenes.

    python -m benchmarks.original DIR                          # DIR: a checkout of mshukor/xl-vlms
    python -m benchmarks.original DIR --python ENV/bin/python  # the Python that XL-VLMs runs in
    python -m benchmarks.original DIR --images 24 --questions 60

XL-VLMs needs torch and transformers 4.47; packages that it imports but that these stages do not
use (clip, nltk, language_evaluation) are replaced by empty ones where they are not installed. Both
sides run in float16, as XL-VLMs always does, each stage twice: the first run of this project
compiles, the second reads its programs from the cache. Times are CPU seconds of whole processes,
imports included. Without a checkout the benchmark says so and ends.

    features   states of "dog" in the captions of images whose first caption has it
    vector     mean state of answers "no" minus that of answers "yes"
    answers    accuracy of answers to questions, by XL-VLMs' protocol
    steered    the same, while XL-VLMs' vector steers both
    shift      of the concepts of "dog" by fine-tuning to name colours: where they move, how
               consistently

XL-VLMs' list of English words is nltk's "words", which is web2; without nltk its stand-in reads the
web2 of english-words.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from english_words import get_english_words_set
from rich.console import Console
from rich.table import Table

from benchmarks import measure

SITE = "language_model.model.layers.6"
TIMES = ("ours cold", "ours warm", "XL-VLMs cold", "XL-VLMs warm")
STAND_INS = {
    "clip": "",
    "language_evaluation": "",
    "nltk/__init__": "",
    "nltk/corpus": "import json, pathlib\n"
    "LISTED = json.loads((pathlib.Path(__file__).parent / 'words.json').read_text())\n"
    "words = type('words', (), {'words': staticmethod(lambda: LISTED)})",
    "torchvision/__init__": "",
    "torchvision/transforms": "CenterCrop = Compose = Normalize = Resize = ToTensor = None\n"
    "InterpolationMode = None",
}


class Stage(NamedTuple):
    """What both sides run, and how their results are compared."""

    name: str
    theirs: list[list[str]]  # arguments of XL-VLMs' scripts
    ours: list[list[str]]  # arguments of `xlvlm`
    compare: Callable[[], str]


def stages(work: Path, images: int, questions: int) -> list[Stage]:
    """Draws the data, places the model and returns the stages."""
    import ports
    from ports.checkpoint.params import save_params
    from xlvlm_jax.data import scenes
    from xlvlm_jax.demo import embedded

    data, model = work / "pictures", work / "llava-1.5-bundled"  # a name that XL-VLMs knows
    scenes.write(data, train=images, test=images)
    shutil.copytree(embedded.LLAVA, model, dirs_exist_ok=True)
    color = work / "llava-1.5-color"
    shutil.copytree(embedded.LLAVA, color, dirs_exist_ok=True)
    merged = ports.load("embedded", adapter=str(embedded.ADAPTERS["color"]))
    save_params(merged.params, color, dtype=np.float16)
    for name in ("features", "steering"):
        (work / "theirs" / name).mkdir(parents=True, exist_ok=True)
    save = ["src/save_features.py", *_common(model, data, work), "--generation_mode"]
    asked = ["--dataset_name", "vqav2", "--split", "train2014", "--max_new_tokens", "5"]
    asked += ["--dataset_size", str(questions)]
    for kind, name in (("annotation", "mscoco"), ("questions", "OpenEnded_mscoco")):
        ending = "annotations" if kind == "annotation" else "questions"
        asked += [f"--{kind}_file", f"v2_{name}_train2014_{ending}.json"]
    of_word = "save_hidden_states_for_token_of_interest"
    extract = ["extract", str(model), str(data), "--protocol", "xl-vlms", "--site", SITE]
    extract += ["--dtype", "float16", "--states-dtype", "float16"]
    about = ["--dataset", "vqav2", "--split", "train2014", "--max-new-tokens", "5"]
    about += ["--dataset-size", str(questions)]
    evaluate = [str(model), str(data), "--protocol", "xl-vlms", "--dtype", "float16", *about]

    dogs = ["--dataset_name", "coco", "--annotation_file", "dataset_coco.json"]
    dogs += ["--split", "train", "--max_new_tokens", "20"]

    def theirs(name: str, *options: str, word: str | None = None) -> list[str]:
        chosen = [] if word is None else ["--select_token_of_interest_samples"]
        chosen += [] if word is None else ["--token_of_interest", word]
        return [*save, *chosen, "--save_filename", name, *options]

    def of(word: str, *options: str) -> list[str]:
        tokens = ["--containing", word, "--tokens", f"token-of-interest:{word}"]
        return [*extract, *tokens, *options, "--output", str(work / "ours" / word)]

    hook = ["--hook_names", of_word, "--modules_to_hook", SITE]
    hook += ["--save_only_generated_tokens"]
    saved = work / "theirs/features" / of_word
    files = {word: work / "theirs/features" / f"{of_word}_{word}.pth" for word in ("yes", "no")}
    vector = work / "theirs/steering/shift_of_means_yes-no.pth"
    fit = ["src/analyse_features.py", *_common(model, data, work)]
    fit += ["--analysis_name", "steering_vector", "--save_filename", "yes-no"]
    fit += ["--base_features_key", files["yes"].name, "--module_to_decompose", SITE]
    fit += ["--features_path", str(files["yes"]), str(files["no"])]
    read = ["import-pth", str(vector), "--site", SITE, "--overwrite"]
    score = ["--hook_names", "vqav2_accuracy", "--save_predictions"]
    steer = ["--hook_names", "shift_hidden_states_add", "vqav2_accuracy", "--save_predictions"]
    steer += ["--modules_to_hook", SITE, "--shift_vector_path", str(vector)]
    out = ["--overwrite", "--output"]
    return [
        Stage(
            "features",
            [
                theirs("dog", *hook, *dogs, word="dog"),
            ],
            [of("dog", "--max-new-tokens", "20")],
            lambda: _rows(work / "ours/dog", work / f"theirs/features/{of_word}_dog.pth"),
        ),
        Stage(
            "vector",
            [*(theirs(word, *hook, *asked, word=word) for word in files), fit],
            [
                *(of(word, "--key", "answer", *about) for word in files),
                [
                    *("steer", "fit", str(work / "ours/yes"), "--overwrite"),
                    *("--target-features", str(work / "ours/no")),
                    *("--output", str(work / "ours/yes-no.safetensors")),
                ],
            ],
            lambda: _vectors(work / "ours/yes-no.safetensors", vector),
        ),
        Stage(
            "answers",
            [theirs("plain", *score, *asked)],
            [["evaluate", *evaluate, *out, str(work / "ours/plain")]],
            lambda: _answers(work / "ours/plain", "plain", work / "theirs", "plain"),
        ),
        Stage(
            "steered",
            [theirs("steered", *steer, *asked)],
            [
                [*read, "--output", str(work / "ours/theirs.safetensors")],
                [
                    *("steer", "apply", *evaluate, *out, str(work / "ours/steered")),
                    *("--vector", str(work / "ours/theirs.safetensors")),
                ],
            ],
            lambda: _answers(work / "ours/steered", "steered", work / "theirs", "steered"),
        ),
        Stage(
            "shift",
            [
                theirs("original", *hook, *dogs, word="dog"),
                [
                    *("src/save_features.py", *_common(color, data, work), "--generation_mode"),
                    *("--select_token_of_interest_samples", "--token_of_interest", "dog"),
                    *("--save_filename", "color", *hook, *dogs),
                ],
                [
                    *("src/analyse_features.py", *_common(model, data, work)),
                    *("--analysis_name", "analyse_clusters", "--save_filename", "color"),
                    *("--origin_model_feature_path", f"{saved}_original.pth"),
                    *("--dest_model_feature_path", f"{saved}_color.pth"),
                    *("--origin_model_analysis_path", str(work / "ours/concepts.pth")),
                    *("--module_to_decompose", SITE, "--decomposition_method", "kmeans"),
                    *("--num_concepts", "2", "--compute_stat_shift_vectors"),
                    *("--num_grounded_text_tokens", "15", "--pre_num_top_tokens", "200"),
                ],
            ],
            [
                [
                    *("extract", str(color), *extract[2:], "--max-new-tokens", "20"),
                    *("--containing", "dog", "--tokens", "token-of-interest:dog"),
                    *("--output", str(work / "ours/color")),
                ],
                [
                    *("decompose", str(work / "ours/dog"), "--method", "kmeans"),
                    *("--num-concepts", "2", *out, str(work / "ours/concepts")),
                ],
                [
                    *("ground", str(work / "ours/concepts"), "--protocol", "xl-vlms"),
                    *("--model", str(model), "--overwrite"),
                ],
                [
                    *("export-pth", str(work / "ours/concepts")),
                    *(*out, str(work / "ours/concepts.pth")),
                ],
                [
                    *("shift", str(work / "ours/dog"), str(work / "ours/color")),
                    *("--protocol", "xl-vlms", "--model", str(model)),
                    *("--concepts", str(work / "ours/concepts"), "--num-images", "5"),
                    *(*out, str(work / "ours/shift")),
                ],
            ],
            lambda: _shift(
                work / "ours/shift", work / "theirs/analysis/analyse_clusters_color.pth"
            ),
        ),
    ]


def _common(model: Path, data: Path, work: Path) -> list[str]:
    places = ["--model_name_or_path", str(model), "--data_dir", str(data), "--local_files_only"]
    return [*places, "--save_dir", str(work / "theirs"), "--exact_match_modules_to_hook"]


def _difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    if ours.shape != theirs.shape:
        return f"{ours.shape} and {theirs.shape}: other rows"
    size = np.abs(theirs).max()
    return f"{' x '.join(map(str, ours.shape))}, differ by {np.abs(ours - theirs).max() / size:.1e}"


def _rows(ours: Path, theirs: Path) -> str:
    from xlvlm_jax import Features
    from xlvlm_jax.features.pth import import_features

    imported = theirs.with_suffix("")
    shutil.rmtree(imported, ignore_errors=True)
    rows = import_features(theirs, imported).matrix(SITE)
    return _difference(Features.open(ours).matrix(SITE), np.asarray(rows, np.float32))


def _vectors(ours: Path, theirs: Path) -> str:
    from xlvlm_jax import SteeringVector, steering

    mine = np.asarray(SteeringVector.load(ours).vector)
    return _difference(mine, np.asarray(steering.import_vector(theirs, SITE).vector))


def _answers(ours: Path, condition: str, theirs: Path, name: str) -> str:
    mine = json.loads((ours / "summary.json").read_text())["conditions"][condition]["scores"]
    lines = (json.loads(x) for x in (ours / "predictions.jsonl").read_text().splitlines())
    given = {line["id"]: line["predictions"][condition] for line in lines}
    file = theirs / f"vqav2_accuracy_{name}"
    accuracy = json.loads(file.with_suffix(".json").read_text())["global_accuracy"]["overall"]
    answers = json.loads(file.with_name(f"{file.name}_model_prediction.json").read_text())
    same = sum(given[key].strip() == text.strip() for key, text in answers.items())
    own = 100 * mine["mean over types"]["xl_vlms"]
    return f"{same} of {len(answers)} answers the same, {own:.2f} and {accuracy:.2f} %"


def _shift(ours: Path, theirs: Path) -> str:
    from xlvlm_jax.features.pth.reader import read_pth
    from xlvlm_jax.shift import ShiftAnalysis

    mine, saved = ShiftAnalysis.load(ours), read_pth(theirs)
    concepts = np.asarray(saved["shifted_components"], np.float32)
    consistent = np.array([float(np.asarray(x)) for x in saved["shift_stats"]["cosine_sim_scores"]])
    further = np.abs(np.asarray(mine.spread.consistency) - consistent).max()
    return f"{_difference(mine.shifted, concepts)}; consistency by {further:.1e}"


def run_ours(commands: Sequence[Sequence[str]], cache: Path) -> float:
    """Runs commands of this project; returns the CPU seconds they took."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache / "programs")}
    call = "from xlvlm_jax.cli import main; main()"
    for arguments in commands:  # an extraction that is there would only be found complete
        if arguments[0] == "extract":
            shutil.rmtree(arguments[-1], ignore_errors=True)
    return _timed([[sys.executable, "-c", call, *each] for each in commands], None, environment)


def run_theirs(commands: Sequence[Sequence[str]], python: str, checkout: Path, work: Path) -> float:
    """Runs scripts of XL-VLMs; returns the CPU seconds they took."""
    path = work / "stand-ins"
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    for name, content in STAND_INS.items():
        package = name.split("/")[0]
        if subprocess.run([python, "-c", probe, package], check=False).returncode:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / f"{name}.py").write_text(content)
    if (path / "nltk").is_dir():
        listed = sorted(get_english_words_set(["web2"], alpha=False))
        (path / "nltk" / "words.json").write_text(json.dumps(listed))
    known = os.environ.get("PYTHONPATH")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), *filter(None, [known])])}
    return _timed([[python, *each] for each in commands], checkout, environment)


def _timed(
    commands: Sequence[Sequence[str]], directory: Path | None, environment: dict[str, str]
) -> float:
    before = _spent()
    for command in commands:
        done = subprocess.run(
            command, cwd=directory, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            shown = " ".join(command[:4])
            raise SystemExit(f"{shown} ... failed:\n{done.stdout[-500:]}{done.stderr[-2000:]}")
    return _spent() - before


def _spent() -> float:
    """Returns the CPU seconds of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="checkout of XL-VLMs")
    parser.add_argument("--python", default=sys.executable, help="Python that XL-VLMs runs in")
    parser.add_argument("--work", type=Path, default=Path("original-run"), help="new directory")
    parser.add_argument("--images", type=int, default=60, help="drawn images per split")
    parser.add_argument("--questions", type=int, default=200, help="questions, drawn by XL-VLMs")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/original.json"), help="JSON file"
    )
    options = parser.parse_args()
    console = Console(markup=False)
    checkout, work = options.directory.resolve(), options.work.resolve()
    if not (checkout / "src" / "save_features.py").is_file():
        console.print(f"skipped: {options.directory} is not a checkout of XL-VLMs", markup=False)
        return
    if work.exists():
        raise SystemExit(f"{options.work} exists; name a new directory with --work")
    table = Table("stage", "agreement", *TIMES, box=None)
    rows = []
    for stage in stages(work, options.images, options.questions):
        ours = [run_ours(stage.ours, work) for _ in range(2)]
        theirs = [run_theirs(stage.theirs, options.python, checkout, work) for _ in range(2)]
        seconds = dict(zip(TIMES, (*ours, *theirs), strict=True))
        rows.append({"stage": stage.name, "agreement": stage.compare(), **seconds})
        table.add_row(stage.name, rows[-1]["agreement"], *(f"{x:.1f} s" for x in seconds.values()))
        measure.save(options.output, rows, "torch", "transformers")
    console.print(table)


if __name__ == "__main__":
    main()
