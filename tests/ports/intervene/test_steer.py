"""Steering of a model: against PyTorch's forward hooks, position by position, and in sweeps."""

import contextlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import ports
from ports import passes, steer

from .. import helpers

SITE = "language_model.model.layers.0"
WIDTH = helpers.TEXT["hidden_size"]
# Strong enough to change every answer.
VECTOR = 3 * np.random.default_rng(5).standard_normal(WIDTH).astype(np.float32)


@pytest.fixture(scope="module")
def inputs():
    return helpers.make_inputs([1, 2, 0], [3, 9, 6])


class TestAgainstPyTorch:
    """Compares with a forward hook, in the prefill and in every decode step."""

    @staticmethod
    @contextlib.contextmanager
    def hook(model, inputs, where, steering=VECTOR):
        """Adds [D] or [B, 1, D] to the output of layer 0, at some positions."""
        ids, mask = torch.from_numpy(inputs["input_ids"]), inputs["attention_mask"]
        # By count of tokens, as {"from": i} means it; padding comes before all.
        index = torch.from_numpy(np.cumsum(mask, 1) - 1)
        generated = 0

        def chosen_positions(length):
            nonlocal generated
            if length == 1:
                generated += 1
                if isinstance(where, dict):
                    return index[:, -1:] + generated >= where["from"]
                is_chosen = isinstance(where, str) and where in ("all", "text", "generated")
                return torch.full((len(ids), 1), is_chosen)
            image = ids == helpers.IMAGE
            if isinstance(where, dict):
                return index >= where["from"]
            if not isinstance(where, str):
                return torch.from_numpy(where)
            last = torch.zeros(ids.shape, dtype=torch.bool)
            last[:, -1] = True
            everything = torch.ones(ids.shape, dtype=torch.bool)
            return {
                "all": everything,
                "prompt": everything,
                "generated": ~everything,
                "last_prompt": last,
                "image": image,
                "text": ~image,
            }[where]

        def edit(module, args, out):
            states = out[0] if isinstance(out, tuple) else out
            chosen = chosen_positions(states.shape[1])
            states = states + chosen[..., None] * torch.as_tensor(steering)
            return (states, *out[1:]) if isinstance(out, tuple) else states

        handle = model.model.language_model.layers[0].register_forward_hook(edit)
        yield
        handle.remove()

    def compare(self, small, inputs, edit, where, steering=VECTOR):
        ours = small.vlm.generate(inputs, max_new_tokens=32, edits={SITE: edit}).tokens
        with self.hook(small.torch_model, inputs, where, steering):
            theirs = helpers.torch_generate(small.torch_model, inputs, 32).sequences
        np.testing.assert_array_equal(ours, theirs[:, inputs["input_ids"].shape[1] :])
        return np.asarray(ours)

    @pytest.mark.parametrize(
        "where",
        ["all", "prompt", "generated", "last_prompt", "image", "text", {"from": 4}, {"from": 12}],
        ids=str,
    )
    def test_32_greedy_tokens_equal_a_forward_hooks(self, small, inputs, where):
        plain = small.vlm.generate(inputs, max_new_tokens=32).tokens
        ours = self.compare(small, inputs, ports.add(VECTOR, where=where), where)
        # The third row has no image.
        changed = (ours != plain).any(1)
        np.testing.assert_array_equal(changed, [True, True, where != "image"])

    def test_tokens_at_a_mask(self, small, inputs):
        mask = np.random.default_rng(1).random(inputs["input_ids"].shape) < 0.4
        self.compare(small, inputs, ports.add(VECTOR, where=mask), mask)

    def test_tokens_of_rows_with_their_own_vectors_and_strengths(self, small, inputs):
        vectors = np.random.default_rng(2).standard_normal((3, WIDTH)).astype(np.float32)
        alphas = np.array([2.0, -3.0, 0.5], np.float32)
        steering = (alphas[:, None] * vectors)[:, None]
        self.compare(small, inputs, ports.add(vectors, alphas), "all", steering)

    @staticmethod
    @contextlib.contextmanager
    def patch(model, states, mask):
        """Replaces layer 0's states by states[B, T, D] at the prompt's positions bool[B, T]."""

        def put(module, args, out):
            found = out[0] if isinstance(out, tuple) else out
            if found.shape[1] == mask.shape[1]:  # not a step of the generation
                found = torch.where(torch.tensor(mask)[..., None], torch.tensor(states), found)
            return (found, *out[1:]) if isinstance(out, tuple) else found

        handle = model.model.language_model.layers[0].register_forward_hook(put)
        yield
        handle.remove()

    @pytest.mark.parametrize("padding", ["left", "right"])
    @pytest.mark.parametrize("where", ["all", "image", "mask", "row", "at"])
    def test_patched_with_the_states_of_another_run(self, small, inputs, where, padding):
        other = {**inputs, "input_ids": inputs["input_ids"].copy()}
        words = (other["input_ids"] != helpers.IMAGE) & (inputs["attention_mask"] == 1)
        other["input_ids"][words] = 3 + (other["input_ids"][words] + 7) % 20
        other["pixel_values"] = inputs["pixel_values"][::-1].copy()
        tokens = inputs["attention_mask"].astype(bool)
        at = np.array([[4, 1], [2, 5], [0, 3]])
        given = np.array(small.vlm.forward(other, sites=SITE).states[SITE])
        index = np.cumsum(tokens, 1) - 1
        masks = {
            "all": tokens,
            "image": inputs["input_ids"] == helpers.IMAGE,
            "mask": tokens & (np.random.default_rng(1).random(tokens.shape) < 0.5),
            "row": tokens & np.array([True, False, True])[:, None],
            "at": tokens & (index[..., None] == at[:, None]).any(-1),
        }
        mask = masks[where]
        with self.patch(small.torch_model, given, mask), torch.no_grad():
            theirs = small.torch_model(**helpers.to_torch(inputs)).logits
            answers = helpers.torch_generate(small.torch_model, inputs, 12).sequences
        chosen = {"row": np.array([True, False, True]), "at": {"at": at}}.get(where, where)
        states = given
        if where == "at":
            places = (index[:, None] == at[..., None]) & tokens[:, None]
            states = np.take_along_axis(given, places.argmax(-1)[..., None], 1)
        ours, run = mask, inputs
        if padding == "right":
            empty = (inputs["attention_mask"] == 0).sum(1)
            run = helpers.pad_right(inputs)

            def move(array):
                return np.stack([np.roll(row, -n, 0) for row, n in zip(array, empty, strict=True)])

            ours, states = move(mask), states if where == "at" else move(states)
        edit = ports.replace(states, where=ours if where == "mask" else chosen)
        if padding == "left":
            logits = small.vlm.forward(run, edits={SITE: edit}).logits
            assert helpers.relative_error(logits, theirs, tokens) < 1e-4
            direct = steer(small.vlm.apply, {SITE: edit})(small.vlm.params, run)
            assert helpers.relative_error(direct, theirs, tokens) < 1e-4
        generated = small.vlm.generate(run, max_new_tokens=12, edits={SITE: edit}).tokens
        np.testing.assert_array_equal(generated, answers[:, tokens.shape[1] :])
        plain = small.vlm.generate(run, max_new_tokens=12).tokens
        assert not np.array_equal(generated, plain)

    def test_the_gradient_of_the_vector(self, small, inputs):
        def score(vector):
            edits = {SITE: ports.add(vector, where="prompt")}
            return steer(small.vlm.apply, edits)(small.vlm.params, inputs)[:, -1, 7].sum()

        ours = jax.jit(jax.grad(score))(jnp.asarray(VECTOR))
        theirs = torch.from_numpy(VECTOR).requires_grad_()
        with self.hook(small.torch_model, inputs, "prompt", theirs):
            small.torch_model(**helpers.to_torch(inputs)).logits[:, -1, 7].sum().backward()
        assert helpers.relative_error(ours, theirs.grad) < 1e-4


