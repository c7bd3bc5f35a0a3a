"""Features on disk: what is written is read; a killed run resumes and ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlvlm_jax.features import reader
from xlvlm_jax.features import writer as store
from xlvlm_jax.features.reader import Features
from xlvlm_jax.features.writer import FeaturesWriter
from xlvlm_jax.storage import zarr_rows

ARGUMENTS = {"model": "tiny", "tokens": "index:-1", "batch_size": 4, "seeds": (0, 1)}
SITES = {"language_model.model.layers.1": 5, "language_model.model.norm": 3}


def batch(number, rows_of=(1, 0, 2, 1)):
    """Returns the batch with this number: samples, states, sample_index, positions, tokens."""
    rng = np.random.default_rng(number)
    index = np.repeat(np.arange(len(rows_of)), rows_of)
    states = {
        site: rng.normal(size=(len(index), D)).astype(np.float32) for site, D in SITES.items()
    }
    samples = [{"id": f"{number}-{i}", "prediction": "a dog é"} for i in range(len(rows_of))]
    return samples, states, index, rng.integers(0, 99, len(index)), rng.integers(0, 99, len(index))


def write(path, batches=range(5), close=True, **options):
    with FeaturesWriter(path, ARGUMENTS, **options) as writer:
        for number in batches:
            writer.append(*batch(number))
        if close:
            writer.close()
    return path


def contents(path):
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def test_earlier_files_found_words_by_their_first_token(tmp_path):
    selection = {"mode": "class", "argument": "colours"}
    with FeaturesWriter(tmp_path, {"selection": selection}) as writer:
        writer.append(*batch(0))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["arguments"]["selection"] == selection
    with pytest.raises(ValueError, match=r'selection\.match: expected "first-token", got "word"'):
        FeaturesWriter(tmp_path, {"selection": selection | {"match": "word"}})
    with FeaturesWriter(tmp_path, {"selection": selection | {"match": "first-token"}}) as writer:
        assert writer.samples_done == 4
        writer.close()
    assert Features.open(tmp_path).manifest["selection"]["match"] == "first-token"


def test_what_is_written_comes_back(tmp_path):
    features = Features.open(write(tmp_path / "features", range(3)))
    batches = [batch(number) for number in range(3)]
    assert features.sites == tuple(SITES)
    assert features.complete
    assert features.manifest == ARGUMENTS | {"seeds": [0, 1]}
    assert features.samples == [sample for b in batches for sample in b[0]]
    for site in SITES:
        np.testing.assert_array_equal(
            features.matrix(site), np.concatenate([b[1][site] for b in batches])
        )
    # a batch has four samples, with one, none, two and one rows
    assert features.sample_rows.tolist() == [0, 2, 2, 3, 4, 6, 6, 7, 8, 10, 10, 11]
    np.testing.assert_array_equal(features.positions, np.concatenate([b[3] for b in batches]))
    np.testing.assert_array_equal(features.tokens, np.concatenate([b[4] for b in batches]))
    assert features.tokens.dtype == features.positions.dtype == np.int32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_states_in_half_precision_are_read_as_float32(tmp_path, dtype):
    features = Features.open(write(tmp_path, range(1), dtype=dtype))
    site = next(iter(SITES))
    expected = batch(0)[1][site].astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert features.matrix(site).dtype == np.float32
    np.testing.assert_array_equal(features.matrix(site), expected.astype(np.float32))


def test_samples_without_rows_may_come_without_states(tmp_path):
    samples = batch(0)[0]
    nothing = np.zeros(0, int)
    with FeaturesWriter(tmp_path, ARGUMENTS) as writer:
        writer.append(samples, {}, nothing, nothing, nothing)
        writer.close()
    features = Features.open(tmp_path)
    assert (features.sites, len(features.samples), len(features.tokens)) == ((), 4, 0)


def test_arrays_name_their_dimensions_and_lie_in_groups(tmp_path):
    """Follows the Zarr v3 specification; xarray needs one length per name, and sites differ."""
    write(tmp_path, range(1))
    names = {}
    for group in ("states", "rows"):
        metadata = json.loads((tmp_path / group / "zarr.json").read_text())
        assert metadata == {"zarr_format": 3, "node_type": "group"}
        for file in (tmp_path / group).glob("*/zarr.json"):
            metadata = json.loads(file.read_text())
            assert metadata["node_type"] == "array"
            assert len(metadata["dimension_names"]) == len(metadata["shape"])
            names[file.parent.name] = metadata["dimension_names"]
    assert names == {
        **{site: ["row", f"width_{D}"] for site, D in SITES.items()},
        **{name: ["row"] for name in ("sample", "position", "token")},
    }


def test_a_site_may_hold_a_slash(tmp_path):
    rows = np.ones((1, 2), np.float32)
    with FeaturesWriter(tmp_path, {}) as writer:
        writer.append([{}], {"a/b": rows}, *np.zeros((3, 1), int))
        writer.close()
    np.testing.assert_array_equal(Features.open(tmp_path).matrix("a/b"), rows)
    assert [path.name for path in (tmp_path / "states").iterdir() if path.is_dir()] == ["a%2Fb"]


@given(
    sizes=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=4),
    stop=st.integers(0, 4),
)
@settings(max_examples=8, deadline=None)
def test_chunks_and_interruptions_leave_no_trace(tmp_path_factory, sizes, stop):
    root = tmp_path_factory.mktemp("runs")
    chunk_bytes, zarr_rows._CHUNK_BYTES = zarr_rows._CHUNK_BYTES, 64  # three rows of width 5
    try:
        for name, stops in (("whole", ()), ("parts", (stop,))):
            for last in (*stops, None):
                with FeaturesWriter(root / name, ARGUMENTS) as writer:
                    for number, rows_of in enumerate(sizes[:last]):
                        if sum(map(len, sizes[:number])) >= writer.samples_done:
                            writer.append(*batch(number, rows_of))
                    if last is None:
                        writer.close()
        assert contents(root / "parts") == contents(root / "whole")
        features = Features.open(root / "whole")
    finally:
        zarr_rows._CHUNK_BYTES = chunk_bytes
    expected = [batch(number, rows_of) for number, rows_of in enumerate(sizes)]
    for site in features.sites:
        rows = np.concatenate([b[1][site] for b in expected])
        np.testing.assert_array_equal(features.matrix(site), rows)


class Killed(BaseException):
    pass


def killed_at(monkeypatch, path, step, commit):
    """Runs five batches and kills the run while it commits batch `commit`, at one of the steps."""
    replace, write_rows = store.write_json, FeaturesWriter._write_rows
    calls = []

    def dying_write_rows(self, *args):
        calls.append(1)
        if len(calls) == commit and step == "before the rows":
            raise Killed
        write_rows(self, *args)
        if len(calls) == commit and step == "after the rows":
            raise Killed

    def dying_replace(target, value):
        if len(calls) == commit and target.name == "manifest.json":
            if step == "in the middle of the lines":
                with open(path / "samples.jsonl", "rb+") as file:
                    os.truncate(file.fileno(), file.seek(0, 2) - 40)
                raise Killed
            if step == "before the manifest":
                (path / "manifest.json.tmp").write_text("{")
                raise Killed
        replace(target, value)

    monkeypatch.setattr(store, "write_json", dying_replace)
    monkeypatch.setattr(FeaturesWriter, "_write_rows", dying_write_rows)
    with pytest.raises(Killed):
        write(path)
    monkeypatch.undo()


@pytest.mark.parametrize("commit", [1, 3])
@pytest.mark.parametrize(
    "step",
    ["before the rows", "after the rows", "in the middle of the lines", "before the manifest"],
)
def test_a_run_killed_at_any_step_ends_with_the_same_bytes(tmp_path, monkeypatch, step, commit):
    killed_at(monkeypatch, tmp_path / "killed", step, commit)
    with FeaturesWriter(tmp_path / "killed", ARGUMENTS) as writer:
        assert writer.samples_done == 4 * (commit - 1)
        assert writer.rows_done == 4 * (commit - 1)
        for number in range(commit - 1, 5):
            writer.append(*batch(number))
        writer.close()
    assert contents(tmp_path / "killed") == contents(write(tmp_path / "whole"))


def test_a_killed_process_leaves_whole_batches_and_no_lock(tmp_path):
    path = tmp_path / "killed"
    script = f"""
        import sys
        sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
        from test_writer import ARGUMENTS, FeaturesWriter, batch
        writer = FeaturesWriter({str(path)!r}, ARGUMENTS)
        for number in range(10_000):
            writer.append(*batch(number))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    manifest = path / "manifest.json"
    try:
        deadline = time.monotonic() + 60
        while not manifest.exists() or json.loads(manifest.read_text())["samples"] < 12:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(
            ValueError, match=rf"in use by another writer \(process {process.pid}\)"
        ):
            FeaturesWriter(path, ARGUMENTS)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()

    with FeaturesWriter(path, ARGUMENTS) as writer:
        done = writer.samples_done // 4
        assert done >= 3 and writer.samples_done % 4 == 0
        writer.append(*batch(done))
        writer.close()
    assert contents(path) == contents(write(tmp_path / "whole", range(done + 1)))


