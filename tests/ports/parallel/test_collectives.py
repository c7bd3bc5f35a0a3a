"""What each compiled program of a model sends between eight devices, against a stated list."""

import json
import os
import subprocess
import sys

import pytest

PROGRAMS = r"""
import json, re
import jax, jax.numpy as jnp
import ports
from PIL import Image
from ports import paired
from xlvlm_jax.finetune import FinetuneSettings, training

vlm = ports.load("embedded", mesh=ports.make_mesh(4, 2))
prompt = vlm.render("What is in the picture?")
inputs = vlm.process([prompt] * 8, [Image.new("RGB", (64, 64))] * 8)
arrays, site = vlm.place(inputs), "language_model.model.layers.0"
leaves, tree = jax.tree.flatten(vlm.params)
places = (tuple(range(len(leaves))),) * 2
settings = FinetuneSettings(steps=1, targets=("layers.0.self_attn.q_proj",))
trainer = training.Trainer(vlm, settings, 1)
batch = trainer.begin(), trainer._frozen, arrays, jnp.full(8, 4), True
full = training.Trainer(vlm, FinetuneSettings(method="full", steps=1, accumulate=2), 1)
state = full.begin()
where = tuple(leaf.sharding for leaf in jax.tree.leaves(state))
lowered = {
    "states": vlm.lower(inputs, sites=[site]),
    "generation": vlm.lower(inputs, sites=[site], max_new_tokens=3),
    "pair": paired.states_of_pair.lower(
        vlm.module, leaves, arrays, tree, places, (site,), mesh=vlm.mesh
    ),
    "training": training.train_step.lower(
        vlm.module, settings, 1, 4, *batch, mesh=vlm.mesh
    ),
    "full training": training.train_step.lower(
        vlm.module, full.settings, 1, 4, state, None, *batch[2:], where, mesh=vlm.mesh
    ),
}
found = {}
for name, program in lowered.items():
    found[name] = []
    for line in program.compile().as_text().splitlines():
        kinds = r"all-\w+|reduce-scatter|collective-permute"
        sent = re.search(rf"= (.+?) ({kinds})(-start)?\(", line)
        # Pictures that are not evenly divided among the rows cross the devices. Accumulated
        # gradients have branches too.
        if sent and ("branch_0_fun" not in line or "train_step)/cond/branch_0_fun" in line):
            found[name].append((sent[2], re.sub(r"\{.*?\}", "", sent[1])))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def sent():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_states_and_pairs_are_added_up_and_nothing_else(sent):
    for name in ("states", "pair"):
        assert {kind for kind, _ in sent[name]} == {"all-reduce"}
    # For the second model, only what depends on its parameters.
    assert len(sent["states"]) < len(sent["pair"]) <= 2 * len(sent["states"])


@pytest.mark.slow
def test_generation_gathers_the_largest_logits_alone(sent):
    gathered = [shape for kind, shape in sent["generation"] if kind != "all-reduce"]
    # Two rows per device: the largest logit of each half of the vocabulary and its index, at the
    # end of the prompt and in each step.
    assert sorted(gathered) == ["f32[2,2]", "f32[2,2]", "s32[2,2]", "s32[2,2]"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["training", "full training"])
def test_training_sends_no_activations_of_other_rows(sent, name):
    """Nor does it gather parameters, moments or sums of gradients."""
    gathered = [shape for kind, shape in sent[name] if kind != "all-reduce"]
    assert not gathered