class TestModels:
    def test_positions_by_their_kind(self, small, inputs):
        edits = {
            SITE: [
                ports.add(VECTOR, where=where)
                for where in ("all", "prompt", "image", "text", "last_prompt", "generated")
            ]
        }
        apply = steer(small.vlm.apply, edits, masks=True)
        _, masks = jax.jit(apply)(small.vlm.params, inputs)
        tokens = inputs["attention_mask"].astype(bool)
        image = inputs["input_ids"] == helpers.IMAGE
        last = np.zeros_like(tokens)
        last[:, -1] = True
        expected = [tokens, tokens, image, tokens & ~image, last, np.zeros_like(tokens)]
        for mask, kind in zip(masks[SITE], expected, strict=True):
            np.testing.assert_array_equal(mask, kind)

    def test_captured_states_are_those_after_the_edit(self, small, inputs):
        edits = {SITE: ports.replace(VECTOR, where="text")}
        states = small.vlm.forward(inputs, sites=[SITE], edits=edits).states[SITE]
        text = inputs["attention_mask"].astype(bool) & (inputs["input_ids"] != helpers.IMAGE)
        np.testing.assert_allclose(states[text], np.broadcast_to(VECTOR, (text.sum(), WIDTH)))
        generation = small.vlm.generate(inputs, max_new_tokens=4, sites=[SITE], edits=edits)
        states = np.asarray(generation.states[SITE])
        np.testing.assert_allclose(states, np.broadcast_to(VECTOR, states.shape))

    def test_a_strength_of_zero_changes_nothing(self, small, inputs):
        edits = {SITE: ports.add(VECTOR, 0.0)}
        plain = small.vlm.generate(inputs, max_new_tokens=12, sites=[SITE])
        same = small.vlm.generate(inputs, max_new_tokens=12, sites=[SITE], edits=edits)
        np.testing.assert_array_equal(plain.tokens, same.tokens)
        np.testing.assert_allclose(plain.states[SITE], same.states[SITE], atol=1e-5)

    def test_a_mask_moves_with_the_padding(self, small, inputs):
        """The same rows padded on the right, edited at the same positions, give the same tokens."""
        mask = np.random.default_rng(0).random(inputs["input_ids"].shape) < 0.5
        right = helpers.pad_right(inputs)
        padding = (inputs["attention_mask"] == 0).sum(1)
        moved = np.stack([np.roll(row, -n) for row, n in zip(mask, padding, strict=True)])
        kept = [
            small.vlm.generate(
                rows, max_new_tokens=12, edits={SITE: ports.add(VECTOR, where=where)}
            ).tokens
            for rows, where in ((inputs, mask), (right, moved))
        ]
        np.testing.assert_array_equal(*kept)

    def test_each_row_of_a_batch_is_steered_by_itself(self, small, inputs):
        vectors = np.stack([VECTOR, -VECTOR, 0 * VECTOR])
        alphas = np.array([1.0, 0.5, 1.0])
        together = small.vlm.generate(
            inputs, max_new_tokens=12, edits={SITE: ports.add(vectors, alphas)}
        ).tokens
        for row in range(3):
            alone = small.vlm.generate(
                inputs, max_new_tokens=12, edits={SITE: ports.add(vectors[row], alphas[row])}
            ).tokens
            np.testing.assert_array_equal(together[row], alone[row])

    def test_vector_strength_positions_and_site_never_compile_again(self, small, inputs):
        sites = [f"language_model.model.layers.{i}" for i in range(2)]
        before = None
        for where in ("all", "last_prompt", {"from": 3}):
            for alpha in ([1.0, 0.0], [0.0, 2.0]):
                edits = ports.stacked(sites, np.stack([VECTOR, alpha[1] * VECTOR]), alpha, where)
                small.vlm.generate(inputs, max_new_tokens=5, edits=edits)
                compiled = passes.generate._cache_size()
                before = before or compiled
        assert compiled == before

    def test_a_sweep_is_each_of_its_variants(self, small, inputs):
        sites = [f"language_model.model.layers.{i}" for i in range(2)]
        vectors = np.stack([VECTOR, VECTOR])
        variants = [
            ports.stacked(sites, vectors, alpha, where)
            for alpha, where in (([1, 0], "all"), ([0, 2], "all"), ([0, 1], "generated"))
        ]
        swept = small.vlm.sweep(inputs, variants, max_new_tokens=8, sites=[SITE])
        assert swept.tokens.shape == (3, 3, 8)
        for index, edits in enumerate(variants):
            alone = small.vlm.generate(inputs, max_new_tokens=8, edits=edits, sites=[SITE])
            np.testing.assert_array_equal(swept.tokens[index], alone.tokens)
            np.testing.assert_allclose(
                swept.states[SITE][index], alone.states[SITE], rtol=1e-4, atol=1e-4
            )

    def test_a_sweep_without_edits_is_that_many_plain_answers(self, small, inputs):
        plain = small.vlm.generate(inputs, max_new_tokens=4, sites=[SITE])
        for variants in ([{}, None, {}], [{SITE: []}] * 3):
            swept = small.vlm.sweep(inputs, variants, max_new_tokens=4, sites=[SITE])
            for tokens, states in zip(swept.tokens, swept.states[SITE], strict=True):
                np.testing.assert_array_equal(tokens, plain.tokens)
                np.testing.assert_array_equal(states, plain.states[SITE])

    def test_a_sweep_computes_what_precedes_the_edit_once(self, small, inputs, monkeypatch):
        program = passes.generate

        def operations(site, count, width=WIDTH):
            def lower(*args, **options):
                found.append(program.lower(*args, **options).cost_analysis()["flops"])
                return program.eval_shape(*args, **options)

            found = []
            monkeypatch.setattr(passes, "generate", lower)
            variants = [{site: ports.add(np.zeros(width), alpha)} for alpha in range(count)]
            small.vlm.sweep(inputs, variants, max_new_tokens=2)
            return found[0]

        once = operations(SITE, 1)
        whole = operations("vision_tower.vision_model.pre_layrnorm", 8, 36)
        behind_first = operations(SITE, 8)
        behind_last = operations("language_model.model.norm", 8)
        assert whole > 7 * once
        assert whole - behind_first > 7 * 0.3 * once  # image and first of two layers
        # Of the second and last layer, the prompt's keys and values alone.
        assert behind_first - behind_last > 7 * 0.05 * once
        assert behind_last < 1.5 * once

    def test_a_sweep_keeps_the_cache_that_the_edits_do_not_reach_once(self, small, inputs):
        path = "language_model.model"
        shared = {  # of the two layers
            "language_model.lm_head": 2,
            path: 2,
            f"{path}.norm": 2,
            f"{path}.layers.1": 2,
            f"{path}.layers.1.self_attn.k_proj": 1,
            f"{path}.layers_0": 1,
            f"{path}.layers.0.mlp": 0,
            f"{path}.embed_tokens": 0,
            "multi_modal_projector": 0,
        }
        for site, count in shared.items():
            axes = small.vlm.module.prompt_cache_axes([site])["language_model"]["model"]
            assert list(axes.values()) == [None] * count + [0] * (2 - count), site
        # Several sites: what the first of them reaches.
        axes = small.vlm.module.prompt_cache_axes([f"{path}.norm", SITE])
        assert list(axes["language_model"]["model"].values()) == [None, 0]

    @pytest.mark.parametrize(
        "name", ["layers.1.self_attn.k_proj", "layers.0.mlp", "embed_tokens", "norm"]
    )
    def test_sweeps_of_other_sites_are_each_of_their_variants(self, small, inputs, name):
        site = f"language_model.model.{name}"
        width = small.vlm.site_shapes[site][-1]
        vector = np.random.default_rng(7).standard_normal(width).astype(np.float32)
        variants = [{site: ports.add(vector, alpha)} for alpha in (0.0, 3.0)]
        swept = small.vlm.sweep(inputs, variants, max_new_tokens=4).tokens
        for tokens, edits in zip(swept, variants, strict=True):
            alone = small.vlm.generate(inputs, max_new_tokens=4, edits=edits).tokens
            np.testing.assert_array_equal(tokens, alone)

    @pytest.mark.parametrize("where", ["last_prompt", "generated", "all"])
    def test_logits_can_be_steered(self, small, inputs, where):
        towards = np.zeros(helpers.VOCABULARY, np.float32)
        towards[7] = 1e4
        edits = {"language_model.lm_head": ports.add(towards, where=where)}
        tokens = np.asarray(small.vlm.generate(inputs, max_new_tokens=4, edits=edits).tokens)
        assert (tokens[:, 0] == 7).all() == (where != "generated")
        assert (tokens[:, 1:] == 7).all() == (where != "last_prompt")

    def test_the_vision_tower_can_be_steered(self, small, inputs):
        site = "vision_tower.vision_model.encoder.layers.0"
        vector = 9 * np.random.default_rng(6).standard_normal(helpers.VISION["hidden_size"])
        plain = small.vlm.forward(inputs, sites=[site]).states[site]
        edits = {site: ports.add(vector)}
        edited = small.vlm.forward(inputs, sites=[site], edits=edits).states[site]
        np.testing.assert_allclose(edited, plain + vector, rtol=1e-5, atol=1e-5)
        tokens = small.vlm.generate(inputs, max_new_tokens=12).tokens
        steered = small.vlm.generate(inputs, max_new_tokens=12, edits=edits).tokens
        # The third row has no image.
        changed = (np.asarray(steered) != tokens).any(1)
        np.testing.assert_array_equal(changed, [True, True, False])


