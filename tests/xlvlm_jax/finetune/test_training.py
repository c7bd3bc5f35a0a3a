"""Losses and updates against PyTorch, accumulation, precision."""

import dataclasses
import functools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import ports
from ports.checkpoint import peft_io
from xlvlm_jax.finetune import FinetuneSettings, examples, run, training
from xlvlm_jax.finetune.training import Trainer, initial_adapter

from ...ports import helpers, molmo_helpers
from .conftest import SETTINGS


@pytest.fixture(scope="module")
def batches(vlm, samples):
    return list(examples.batches(vlm, samples, 4, seed=0, start=0, stop=3))


def torch_loss(model, batch):
    labels = batch.inputs["input_ids"].astype(np.int64)
    before = np.arange(labels.shape[1]) < labels.shape[1] - batch.lengths[:, None]
    return model(
        **helpers.to_torch(batch.inputs), labels=torch.from_numpy(np.where(before, -100, labels))
    ).loss


def test_losses_are_pytorchs(pair, vlm, samples):
    split = list(examples.evaluation_batches(vlm, samples[:7], 4))
    trainer = Trainer(vlm, SETTINGS, 5)
    with torch.no_grad():
        theirs = [torch_loss(pair.torch_model, batch).item() for batch in split[:1]]
        # Rows that fill the last batch up have nothing to learn.
        short = split[1]._replace(
            inputs={k: v[:3] for k, v in split[1].inputs.items()}, lengths=split[1].lengths[:3]
        )
        theirs.append(torch_loss(pair.torch_model, short).item())
    counts = [batch.lengths.sum() for batch in split]
    expected = np.average(theirs, weights=counts)
    assert trainer.evaluate(trainer.begin(), split) == pytest.approx(expected, rel=1e-5)


