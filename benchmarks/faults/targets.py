"""Targets of the fuzzing: valid files of every format, and their readers."""

import hashlib
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ports
from benchmarks.faults.mutate import MARKUP
from ports.checkpoint import orbax_io, safetensors_io
from xlvlm_jax import Concepts, Features, SteeringVector, data, steering
from xlvlm_jax.data import scenes
from xlvlm_jax.demo import embedded
from xlvlm_jax.features.pth import import_features, read_pth, write_pth
from xlvlm_jax.features.writer import FeaturesWriter
from xlvlm_jax.report import write_report
from xlvlm_jax.steering import L2S, LowRankMap

SITE = "language_model.model.norm"
ROWS, WIDTH, K = 12, 6, 2


class Target(NamedTuple):
    """A format.

    `make` writes a valid directory, `read` reads all of it, and `fit` renews what depends on other
    files (digests), so that damage comes further than to them. Of the time each has a `share`.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    fit: Callable[[Path], None] = lambda root: None
    share: float = 1.0


def _features(root: Path) -> None:
    rng = np.random.default_rng(0)
    samples = [{"id": str(i), "image": "none.jpg", "prediction": MARKUP} for i in range(ROWS)]
    rows = np.arange(ROWS)
    with FeaturesWriter(root / "features", {"model": "m", "fingerprint": "f"}) as writer:
        states = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
        writer.append(samples, {SITE: states}, rows, rows, rows)
        writer.close()


def _read_features(root: Path) -> None:
    features = Features.open(root / "features")
    for site in features.sites:
        features.matrix(site)


def _concepts(root: Path) -> None:
    Concepts(
        np.ones((K, WIDTH), np.float32),
        np.ones((ROWS, K), np.float32),
        "kmeans",
        {},
        1.0,
        3,
        True,
        history=np.ones(4, np.float32),
        words=[[MARKUP, "dog"]] * K,
        images=[["none.jpg"]] * K,
        source={"site": SITE, "features": "features", "rows": ROWS},
    ).save(root / "concepts")


def _fit_concepts(root: Path) -> None:
    tensors, file = root / "concepts" / "concepts.safetensors", root / "concepts" / "concepts.json"
    described = json.loads(file.read_bytes())
    described["tensors_sha256"] = hashlib.sha256(tensors.read_bytes()).hexdigest()
    file.write_text(json.dumps(described))


def _report(root: Path) -> None:
    _features(root)
    _concepts(root)
    fit = {"mean": 0.5, "std": 0.1, "random": 0.4, "random_std": 0.1, "num_samples": ROWS}
    dictionary = {"name": MARKUP, "method": "kmeans", "num_concepts": K, "clip": {"1": fit}}
    dictionary |= {"overlap": 0.1, "attributes": {"mood": {"concepts": 0.3, "random": 0.1}}}
    attributes = {SITE: {"train": {MARKUP: {"concepts": 0.6, "random": 0.1}}}}
    scores = {"attributes": attributes, "dictionaries": [dictionary], "scored on": {"rows": ROWS}}
    (root / "scores.json").write_text(json.dumps(scores))
    run = {"model": MARKUP, "data": "scenes", "versions": {"jax": "1"}, "seconds": {"all": 1.5}}
    (root / "run.json").write_text(json.dumps(run))
    _steering_run(root / "steering" / "answers")
    write_report(root)
    (root / "report.html").unlink()


def _steering_run(directory: Path) -> None:
    """Makes an evaluation with steering, as the report reads it."""
    scores = {"all": {"official": 0.5}}
    changes = {name: 2 for name in ("source_after", "source_before", "target_after")}
    changes |= {"target_before": 1, "moved_share": 0.5, "others_changed_share": 0.1}
    plain = {"scores": scores, "changes": changes}
    steered = {**plain, "edit": "add", "sites": [SITE], "alpha": 1.0, "where": "all"}
    summary = {"kind": "vqa", "source": ["yes"], "target": ["no"], "samples": 2}
    summary |= {"conditions": {"plain": plain, "steered": steered}}
    sample = {"id": "1", "image": "none.jpg", "question": MARKUP, "answer": "yes"}
    sample |= {"references": ["yes"], "predictions": {"plain": "yes", "steered": "no"}}
    directory.mkdir(parents=True)
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "predictions.jsonl").write_text(f"{json.dumps(sample)}\n" * 2)


def _read_report(root: Path) -> None:
    page = write_report(root).read_text("utf-8")
    if MARKUP in page:
        raise AssertionError("markup of a caption is markup in the report")


def _vectors(root: Path) -> None:
    source = {"source": ["yes"], "target": ["no"], "model": "m", "fingerprint": "f"}
    SteeringVector(np.ones(WIDTH, np.float32), SITE, source).save(root / "vector.safetensors")


def _low_rank(root: Path) -> None:
    factors = np.ones((2, WIDTH), np.float32), np.ones((WIDTH, 2), np.float32)
    LowRankMap(*factors, SITE, {"model": "m"}).save(root / "vector.safetensors")


def _l2s(root: Path) -> None:
    layers = {"hidden": (WIDTH, 3), "shift": (3, WIDTH)}
    params = {
        name: {"kernel": np.ones(shape, np.float32), "bias": np.ones(shape[1], np.float32)}
        for name, shape in layers.items()
    }
    ones = np.ones(WIDTH, np.float32)
    L2S(params, ones, ones, 1.0, SITE, SITE, {"model": "m"}).save(root / "vector.safetensors")


def _checkpoint(root: Path) -> None:
    tensors = {f"layers.{i}.weight": np.ones((3, i + 1), np.float32) for i in range(4)}
    safetensors_io.write_file(root / "one.safetensors", tensors)
    index = {"weight_map": dict.fromkeys(tensors, "one.safetensors")}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))


def _read_checkpoint(root: Path) -> None:
    for tensor in safetensors_io.open_directory(root).values():
        tensor.read()


PARAMS = {"layer": {"kernel": np.ones((4, 3), np.float32), "bias": np.zeros(3, np.float32)}}


def _orbax(root: Path) -> None:
    orbax_io.save(jax.tree.map(jnp.asarray, PARAMS), root, "f")


def _read_orbax(root: Path) -> None:
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS))
    orbax_io.restore(root, abstract, jnp.dtype("float32"), None)


@cache
def _model() -> ports.VLM:
    return ports.load_abstract(embedded.LLAVA)


def _adapter(root: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(embedded.ADAPTERS["color"] / name, root)


def _read_adapter(root: Path) -> None:
    _model().read_adapter(root)


def _config(root: Path) -> None:
    for file in embedded.LLAVA.glob("*.json"):
        shutil.copy(file, root)


def _read_config(root: Path) -> None:
    ports.load_abstract(root)


def _pth(root: Path) -> None:
    value = {
        "hidden_states": [{SITE: np.ones((1, 2, WIDTH), np.float32)} for _ in range(3)],
        "image": ["a.jpg", "b.jpg", "c.jpg"],
        "model_predictions": [MARKUP] * 3,
    }
    write_pth(root / "states.pth", value)


def _legacy(root: Path) -> None:
    """Writes the same value in torch's older format, which has no checksums."""
    _pth(root)
    with zipfile.ZipFile(root / "states.pth") as archive:
        content = archive.read("archive/data.pkl")
        names = sorted(name for name in archive.namelist() if "/data/" in name)
        storages = [archive.read(name) for name in names]
    head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    parts = [pickle.dumps(value, 2) for value in head]
    parts += [content, pickle.dumps([name.rsplit("/", 1)[1] for name in names], 2)]
    parts += [struct.pack("<q", len(storage) // 4) + storage for storage in storages]
    (root / "states.pth").write_bytes(b"".join(parts))
    read_pth(root / "states.pth")


def _import(root: Path) -> None:
    shutil.rmtree(root / "imported", ignore_errors=True)
    import_features(root / "states.pth", root / "imported")


def _scenes(root: Path) -> None:
    """Writes annotations, without the pictures."""
    scenes.write(root, train=2, seed=0)
    for picture in root.rglob("*.jpg"):
        picture.unlink()


def _read_annotations(kind: str) -> Callable[[Path], None]:
    def read(root: Path) -> None:
        for sample in data.load(kind, root, "train" if kind != "folder" else None):
            json.dumps(sample.to_dict())

    return read


def _folder(root: Path) -> None:
    for name in ("a.png", "b.png"):
        (root / name).touch()
    (root / "captions.json").write_text(json.dumps({"a.png": ["a dog", "é"], "b.png": MARKUP}))


def _folder_of_csv(root: Path) -> None:
    for name in ("a.png", "b.png"):
        (root / name).touch()
    (root / "captions.csv").write_text('file,caption\na.png,"a dog, red"\nb.png,a café\n')


def _load_vector(root: Path) -> None:
    steering.load(root / "vector.safetensors")


TARGETS = {
    "features": Target(_features, _read_features),
    "concepts": Target(_concepts, lambda root: Concepts.load(root / "concepts"), _fit_concepts),
    "report": Target(_report, _read_report, _fit_concepts, 2.0),
    "steering vector": Target(_vectors, _load_vector),
    "low-rank map": Target(_low_rank, _load_vector, share=0.5),
    "l2s": Target(_l2s, _load_vector, share=0.5),
    "safetensors": Target(_checkpoint, _read_checkpoint),
    "orbax": Target(_orbax, _read_orbax),
    "adapter": Target(_adapter, _read_adapter),
    "config.json": Target(_config, _read_config),
    "pth": Target(_pth, lambda root: read_pth(root / "states.pth")),
    "pth, older": Target(_legacy, lambda root: read_pth(root / "states.pth")),
    "pth import": Target(_pth, _import),
    "coco": Target(_scenes, _read_annotations("coco")),
    "vqav2": Target(_scenes, _read_annotations("vqav2")),
    "folder": Target(_folder, _read_annotations("folder"), share=0.5),
    "folder, CSV": Target(_folder_of_csv, _read_annotations("folder"), share=0.5),
}