def test_an_unfinished_run_opens_when_allowed(tmp_path):
    write(tmp_path, range(2), close=False)
    with pytest.raises(
        ValueError, match=r"the run is not finished \(8 samples so far\); finish it"
    ):
        Features.open(tmp_path)
    features = Features.open(tmp_path, allow_incomplete=True)
    assert (len(features.samples), len(features.tokens), features.complete) == (8, 8, False)


def test_a_finished_run_accepts_no_more_rows(tmp_path):
    write(tmp_path)
    before = contents(tmp_path)
    with FeaturesWriter(tmp_path, ARGUMENTS) as writer:
        assert writer.complete and writer.samples_done == 20
        with pytest.raises(ValueError, match="the run is closed and takes no more samples"):
            writer.append(*batch(5))
    assert contents(tmp_path) == before


def test_a_run_of_an_earlier_release_is_resumed(tmp_path):
    """Which told neither of a processor nor of the digests of vectors."""
    before = {"model": "tiny", "steering": {"alpha": 1}, "finetuned": {"model": "tuned"}}
    told = {"processor": "other", "processor digest": "12"}
    now = {
        **(before | told),
        "steering": {"alpha": 1, "digests": ["ab"]},
        "finetuned": {"model": "tuned", **told},
    }
    FeaturesWriter(tmp_path / "earlier", before).release()
    FeaturesWriter(tmp_path / "earlier", now).release()
    with pytest.raises(ValueError, match=r"arguments \(steering.alpha: expected 1, got 2\)"):
        FeaturesWriter(tmp_path / "earlier", now | {"steering": {"alpha": 2, "digests": ["ab"]}})
    FeaturesWriter(tmp_path / "now", before | {"processor": None}).release()
    with pytest.raises(ValueError, match=r'\(processor: expected null, got "other"\)'):
        FeaturesWriter(tmp_path / "now", before | told)