COLUMN, LATER, COUNT = 8, 2, 4  # of the function edits: one in the prompt, one after it


def add_at_a_column(x, places):
    """Returns the states with the vector added at the caller's column 8, by their own index."""
    return x if x.shape[1] == 1 else x.at[:, COLUMN].add(VECTOR)


def add_from_a_column(length):
    """Returns the states with the vector added from the second generated token on, by columns."""

    def function(x, places):
        return x + (places.slot >= length + LATER - 1)[..., None] * VECTOR

    return function


class TestPositions:
    """An edit's positions are those of the caller's inputs, even if padding moves them."""

    @pytest.fixture(scope="class", params=["left", "right"])
    def padded(self, request, inputs):
        return inputs if request.param == "left" else helpers.pad_right(inputs)

    def check(self, small, padded, edit, mask):
        """Compares a generation's states with an unpadded pass over each row and its tokens, edited
        at the positions bool[B, T + M] `mask`.
        """
        site = "language_model.model.layers.1"
        answer = small.vlm.generate(
            padded, max_new_tokens=COUNT, sites=[site], edits={SITE: edit}, prompt_states=True
        )
        valid = np.pad(padded["attention_mask"] == 1, ((0, 0), (0, COUNT)), constant_values=True)
        ids = np.concatenate([padded["input_ids"], answer.tokens], 1)
        states = np.concatenate([answer.prompt_states[site], answer.states[site][:, 1:]], 1)
        images = iter(padded["pixel_values"])
        for row in range(len(ids)):
            count = (ids[row] == helpers.IMAGE).sum() // helpers.PATCHES
            alone = {"input_ids": ids[row : row + 1, valid[row]]}
            if count:
                alone["pixel_values"] = np.stack([next(images) for _ in range(count)])
            edits = {SITE: ports.add(VECTOR, where=mask[row : row + 1, valid[row]])}
            expected = small.vlm.forward(alone, sites=[site], edits=edits).states[site][0, :-1]
            ours = states[row, valid[row, :-1]]
            assert helpers.relative_error(ours, expected) < 1e-5

    def expected_mask(self, padded, where):
        ids, valid = padded["input_ids"], padded["attention_mask"] == 1
        index = np.where(valid, np.cumsum(valid, 1) - 1, -1)
        image, last = ids == helpers.IMAGE, index == index.max(1, keepdims=True)
        after = np.broadcast_to(index.max(1, keepdims=True) + 1 + np.arange(COUNT), (3, COUNT))
        prompt = {
            "image": image,
            "text": valid & ~image,
            "last_prompt": last,
            "generated": np.zeros_like(valid),
        }.get(where if isinstance(where, str) else "", valid)
        generated = np.full((3, COUNT), where in ("all", "text", "generated"))
        if isinstance(where, dict):
            prompt, generated = index >= where["from"], after >= where["from"]
        return np.concatenate([prompt, generated], 1)

    @pytest.mark.parametrize(
        "where",
        ["all", "prompt", "generated", "last_prompt", "image", "text", {"from": 4}, {"from": 12}],
        ids=str,
    )
    def test_by_kind(self, small, padded, where):
        self.check(small, padded, ports.add(VECTOR, where=where), self.expected_mask(padded, where))

    @pytest.mark.parametrize("column", [0, 7, COLUMN, 27])
    def test_by_a_mask(self, small, padded, column):
        mask = np.zeros(padded["input_ids"].shape, bool)
        mask[:, column] = True
        edit = ports.add(VECTOR, where=mask)
        self.check(small, padded, edit, np.pad(mask, ((0, 0), (0, COUNT))))

    def test_by_a_functions_index(self, small, padded):
        mask = np.zeros((3, padded["input_ids"].shape[1] + COUNT), bool)
        mask[:, COLUMN] = True
        self.check(small, padded, ports.edit_with(add_at_a_column), mask)

    def test_by_a_functions_columns(self, small, padded):
        length = padded["input_ids"].shape[1]
        mask = np.zeros((3, length + COUNT), bool)
        mask[:, length + LATER - 1 :] = True
        self.check(small, padded, ports.edit_with(add_from_a_column(length)), mask)

    def test_of_a_forward_pass(self, small, padded):
        valid = padded["attention_mask"] == 1
        mask = np.zeros_like(valid)
        mask[:, COLUMN] = True
        by_mask, by_function = (
            small.vlm.forward(padded, edits={SITE: edit}).logits
            for edit in (ports.add(VECTOR, where=mask), ports.edit_with(add_at_a_column))
        )
        assert helpers.relative_error(by_function, by_mask, valid) < 1e-6
        plain = small.vlm.forward(padded).logits
        assert helpers.relative_error(by_mask, plain, valid) > 1e-2


