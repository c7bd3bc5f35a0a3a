"""Writes the files of this folder with the release that they represent.

    git worktree add --detach ../earlier 557b969
    cd ../earlier && PYTHONPATH=. python THIS/make.py /data/earlier
    tar czf run.tar.gz -C /data/earlier .

The named folder must not exist yet. `expected.npz` and `expected.json` contain what that release's
own readers returned. Vectors of the kinds "low-rank map" and "l2s" have made-up values. The files
are archived because most of each Zarr chunk of 1 MB is zeros.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from xlvlm_jax.extract import Settings, extract
from xlvlm_jax.selection import Selection
from xlvlm_jax.store import Features

import ports
from xlvlm_jax import SteeringVector, data, embedded, stages, steering
from xlvlm_jax.concepts import Concepts
from xlvlm_jax.data import scenes
from xlvlm_jax.shift import shift_features
from xlvlm_jax.steering.l2s import L2S
from xlvlm_jax.steering.learned import LowRankMap

jax.config.update("jax_default_matmul_precision", "highest")
SITE, SAMPLES = "language_model.model.norm", 12

root = Path(sys.argv[1])
pictures = root.parent / "scenes"
root.mkdir(parents=True)
scenes.write(pictures, train=SAMPLES, test=1, seed=0)
vlm = ports.load(embedded.LLAVA)
tuned = vlm.with_adapter(embedded.ADAPTERS["color"])
settings = Settings(
    sites=(SITE,), selection=Selection("index", "-1"), max_new_tokens=4, batch_size=4
)
extract(vlm, data.load("coco", pictures, "train"), root / "features", settings, finetuned=tuned)
features = Features.open(root / "features")
stages.decompose_features(features, root / "concepts", 3, "kmeans", site=SITE)
concepts = stages.ground_concepts(root / "concepts", vlm, features, num_images=2)
shift = shift_features(
    features, None, concepts, vlm, root / "shift", finetuned_vlm=tuned, num_words=3, num_images=2
)
Z = features.matrix(SITE)
source = {"method": "coarse", "model": "llava", "fingerprint": features.manifest["fingerprint"]}
vector = SteeringVector(Z[0] - Z[1], SITE, source, "generated")
vector.save(root / "vector.safetensors")
random = np.random.default_rng(0)
down, up = (random.normal(size=shape).astype("f4") for shape in ((2, 192), (192, 2)))
LowRankMap(down, up, SITE, {"method": "learned"}).save(root / "map.safetensors")
params = {
    "hidden": {"kernel": Z[:4].T, "bias": np.ones(4, "f4")},
    "shift": {"kernel": Z[4:8], "bias": Z[8]},
}
network = L2S(params, Z.mean(0), Z.std(0) + 1, 2.0, SITE, SITE, {"method": "l2s"}, "all")
network.save(root / "network.safetensors")

concepts, features = Concepts.load(root / "concepts"), Features.open(root / "features")
read = {name: steering.load(root / f"{name}.safetensors") for name in ("vector", "map", "network")}
np.savez_compressed(
    root / "expected.npz",
    states=features.matrix(SITE),
    finetuned=features.matrix(f"finetuned:{SITE}"),
    sample_rows=features.sample_rows,
    positions=features.positions,
    tokens=features.tokens,
    components=concepts.components,
    activations=concepts.activations,
    shifts=shift.shifts,
    recovery=shift.recovery,
    consistency=shift.spread.consistency,
    matching=shift.matching,
    counts=shift.counts,
    vector=read["vector"].vector,
    down=read["map"].down,
    up=read["map"].up,
    network=read["network"].shift(Z[:2]),
)
expected = {
    "sites": features.sites,
    "predictions": [sample["prediction"] for sample in features.samples],
    "images": [Path(sample["image"]).name for sample in features.samples],
    "words": concepts.words,
    "pictures": [[Path(path).name for path in paths] for paths in concepts.images],
    "objective": concepts.objective,
    "shift words": shift.words,
    "source": vector.source,
    "where": read["vector"].where,
}
(root / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
