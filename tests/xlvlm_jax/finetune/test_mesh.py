"""Training on eight devices: resumed elsewhere, accumulated gradients, programs, memory."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from ...ports import helpers
from .conftest import make_sample

DATA = Path(__file__).parents[2] / "data" / "molmo"

RUNS = """
    import dataclasses, shutil, sys, warnings, ports
    from pathlib import Path
    from xlvlm_jax.data import Sample
    from xlvlm_jax.finetune import FinetuneSettings, finetune
    from xlvlm_jax.finetune.training import train_step

    warnings.filterwarnings("error", message="Some donated buffers")
    base, output, *images = sys.argv[1:]
    samples = [Sample(str(i), Path(f), str(i), "what is this", ("w1 w2 w3", "w4"))
               for i, f in enumerate(images)]
    settings = FinetuneSettings(rank=2, steps=4, batch_size=8, rate=1e-3, warmup=0.0)

    class Killed(Exception):
        pass

    def train(name, mesh, stop=None, **options):
        steps = []

        def progress(step, *_):
            steps.append(step)
            if step == stop:
                raise Killed

        vlm = ports.load(base, mesh=mesh)
        changed = dataclasses.replace(settings, **options)
        try:
            finetune(vlm, samples, f"{output}/{name}", changed, save_every=2, log_every=1,
                     progress=progress)
        except Killed:
            pass
        print(name, steps[0], train_step._cache_size())
        train_step.clear_cache()

    mesh = ports.make_mesh(4, 2)
    train("whole", mesh)
    train("killed", mesh, stop=3)
    for name, where in (("same", mesh), ("other", ports.make_mesh(8, 1)), ("one", None)):
        shutil.copytree(f"{output}/killed.training", f"{output}/{name}.training")
        train(name, where)
    train("accumulated", mesh, batch_size=4, accumulate=2)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns the lines of the runs, and their factors by name, of layers with fused parts."""
    base, output = (tmp_path_factory.mktemp(name) for name in ("molmo", "runs"))
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        shutil.copy(DATA / name, base)
    words = ["User:", "Assistant:", "what", "is", "this"]
    helpers.make_tokenizer(words, {}).save_pretrained(base)
    random = np.random.default_rng(0)
    images = [make_sample(output, i, random).image for i in range(8)]
    printed = helpers.run_python(RUNS, base, output, *images, **helpers.EIGHT_DEVICES)
    lines = [line.split() for line in printed.splitlines()]
    return {name: (int(first), int(count)) for name, first, count in lines}, {
        file.parent.name: safetensors.numpy.load_file(file)
        for file in output.glob("*/adapter_model.safetensors")
    }


@pytest.mark.slow
class TestMolmo:
    def test_runs_compile_one_program_each(self, runs):
        lines, _ = runs
        assert lines == {
            **dict.fromkeys(("whole", "killed", "accumulated"), (1, 1)),
            **dict.fromkeys(("same", "other", "one"), (3, 1)),
        }

    @pytest.mark.parametrize(("name", "atol"), [("same", 0), ("other", 1e-6), ("one", 1e-6)])
    def test_a_resumed_run_ends_like_an_uninterrupted_one(self, runs, name, atol):
        _, factors = runs
        assert any("att_proj" in site for site in factors["whole"])
        assert factors[name].keys() == factors["whole"].keys()
        for site, value in factors["whole"].items():
            np.testing.assert_allclose(factors[name][site], value, rtol=0, atol=atol, err_msg=site)

    def test_accumulated_batches_are_one_large_batch(self, runs):
        _, factors = runs
        for site, value in factors["whole"].items():
            # Four updates moved the factors by up to 4e-3.
            np.testing.assert_allclose(
                factors["accumulated"][site], value, rtol=0, atol=1e-5, err_msg=site
            )
            assert "lora_B" not in site or np.abs(value).max() > 1e-3


UPDATES = """
    import sys, jax, jax.numpy as jnp, numpy as np, optax, ports
    from pathlib import Path
    from ports.parallel import sharding
    from xlvlm_jax import steering
    from xlvlm_jax.data import Sample
    from xlvlm_jax.finetune import FinetuneSettings, examples
    from xlvlm_jax.finetune.training import Trainer, train_step
    from xlvlm_jax.steering import learned

    base, *images = sys.argv[1:]
    samples = [Sample(str(i), Path(f), str(i), "what is", ("w1 w2", "w3"))
               for i, f in enumerate(images)]

    def memory(state):
        return {shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.ndim
                for shard in leaf.addressable_shards}

    def updates(vlm, method, **options):
        options = {"batch_size": 8, "rate": 0.01, "warmup": 0.0, **options}
        settings = FinetuneSettings(method=method, rank=2, **options)
        trainer, each, first = Trainer(vlm, settings, 2), settings.accumulate, None
        state = trainer.begin()
        made = list(examples.batches(vlm, samples, settings.batch_size, 0, 0, 2 * each))
        if vlm.mesh is not None:
            inputs = vlm.place(made[0].inputs)
            assert "data" in str(inputs["input_ids"].sharding.spec)
        for i in (0, each):
            before, held = state, memory(state)
            state, figures = trainer.update(state, made[i : i + each])
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before) if leaf.ndim)
            assert memory(state) == held, (method, vlm.mesh, i)
            first = first or jax.tree.map(jnp.copy, (state.moments, figures))
        assert train_step._cache_size() == 1, (method, vlm.mesh)
        train_step.clear_cache()
        return first, state.trained, figures

    mesh = ports.make_mesh(4, 2)
    one, several = ports.load(base), ports.load(base, mesh=mesh)
    for method in ("lora", "full"):
        ends = [updates(vlm, method) for vlm in (one, several)]
        # Of the second update, and so of the parameters after the first.
        for a, b in zip(*(jax.tree.leaves(figures) for *_, figures in ends)):
            np.testing.assert_allclose(a, b, rtol=1e-4)
        # Where a gradient is rounding (that of a key's bias is), Adam makes a full step of it.
        apart = [np.abs(np.array(a) - np.array(b)).ravel() for a, b in
                 zip(*(jax.tree.leaves(trained) for _, trained, _ in ends))]
        assert np.quantile(np.concatenate(apart), 0.8) < 1e-5, method
        # So gradients themselves: the first moment of the first update is one, but for a factor.
        mu = [[np.array(leaf) for leaf in jax.tree.leaves(optax.tree.get(first[0], "mu"))]
              for first, *_ in ends]
        largest = max(np.abs(leaf).max() for leaf in mu[0])
        for a, b in zip(*mu, strict=True):
            atol = max(1e-5 * np.abs(a).max(), 1e-7 * largest)
            np.testing.assert_allclose(b, a, rtol=0, atol=atol, err_msg=method)
    # Accumulated, too.
    (moments, figures), *_ = updates(several, "full", batch_size=4, accumulate=2)
    (expected, others), *_ = ends[1]
    np.testing.assert_allclose(figures["loss"], others["loss"], rtol=1e-5)
    np.testing.assert_allclose(figures["norm"], others["norm"], rtol=1e-5)
    (found, wanted) = (jax.tree.leaves(optax.tree.get(tree, "mu")) for tree in (moments, expected))
    largest = max(np.abs(leaf).max() for leaf in wanted)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=max(1e-5 * np.abs(b).max(), 1e-7 * largest))

    # An update leaves a state where it is, whatever the compiler would choose.
    trainer = Trainer(several, FinetuneSettings(rank=2, batch_size=8), 2)
    state = jax.device_put(trainer.begin(), sharding.replicated(mesh))
    state, _ = trainer.update(state, list(examples.batches(several, samples, 8, 0, 0, 1)))
    assert {leaf.sharding for leaf in jax.tree.leaves(state)} == {sharding.replicated(mesh)}

    site = several.layers[0]
    for rank in (None, 2):
        learned._update.clear_cache(), learned._losses.clear_cache()
        found = [steering.fit_learned(vlm, samples, ["w1 w2"] * 8, site, rank=rank, steps=3,
                                      batch_size=4, evaluate_every=1, seed=0)
                 for vlm in (several, one)]
        # One program for each of the two models.
        assert learned._update._cache_size() == learned._losses._cache_size() == 2, rank
        looks = [[look["validation"] for look in fit.source["history"]] for fit in found]
        np.testing.assert_allclose(*looks, rtol=1e-4)
    print("alike")
"""


@pytest.mark.slow
def test_updates_are_one_program_that_reuses_memory_and_equal_those_of_one_device(pair, samples):
    images = [sample.image for sample in samples]
    printed = helpers.run_python(UPDATES, pair.directory, *images, **helpers.EIGHT_DEVICES)
    assert printed == "alike\n"