class TestPatching:
    def test_with_its_own_states_nothing_changes(self, small, inputs):
        out = small.vlm.forward(inputs, sites=[SITE])
        edits = {SITE: ports.replace(out.states[SITE])}
        again = small.vlm.forward(inputs, edits=edits)
        np.testing.assert_allclose(again.logits, out.logits, rtol=1e-5, atol=1e-5)
        plain = small.vlm.generate(inputs, max_new_tokens=8)
        same = small.vlm.generate(inputs, max_new_tokens=8, edits=edits)
        np.testing.assert_array_equal(same.tokens, plain.tokens)

    def test_other_states_never_compile_again(self, small, inputs):
        states = np.array(small.vlm.forward(inputs, sites=[SITE]).states[SITE])
        before = None
        for scale in (1, 2):
            small.vlm.generate(
                inputs, max_new_tokens=3, edits={SITE: ports.replace(scale * states)}
            )
            before = before or passes.generate._cache_size()
        assert passes.generate._cache_size() == before

    def test_a_sweep_is_each_of_its_variants(self, small, inputs):
        states = np.array(small.vlm.forward(inputs, sites=[SITE]).states[SITE])
        variants = [{SITE: ports.replace(scale * states, where="text")} for scale in (1, -1)]
        swept = small.vlm.sweep(inputs, variants, max_new_tokens=6).tokens
        for tokens, edits in zip(swept, variants, strict=True):
            alone = small.vlm.generate(inputs, max_new_tokens=6, edits=edits).tokens
            np.testing.assert_array_equal(tokens, alone)

    def test_of_a_vision_tower(self, small, inputs):
        site = "vision_tower.vision_model.encoder.layers.0"
        states = np.array(small.vlm.forward(inputs, sites=site).states[site])[::-1]
        edits = {site: ports.replace(states)}
        found = small.vlm.forward(inputs, sites=site, edits=edits).states[site]
        np.testing.assert_allclose(found, states, rtol=1e-6)


