"""An adapter of the embedded model: from pictures to a shift in the report, both ways."""

import pytest

import ports
from xlvlm_jax import Features, data
from xlvlm_jax.data import scenes, select
from xlvlm_jax.demo import embedded
from xlvlm_jax.demo.shift_part import describe, run_shift
from xlvlm_jax.features import ExtractionSettings, extract
from xlvlm_jax.features.selection import Selection
from xlvlm_jax.shift import ShiftAnalysis

NORM = "language_model.model.norm"
SETTINGS = ExtractionSettings(
    sites=(NORM,), selection=Selection("class", "dog,dogs"), batch_size=16, max_new_tokens=20
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scenes")
    scenes.write(directory, train=80, seed=5)
    return directory


@pytest.mark.slow
def test_the_shift_of_the_demo(pictures, tmp_path):
    vlm = ports.load(embedded.LLAVA)
    samples = select.containing(data.load("coco", pictures, "train"), ("dog", "dogs"))
    extract(vlm, samples, tmp_path / "features", SETTINGS)
    analysis = run_shift(vlm, tmp_path, samples, SETTINGS, site=NORM, num_concepts=3)
    assert analysis.source["fine-tuned model"] == "color"
    assert analysis.rows["common"] > 0.8 * len(samples)
    assert analysis.spread.magnitude[analysis.moved].min() > 0
    assert set(describe(analysis)) == {"words overlap", "images overlap", "correlations"}
    drawn = {path.name for path in (tmp_path / "shift").iterdir()}
    assert {"overlap.svg", "recovery.svg", "panels.png", "shift.json"} <= drawn


@pytest.mark.slow
def test_the_commands_with_an_adapter(xlvlm, pictures, tmp_path):
    """Runs one extraction of both models, concepts of the original, the shift, the report."""
    run = tmp_path / "run"
    where = ("--site", NORM, "--tokens", "token-of-interest:dog", "--containing", "dog")
    options = (*where, "--finetuned", "color", "--batch-size", 16, "--output", run / "features")
    status, out, errors = xlvlm("extract", "embedded", pictures, *options)
    assert status == 0, errors
    features = Features.open(run / "features")
    assert features.sites == (f"finetuned:{NORM}", NORM)
    assert features.manifest["finetuned"]["adapter"] == "color"
    learn = ("--num-concepts", 3, "--method", "kmeans", "--site", NORM)
    assert xlvlm("decompose", run / "features", "--output", run / "concepts", *learn)[0] == 0
    options = ("--concepts", run / "concepts", "--model", "embedded", "--adapter", "color")
    status, out, errors = xlvlm("shift", run / "features", *options, "--output", run / "shift")
    assert status == 0, errors
    assert "mean overlap of words (T-Overlap)" in out and "consistency and recovery" in out
    analysis = ShiftAnalysis.load(run / "shift")
    assert len(analysis.words["shifted"]) == 3
    assert xlvlm("report", run)[0] == 0
    assert "Shift by fine-tuning" in (run / "report.html").read_text()