def test_other_arguments_are_refused_key_by_key(tmp_path):
    write(tmp_path, close=False)
    other = {"model": "tiny", "tokens": "all", "seeds": (0, 1), "data": {"split": "val"}}
    message = (
        r"started with other arguments \(batch_size: expected 4, got nothing; data.split: expected"
        r' nothing, got "val"; states on disk: expected "float32", got "float16"; tokens: expected'
        r' "index:-1", got "all"\); use the same ones to resume, or another directory'
    )
    with pytest.raises(ValueError, match=message):
        FeaturesWriter(tmp_path, other, dtype="float16")
    FeaturesWriter(tmp_path, ARGUMENTS).close()  # the refused writer gave the lock back


def test_one_writer_at_a_time(tmp_path):
    with (
        FeaturesWriter(tmp_path, ARGUMENTS),
        pytest.raises(ValueError, match=rf"in use by another writer \(process {os.getpid()}\)"),
    ):
        FeaturesWriter(tmp_path, ARGUMENTS)
    FeaturesWriter(tmp_path, ARGUMENTS).close()


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"has 'thesis.tex' but no manifest.json; use an empty"):
        FeaturesWriter(tmp_path, ARGUMENTS)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match=r"cannot write features to .*file/features: Not a directory;"
    ):
        FeaturesWriter(tmp_path / "file" / "features", ARGUMENTS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"cannot write features to .*: Permission denied;"):
        FeaturesWriter(tmp_path, ARGUMENTS)


def test_a_failed_append_may_be_repeated(tmp_path, monkeypatch):
    def full(target, value):
        raise OSError(28, "No space left on device")

    with FeaturesWriter(tmp_path / "retried", ARGUMENTS) as writer:
        writer.append(*batch(0))
        with monkeypatch.context() as patch:
            patch.setattr(store, "write_json", full)
            with pytest.raises(OSError, match=r"cannot write features to .*: No space left"):
                writer.append(*batch(1))
        writer.append(*batch(1))
        writer.close()
    assert contents(tmp_path / "retried") == contents(write(tmp_path / "whole", range(2)))


