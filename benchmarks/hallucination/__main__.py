"""Every steering method against hallucination, on the embedded model made prone to it.

    python -m benchmarks.hallucination
    python -m benchmarks.hallucination --num-val 80 --num-test 120 --test-method iti

Every method is fitted on training pictures; site, strength and the method's own settings are chosen
on validation pictures, as the largest effect that costs at most `--budget` points; what is chosen,
and nothing else, is tried on test pictures.

    effect   the share of false yes (yes to what is not in the picture) that are gone
    cost     points of accuracy on all other questions about the pictures

The instruction baseline is chosen in the same way from the wordings in `INSTRUCTIONS`. Fits and
trials are kept in the output directory; a run that was killed goes on from there.
"""

import argparse
from pathlib import Path

from rich.console import Console

import ports
from benchmarks import measure
from benchmarks.hallucination import questions, tables
from benchmarks.hallucination.common import Setting
from xlvlm_jax.data import scenes
from xlvlm_jax.demo import embedded


def main() -> None:
    """Parse, fit, choose, test, print, save."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--train", type=int, default=300, help="pictures to fit on")
    parser.add_argument("--val", type=int, default=200, help="pictures to choose on")
    parser.add_argument("--test", type=int, default=300, help="pictures to test on")
    parser.add_argument("--num-val", type=int, help="validation pictures to use; default: all")
    parser.add_argument("--num-test", type=int, help="test pictures to use; default: all")
    parser.add_argument("--test-method", action="append", help="to test; default: all")
    parser.add_argument("--budget", type=float, default=1.0, help="maximum cost, in points")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/hallucination"), help="directory"
    )
    arguments = parser.parse_args()
    console = Console(markup=False)
    console.width = max(console.width, 110)
    counts = {name: getattr(arguments, name) for name in ("train", "val", "test")}
    # Fits and answers belong to these pictures.
    output = arguments.output / "{train}-{val}-{test}".format(**counts)
    pictures = output / "pictures"
    if not (pictures / "dataset_coco.json").is_file():
        scenes.write(pictures, **counts)
    vlm = ports.load(embedded.LLAVA, adapter=embedded.ADAPTERS["companions"])
    used = {"val": arguments.num_val, "test": arguments.num_test}
    setting = Setting(vlm, pictures, output, arguments.budget, used, console.print)
    found = questions.run(setting, arguments.test_method)
    directory = output / "questions"
    measure.save(directory / "results.json", found.rows, "scikit-learn")
    tables.draw(found.sweep, directory / "tradeoff.svg")
    text = tables.markdown(found.rows)
    (directory / "results.md").write_text(text, "utf-8")
    console.print(text)
    console.print(f"saved to {output}")


if __name__ == "__main__":
    main()