def test_updates_are_those_of_peft_and_torch(pair, vlm, batches, tmp_path):
    """Three steps of LoRA with AdamW and clipping give the same factors."""
    adapter, ranks = initial_adapter(vlm, SETTINGS)
    # Were the second factor zero, the first would not move.
    random = np.random.default_rng(0)
    factors = jax.tree.map(
        lambda x: jnp.array(0.1 * random.standard_normal(x.shape, np.float32)), adapter.factors
    )
    adapter = adapter._replace(factors=factors)
    peft_io.write(tmp_path, adapter, ranks, vlm.module_names, base_model="small")
    base = helpers.transformers.LlavaForConditionalGeneration.from_pretrained(pair.directory)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    losses = []
    for batch in batches:
        loss = torch_loss(theirs, batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
    trainer = Trainer(vlm, SETTINGS, 5)
    state = trainer.begin()._replace(trained=factors)
    for batch, expected in zip(batches, losses, strict=True):
        state, figures = trainer.update(state, [batch])
        assert float(figures["loss"]) == pytest.approx(expected, rel=1e-4)
    after = dict(theirs.named_parameters())
    for site, (down, up) in state.trained.items():
        name = f"base_model.model.{vlm.module_names[site]}.lora_{{}}.default.weight"
        np.testing.assert_allclose(down, after[name.format("A")].detach().T, atol=2e-4)
        np.testing.assert_allclose(up, after[name.format("B")].detach().T, atol=2e-4)


def test_accumulated_batches_are_one_large_batch(vlm, samples):
    ends = []
    for size, accumulate in ((4, 1), (2, 2)):
        settings = dataclasses.replace(SETTINGS, batch_size=size, accumulate=accumulate)
        trainer = Trainer(vlm, settings, 5)
        state = trainer.begin()
        count = 2 * accumulate
        made = list(examples.batches(vlm, samples, size, seed=0, start=0, stop=count))
        for i in range(0, count, accumulate):
            state, figures = trainer.update(state, made[i : i + accumulate])
        ends.append((state.trained, float(figures["loss"]), float(figures["norm"])))
    (one, *figures), (several, *others) = ends
    assert figures == pytest.approx(others, rel=1e-4)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(several), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_each_program_is_waited_for(vlm, samples, waited_for):
    values = waited_for(training)
    settings = dataclasses.replace(SETTINGS, batch_size=2, accumulate=2)
    trainer = Trainer(vlm, settings, 5)
    made = list(examples.batches(vlm, samples, 2, seed=0, start=0, stop=4))
    state, figures = trainer.update(trainer.begin(), made[:2])
    assert len(values) == 2 and values[1] == (state, figures)
    trainer.evaluate(state, made[:3])
    assert len(values) == 2 + 3


def test_layers_computed_again_give_the_same_update(vlm, batches):
    ends, room = [], []
    for recompute in (False, True):
        settings = dataclasses.replace(SETTINGS, recompute=recompute)
        trainer = Trainer(vlm, settings, 5)
        batch = batches[0]
        lowered = training.train_step.lower(
            *(vlm.module, settings, 5, batch.window, trainer.begin(), trainer._frozen),
            *(vlm.place(batch.inputs), jnp.asarray(batch.lengths), True),
        )
        room.append(
            "checkpoint" in lowered.as_text() or "optimization_barrier" in lowered.as_text()
        )
        ends.append(trainer.update(trainer.begin(), [batch]))
    assert room == [False, True]
    (plain, figures), (again, others) = ends
    assert float(figures["norm"]) == pytest.approx(float(others["norm"]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(plain.trained), jax.tree.leaves(again.trained), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    # On a CPU nothing is computed again unless asked for.
    assert not SETTINGS.recomputes


def test_blocks_of_molmo_computed_again_give_the_same_gradient(tmp_path):
    molmo_helpers.make_checkpoint(tmp_path, molmo_helpers.CONFIG)
    vlm = ports.load(tmp_path)
    inputs = vlm.place(molmo_helpers.make_inputs(molmo_helpers.CONFIG, [0, 0], [5, 5]))
    adapter, _ = initial_adapter(vlm, SETTINGS)
    random = np.random.default_rng(0)
    # Where the second factor is zero, the first has no gradient.
    factors = jax.tree.map(
        lambda x: jnp.array(0.1 * random.standard_normal(x.shape, np.float32)), adapter.factors
    )

    def gradient(recompute):
        def loss(factors):
            frozen, lengths = (vlm.params, adapter.scale), jnp.array([3, 2])
            return training._loss_of(vlm.module, 3, factors, frozen, inputs, lengths, recompute)[0]

        program = jax.jit(jax.value_and_grad(loss))
        kept = "remat" in str(program.trace(factors).jaxpr)
        return kept, *program(factors)

    (plain, loss, expected), (again, other, found) = map(gradient, (False, True))
    assert (plain, again) == (False, True) and float(loss) == pytest.approx(float(other), rel=1e-6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_training_learns_and_leaves_the_model_alone(vlm, batches):
    before = jax.tree.map(np.asarray, vlm.params)
    trainer = Trainer(vlm, SETTINGS, 5)
    state, losses = trainer.begin(), []
    for _ in range(30):
        state, figures = trainer.update(state, batches[:1])
        losses.append(float(figures["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, vlm.params)
    # The decoder's linear layers, the head not among them.
    assert all(site.startswith("language_model.model.layers.") for site in state.trained)
    assert len(state.trained) == 2 * 7


def test_fused_layers_are_trained_by_part_and_stored_whole(tmp_path):
    """Molmo: one factor for query, key and value in files, one for each in the training state."""
    molmo_helpers.make_checkpoint(tmp_path, molmo_helpers.CONFIG)
    vlm = ports.load(tmp_path)
    trainer = Trainer(vlm, SETTINGS, 5)
    state, site = trainer.begin(), "model.transformer.blocks.0.att_proj"
    assert [up.shape for up in state.trained[site].ups] == [(3, 60), (3, 20), (3, 20)]
    inputs = vlm.place(molmo_helpers.make_inputs(molmo_helpers.CONFIG, [0, 0], [5, 5]))
    after, _ = jax.eval_shape(
        functools.partial(training.train_step, vlm.module, SETTINGS, 5, 3),
        *(state, trainer._frozen, inputs, jnp.array([3, 3]), True),
    )
    assert jax.tree.structure(after) == jax.tree.structure(state)
    # Resuming reads what a run stores, of which nothing depends on parts.
    random = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape), x.dtype), state.trained)
    state = state._replace(trained=drawn)
    stored = run.stored(state)
    assert stored["trained"][site].up.shape == (3, 100)
    moments = SETTINGS.optimizer(5).init(stored["trained"])
    assert jax.tree.structure(stored["moments"]) == jax.tree.structure(moments)
    again = run.resumed(state, stored, vlm)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    # Resuming holds no values that are replaced, only where they were.
    held = [weakref.ref(leaf) for leaf in jax.tree.leaves((again.trained, again.moments))]
    template, again = run.without_values(again)
    assert not any(reference() is not None for reference in held)
    assert jax.tree.map(jnp.shape, template) == jax.tree.map(jnp.shape, stored)
    again = run.resumed(again, stored, vlm)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    adapter, _ = initial_adapter(vlm, SETTINGS)
    adapter = adapter._replace(factors=stored["trained"])
    jax.tree.map(np.testing.assert_array_equal, trainer.finished(state), adapter)
    np.testing.assert_array_equal(stored["trained"][site].up[:, 60:80], drawn[site].ups[1])


@pytest.mark.filterwarnings("error:Some donated buffers")
def test_a_state_on_a_mesh_is_resumed_in_the_buffers_it_was_read_into(tmp_path):
    """But for those of fused layers, which are split."""
    molmo_helpers.make_checkpoint(tmp_path, molmo_helpers.CONFIG)
    vlm = ports.load(tmp_path, mesh=ports.make_mesh(1, devices=jax.local_devices()))
    trainer = Trainer(vlm, SETTINGS, 5)
    state, site = trainer.begin(), "model.transformer.blocks.0.att_proj"
    stored = jax.tree.map(jnp.copy, run.stored(state))
    given, expected = stored["trained"][site], jax.tree.map(np.array, stored)
    found = run.resumed(run.without_values(state)[1], stored, vlm)
    assert given.down.is_deleted() and not given.up.is_deleted()
    assert len(found.trained[site].ups) == 3
    jax.tree.map(np.testing.assert_array_equal, run.stored(found), expected)


@pytest.mark.slow
def test_half_precision_trains_in_single_precision(pair, vlm, batches):
    half = ports.load(pair.directory, dtype="bfloat16")
    trainer = Trainer(half, SETTINGS, 5)
    losses = [t.evaluate(t.begin(), batches[:1]) for t in (trainer, Trainer(vlm, SETTINGS, 5))]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]
    state = trainer.begin()
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trained)} == {np.dtype("float32")}
    inputs, lengths = half.place(batches[0].inputs), jnp.asarray(batches[0].lengths)
    frozen = half.params, trainer.finished(state).scale
    after, _ = jax.eval_shape(
        functools.partial(training.train_step, half.module, SETTINGS, 5, batches[0].window),
        *(state, frozen, inputs, lengths, True),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(after.trained)} == {np.dtype("float32")}
    trainer = Trainer(half, FinetuneSettings(method="full"), 5)
    state = trainer.begin()
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trained)} == {np.dtype("float32")}
    finished = jax.tree.leaves(trainer.finished(state))
    assert {leaf.dtype for leaf in finished} == {jnp.dtype(jnp.bfloat16)}