def test_rows_that_cannot_be_written(tmp_path):
    with FeaturesWriter(tmp_path, ARGUMENTS) as writer:
        writer.append(*batch(0))
        zarr = tmp_path / "rows" / "token" / "c" / "0"
        zarr.unlink()
        zarr.mkdir()
        with pytest.raises(OSError, match="cannot write features to "):
            writer.append(*batch(1))
        assert writer.samples_done == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b | {"positions": b["positions"][1:]}, "positions has 3 rows, expected 4"),
        (lambda b: b | {"states": {"x": np.ones((4, 2))}}, "expected states of .*norm; got x"),
        (lambda b: b | {"states": {}}, "4 rows but no states; expected one array per site"),
        (
            lambda b: b | {"states": {site: x[:, :2] for site, x in b["states"].items()}},
            "layers.1: width 2, expected 5",
        ),
        (lambda b: b | {"sample_index": b["sample_index"] + 1}, r"sample_index must be in 0\.\.3"),
        (lambda b: b | {"samples": [{"id": {1, 2}}] * 4}, "must hold JSON values only"),
    ],
)
def test_a_batch_that_does_not_fit(tmp_path, change, message):
    names = ("samples", "states", "sample_index", "positions", "tokens")
    with FeaturesWriter(tmp_path, ARGUMENTS) as writer:
        writer.append(*batch(0))
        with pytest.raises(ValueError, match=message):
            writer.append(**change(dict(zip(names, batch(1), strict=True))))
        assert writer.samples_done == 4


def test_features_are_read_from_another_working_directory(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    features = Features.open(write(Path("run")))
    (site, _), rows = SITES, np.array([3, 1])
    stored, whole = features.stored(site), features.matrix(site)
    monkeypatch.chdir("elsewhere")
    np.testing.assert_array_equal(stored.take(rows), whole[rows])
    np.testing.assert_array_equal(features.matrix(site), whole)
    assert features.samples[0]["id"] == "0-0"


def test_writing_goes_on_after_the_working_directory_changed(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with FeaturesWriter("run", ARGUMENTS) as writer:
        writer.append(*batch(0))
        monkeypatch.chdir("elsewhere")
        writer.append(*batch(1))
        writer.close()
    assert writer.path == tmp_path / "run"
    assert not any((tmp_path / "elsewhere").iterdir())
    assert not (tmp_path / "run" / ".lock").exists()
    assert Features.open(tmp_path / "run").complete


def test_opening_a_missing_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no manifest.json; expected a directory of feat"):
        Features.open(tmp_path)


def test_an_unknown_site_and_dtype(tmp_path):
    features = Features.open(write(tmp_path / "features"))
    with pytest.raises(ValueError, match=r"no site 'norm'; expected one of language_model.model.l"):
        features.matrix("norm")
    with pytest.raises(ValueError, match="one of float32, float16, bfloat16; got dtype 'int8'"):
        FeaturesWriter(tmp_path / "other", ARGUMENTS, dtype="int8")


def edit_manifest(**values):
    def apply(path):
        file = path / "manifest.json"
        state = json.loads(file.read_text()) | values
        file.write_text(json.dumps({k: v for k, v in state.items() if v is not None}))

    return apply


CHUNK = "states/language_model.model.norm/c/0/0"


def widen(path):
    file = path / "states/language_model.model.norm/zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shape": [20, 2**31]}))


def spoil_line(file, number):
    lines = file.read_bytes().splitlines(keepends=True)
    lines[number - 1] = b"?" * (len(lines[number - 1]) - 1) + b"\n"
    file.write_bytes(b"".join(lines))


