"""The table over methods and numbers of concepts, with the embedded model's head."""

import json
from pathlib import Path

import pytest

from ports.checkpoint.params import fingerprint
from xlvlm_jax.concepts.scores.comparison import compare, names_of, score_run, write_scores
from xlvlm_jax.concepts.scores.records import DictionaryScores
from xlvlm_jax.concepts.scores.scorer import Scorer
from xlvlm_jax.demo import embedded
from xlvlm_jax.storage.names import distinct_ends

METHODS = ("pca", "simple", "random")


@pytest.fixture(scope="module")
def run(features, vlm, clip, tmp_path_factory):
    """Returns a run directory with scores."""
    root = tmp_path_factory.mktemp("scored")
    (root / "features").symlink_to(features.path)
    (root / "test-features").symlink_to(features.path)
    (root / "scores.json").write_text(json.dumps({"attributes": {"a": 1}}))
    seen = []
    made = score_run(
        root,
        vlm,
        clip,
        methods=METHODS,
        num_concepts=(3, 6),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(n, 6) for n in range(1, 7)]
    return root, made


def test_a_row_per_method_and_number(run):
    _, made = run
    names = [row.name for row in made.scores]
    assert names == ["pca-3", "simple-3", "random-3", "pca-6", "simple-6", "random-6"]
    pca, simple, random = made.scores[:3]
    assert pca.explained_variance > simple.explained_variance
    assert pca.stability == pytest.approx(1, abs=1e-3)  # no seed changes it
    assert all(len(words) for words in pca.words)
    assert random.clip[1].mean == pytest.approx(pca.clip[1].random)
    assert made.scores[3].explained_variance > pca.explained_variance


def test_the_scores_join_those_of_the_run(run):
    root, made = run
    held = json.loads((root / "scores.json").read_text())
    assert made.path == root / "scores.json" and held["attributes"] == {"a": 1}
    assert held["version"] == 1
    assert [DictionaryScores.from_dict(row).name for row in held["dictionaries"]] == [
        row.name for row in made.scores
    ]
    assert held["scored on"]["rows"] == 40


def test_a_table_without_clip(features, vlm):
    (row,) = compare(
        features, vlm, Scorer(features), methods=["simple"], num_concepts=[3], num_seeds=1
    )
    assert row.clip == {} and row.stability is None and row.hoyer is not None


def test_messages(features, write_features, vlm, clip, tmp_path):
    bare = Scorer(features)

    def run(train=features, scorer=bare, **options):
        compare(train, vlm, scorer, **{"num_concepts": [3], **options})

    with pytest.raises(ValueError, match="'random' replaces the words of another method's conc"):
        run(methods=["random"])
    with pytest.raises(
        ValueError, match="random words are scored by CLIP or BERT; provide one, or"
    ):
        run(methods=["pca", "random"])
    with pytest.raises(ValueError, match="unknown method 'nmf'; expected some of snmf, kmeans"):
        run(methods=["nmf"])
    with pytest.raises(ValueError, match="the number of seeds must be at least 1, got 0"):
        run(methods=["pca"], num_seeds=0)
    with pytest.raises(ValueError, match="num_concepts=41 is larger than the 40 rows of Z"):
        run(methods=["simple"], num_concepts=[3, 41])
    with pytest.raises(ValueError, match=r"has the sites layers.2; choose one of them with --site"):
        run(train=write_features(site="layers.2"), methods=["pca"])
    other = write_features(fingerprint="abc")
    with pytest.raises(ValueError, match=r"states of 'm' \(abc\); .*llava is another model \("):
        run(train=other, scorer=Scorer(other), methods=["pca"])
    own = write_features(fingerprint=fingerprint(embedded.LLAVA))
    with pytest.raises(ValueError, match=r"concepts are from model 'm' \(.*\), but .* \(abc\)"):
        run(train=own, scorer=Scorer(other), methods=["pca"])


def test_dictionaries_have_names_of_their_own(tmp_path):
    paths = [Path(name) for name in ("a/concepts", "b/concepts", "b/other", "c/b/concepts")]
    assert names_of(paths[:3]) == ["a/concepts", "b/concepts", "other"]
    assert names_of(paths)[1::2] == [f"{Path.cwd().name}/b/concepts", "c/b/concepts"]
    assert names_of(paths[:1]) == ["concepts"]
    nested = [Path("/runs/a"), Path("/x/runs/a")]
    assert names_of(nested) == distinct_ends(nested) == ["/runs/a", "x/runs/a"]
    assert distinct_ends([*paths[:3], paths[0]])[2:] == ["other", "a/concepts"]
    with pytest.raises(ValueError, match="a/concepts is given twice"):
        names_of([*paths, Path("./a/concepts")])
    row = DictionaryScores("x", "snmf", 3)
    with pytest.raises(ValueError, match="several dictionaries are named 'x'"):
        write_scores(tmp_path, {}, [row, row])
    assert not list(tmp_path.iterdir())


def test_a_damaged_scores_file_is_kept(tmp_path):
    file = tmp_path / "scores.json"
    for text, message in (
        ("{", r"scores.json: line 1, column 2: not JSON \("),
        ("[]", "expected a JSON object"),
        ('{"version": 2}', r"scores.json: format version 2, expected 1; read it with the release"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            write_scores(tmp_path, {}, [])
        assert file.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_missing_features(tmp_path, vlm, clip):
    with pytest.raises(FileNotFoundError, match=r"features: no manifest\.json"):
        score_run(tmp_path, vlm, clip)
    assert not list(tmp_path.iterdir())
