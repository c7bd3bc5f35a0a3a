"""Repositories of the hub, from a cache in the layout of huggingface_hub; no downloads."""

import importlib.metadata
import shutil
import tomllib

import huggingface_hub
import jax
import numpy as np
import pytest

import ports
from ports.checkpoint import hub
from ports.models import bert, clip
from xlvlm_jax.demo import embedded

from .. import bert_helpers, helpers
from ..helpers import ROOT

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """publish(id, directory) adds the directory's files to the hub's cache as a repository."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(repository, directory):
        place = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(COMMIT)
        return shutil.copytree(directory, place / "snapshots" / COMMIT)

    return add


def test_a_repository_is_found_by_its_id(publish):
    snapshot = publish("some/model", embedded.LLAVA)
    assert hub.find_directory("some/model") == snapshot
    assert hub.find_directory(embedded.LLAVA) == embedded.LLAVA
    assert hub.name_of(snapshot) == "some/model"
    assert hub.name_of(embedded.LLAVA) == "llava"


def test_the_embedded_model_has_a_name(tmp_path, monkeypatch):
    """It takes precedence over a directory of that name, which "./" selects."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded").mkdir()
    assert hub.find_directory("embedded") == embedded.LLAVA
    assert hub.find_directory("./embedded").samefile(tmp_path / "embedded")
    assert ports.load_abstract("embedded").config == ports.load_abstract(embedded.LLAVA).config


def test_a_relative_path_holds_after_the_working_directory_changed(tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(embedded.LLAVA)
    monkeypatch.chdir(tmp_path)
    vlm = ports.load_abstract("model")
    monkeypatch.chdir("/")
    assert vlm.fingerprint == ports.load_abstract("embedded").fingerprint
    assert vlm.tokenizer is not None


def test_an_installed_package_names_a_directory(monkeypatch):
    monkeypatch.setattr(hub, "_NAMED", {})
    entry = importlib.metadata.EntryPoint(
        "bundled", "xlvlm_jax.demo.embedded:LLAVA", "ports.directories"
    )
    found = {("ports.directories", "bundled"): [entry]}
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group, name: found.get((group, name), [])
    )
    assert hub.find_directory("bundled") == embedded.LLAVA
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        hub.find_directory("other")


def test_the_project_names_the_embedded_model():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (entry,) = project["entry-points"]["ports.directories"].items()
    assert entry == ("embedded", "xlvlm_jax.demo.embedded:LLAVA")


def test_weights_in_other_formats_are_not_downloaded(monkeypatch, tmp_path):
    given = {}

    def download(repository, ignore_patterns):
        given["files"] = huggingface_hub.utils.filter_repo_objects(
            ["params.json", "model.safetensors", "consolidated.safetensors", "pytorch_model.bin"],
            ignore_patterns=ignore_patterns,
        )
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.find_directory("some/model") == tmp_path
    assert list(given["files"]) == ["params.json", "model.safetensors"]


def test_a_repository_without_an_owner(publish):
    snapshot = publish("roberta-large", embedded.CLIP)
    assert hub.find_directory("roberta-large") == snapshot
    assert hub.name_of(snapshot) == "roberta-large"


def test_neither_a_directory_nor_a_repository(publish):
    with helpers.raises_line(FileNotFoundError, "'some/model' is not a local directory and could"):
        hub.find_directory("some/model")
    with helpers.raises_line(FileNotFoundError, "no directory './model'; expected one with x, or"):
        hub.find_directory("./model", "x")


def test_models_and_adapters_by_their_ids(publish):
    publish("some/model", embedded.LLAVA)
    adapter = publish("some/adapter", embedded.ADAPTERS["color"])
    vlm = ports.load("some/model", adapter="some/adapter")
    expected = ports.load(embedded.LLAVA, adapter=embedded.ADAPTERS["color"])
    assert vlm.adapter == adapter
    jax.tree.map(np.testing.assert_array_equal, vlm.params, expected.params)
    factors = vlm.read_adapter("some/adapter").factors
    assert set(factors) == set(expected.read_adapter(embedded.ADAPTERS["color"]).factors)


def test_without_weights_a_repository_is_described(publish):
    snapshot = publish("some/model", embedded.LLAVA)
    (snapshot / "model.safetensors").unlink()
    assert ports.load_abstract("some/model").sites
    with helpers.raises_line(FileNotFoundError, "has no model.safetensors"):
        ports.load("some/model")


def test_judges_by_their_ids(publish, tmp_path):
    publish("some/clip", embedded.CLIP)
    assert clip.load_dual_encoder("some/clip").processor.tokenizer
    bert_helpers.make_bert(tmp_path / "bert", "bert")
    publish("some/bert", tmp_path / "bert")
    ids = bert.load_text_encoder("some/bert").tokenizer("a")["input_ids"]
    assert ids == bert.load_text_encoder(tmp_path / "bert").tokenizer("a")["input_ids"]


@pytest.mark.wrong_types
@pytest.mark.parametrize("given", [3, None, ["some/model"], b"some/model"])
def test_invalid_paths_are_refused(given):
    message = f"got {given!r}; expected a directory with config.json and safetensors, or"
    for load in (ports.load, ports.load_abstract, clip.load_dual_encoder, bert.load_text_encoder):
        with helpers.raises_line(ValueError, message):
            load(given)