class TestMessages:
    @pytest.mark.parametrize(
        ("edits", "parts"),
        [
            ({"layers.7": ports.add(VECTOR)}, ("no site matches 'layers.7'", SITE[:-1])),
            ({SITE: ports.add(VECTOR[:7])}, ("width 7", f"have width {WIDTH}")),
            ({SITE: ports.add(np.stack([VECTOR] * 2))}, ("vector", "2 rows", "batch's 3")),
            ({SITE: ports.add(VECTOR, np.ones(4))}, ("alpha", "4 rows", "batch's 3")),
            ({SITE: ports.add(VECTOR, where=np.ones((3, 2)))}, ("mask", "(3, 2)", "input_ids")),
            ({SITE: ports.replace(np.ones((3, 2, WIDTH)))}, ("(3, 2, 60)", "(3,", "'at'")),
            ({SITE: ports.replace(np.ones((2, 9, WIDTH)))}, ("2 rows", "batch's 3")),
            ({SITE: VECTOR}, ("'language_model.model.layers.0' is an array", "add(vector)")),
            (ports.add(VECTOR), ("edits is of type Edit", "{site: edit}")),
            (
                {"multi_modal_projector": ports.add(VECTOR, where="text")},
                ("'multi_modal_projector' comes before image and text are joined", "'all'"),
            ),
            (
                {"language_model.model.embed_tokens": ports.add(VECTOR, where="text")},
                ("embed_tokens' comes before image and text are joined", "'language_model.model'"),
            ),
        ],
        ids=lambda value: "",
    )
    def test_of_edits_that_do_not_fit(self, small, inputs, edits, parts):
        with helpers.raises_line(ValueError, *parts):
            small.vlm.generate(inputs, max_new_tokens=2, edits=edits)

    @pytest.mark.parametrize(
        ("where", "said"),
        [({"from": 10**6}, "from 1000000 on"), ({"at": [99, 98]}, "[99, 98]")],
        ids=str,
    )
    def test_of_tokens_that_no_row_has(self, small, inputs, where, said):
        length = inputs["input_ids"].shape[1]
        edits = {SITE: ports.add(VECTOR, where=where)}
        message = f"at '{SITE}' changes nothing: it is for the tokens {said}, but no row has more"
        with pytest.warns(UserWarning, match=re.escape(f"{message} than {length}")):
            ours = small.vlm.forward(inputs, edits=edits)
        np.testing.assert_array_equal(ours.logits, small.vlm.forward(inputs).logits)
        with pytest.warns(UserWarning, match=re.escape(f"{message} than {length + 2}")):
            small.vlm.generate(inputs, max_new_tokens=3, edits=edits)

    def test_the_last_token_of_a_row_gives_no_warning(self, small, inputs):
        length = inputs["input_ids"].shape[1]
        edits = {SITE: ports.add(100 * VECTOR, where={"from": length})}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = small.vlm.generate(inputs, max_new_tokens=2, sites=SITE, edits=edits)
        plain = small.vlm.generate(inputs, max_new_tokens=2, sites=SITE)
        moved = np.abs(np.asarray(ours.states[SITE] - plain.states[SITE])).max((1, 2)) > 1
        assert moved.tolist() == (inputs["attention_mask"].sum(1) == length).tolist()

    def test_of_variants_that_differ(self, small, inputs):
        variants = [{SITE: ports.add(VECTOR)}, {SITE: ports.ablate(VECTOR)}]
        with helpers.raises_line(ValueError, "2 variants of edits have 2 structures"):
            small.vlm.sweep(inputs, variants, max_new_tokens=2)
        rows = len(inputs["input_ids"])
        variants = [{SITE: ports.add(x)} for x in (VECTOR, np.tile(VECTOR, (rows, 1)))]
        shapes = f"{VECTOR.shape} and {(rows, *VECTOR.shape)}"
        with helpers.raises_line(ValueError, f"edits at {SITE!r} have arrays of shapes {shapes}"):
            small.vlm.sweep(inputs, variants, max_new_tokens=2)