@pytest.mark.wrong_types  # the check of a sequence reads a sample, before the message
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json: not JSON"),
        (lambda p: (p / "manifest.json").write_text("[" * 200_000), "manifest.json: not JSON"),
        (lambda p: (p / "rows/token/zarr.json").write_text("[" * 200_000), "token: not a readable"),
        (edit_manifest(rows="4"), "'rows' has an invalid value"),
        (edit_manifest(sites=["\ud800"]), "'sites' has an invalid value"),
        (edit_manifest(sites=5), "'sites' has an invalid value"),
        (widen, r"norm: shape \[20, 2147483648\] in chunks of .* expected chunks of whole rows"),
        (edit_manifest(format="other"), "format 'other', expected 'xlvlm-features'"),
        (edit_manifest(version=9), "format version 9, expected 1"),
        (edit_manifest(bytes=None), "key 'bytes' is missing"),
        (edit_manifest(rows=10**6), "20 rows, expected 1000000"),
        (edit_manifest(samples=21), "samples.jsonl: 20 samples, expected 21"),
        (lambda p: os.truncate(p / CHUNK, 100), "norm/c/0/0: chunk is 100 bytes, expected "),
        (lambda p: (p / CHUNK).unlink(), "norm/c/0/0: chunk is missing; extract the features"),
        (lambda p: (p / "rows/token/c/0").unlink(), "token/c/0: chunk is missing"),
        (lambda p: (p / "rows/token/zarr.json").unlink(), "token: not a readable Zarr v3 array"),
        (lambda p: (p / "samples.jsonl").unlink(), "samples.jsonl: 0 bytes, expected "),
        (
            lambda p: spoil_line(p / "samples.jsonl", 2),
            "samples.jsonl: line 2 is not a JSON object",
        ),
    ],
)
def test_damage_is_one_clear_line(tmp_path, harm, message):
    harm(write(tmp_path / "features"))
    with pytest.raises(ValueError, match=message) as caught:
        list(Features.open(tmp_path / "features").samples)
    assert "\n" not in str(caught.value)


def test_the_mean_row_is_summed_by_tiles(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_TILE", 2)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        with FeaturesWriter(tmp_path / np.dtype(dtype).name, {}) as writer:
            rows = (1000 + np.arange(15).reshape(5, 3)).astype(dtype)
            index = np.arange(5)
            writer.append([{"id": str(i)} for i in index], {"s": rows}, index, index, index)
            writer.close()
        features = Features.open(tmp_path / np.dtype(dtype).name)
        expected = rows.astype(np.float64).mean(axis=0).astype(np.float32)
        np.testing.assert_array_equal(features.mean("s"), expected)
        with pytest.raises(ValueError, match="no site 't'; expected one of s"):
            features.mean("t")


def test_what_fields_cannot_hold_is_refused(tmp_path):
    samples, states, index, positions, tokens = batch(0)
    site = next(iter(states))
    counts = np.full(states[site].shape, 2**24 + 1)
    for changed, message in (
        ((samples, states, index, positions + 2**40, tokens), r"positions are from .* \(int32\)"),
        ((samples, states, index, positions, tokens - 2**40), r"tokens are from .* \(int32\)"),
        (
            (samples, states | {site: counts}, index, positions, tokens),
            "are int64; expected floats",
        ),
        (([{"id": "x", "score": {1, 2}}] * 4, states, index, positions, tokens), "sample 'x'"),
    ):
        with FeaturesWriter(tmp_path, ARGUMENTS) as writer:
            with pytest.raises(ValueError, match=message):
                writer.append(*changed)
            assert writer.rows_done == 0
    write(tmp_path)
    assert len(Features.open(tmp_path).tokens) == 20


def test_numbers_that_json_lacks_are_null(tmp_path):
    """Earlier releases wrote NaN, which samples of their features still hold."""
    _, *rest = batch(0)
    odd = {"id": "x", "score": float("nan"), "box": [1.5, float("-inf")], "text": "NaN, Infinity"}
    with FeaturesWriter(tmp_path, ARGUMENTS) as writer:
        writer.append([odd] * 4, *rest)
        writer.close()
    assert "NaN}" not in (tmp_path / "samples.jsonl").read_text()
    kept = {"id": "x", "score": None, "box": [1.5, None], "text": "NaN, Infinity"}
    assert Features.open(tmp_path).samples[0] == kept


def test_sites_may_come_in_any_order(tmp_path):
    with FeaturesWriter(tmp_path, ARGUMENTS) as writer:
        writer.append(*batch(0))
        samples, states, *rest = batch(1)
        writer.append(samples, dict(reversed(states.items())), *rest)
        writer.close()
    features = Features.open(tmp_path)
    assert features.sites == tuple(SITES)
    for site in SITES:
        np.testing.assert_array_equal(features.matrix(site)[4:], states[site])


def test_a_removed_run_leaves_the_files_of_others(tmp_path):
    for name in ("own", "shared"):
        with FeaturesWriter(tmp_path / name, ARGUMENTS) as writer:
            writer.append(*batch(0))
            if name == "shared":
                (tmp_path / name / "notes.txt").touch()
            writer.remove()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [
        "shared",
        "shared/notes.txt",
    ]


def test_features_are_compared_by_identity(tmp_path):
    features = Features.open(write(tmp_path, range(1)))
    assert features == features and features != Features.open(tmp_path)
