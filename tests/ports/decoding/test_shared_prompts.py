"""Several questions about one picture: tokens and states equal those of rows computed apart."""

import copy
import dataclasses

import numpy as np
import pytest

import ports
from ports import passes
from ports.inputs import common_prefix, padding
from ports.intervene.edits import is_same_for_rows
from ports.nn.rope import Rope

from .. import helpers, idefics2_helpers, molmo_helpers, qwen2_vl_helpers
from ..questions import QUESTIONS, ask, both

LAYER = "language_model.model.layers.0"
KINDS = ("all", "prompt", "generated", "last_prompt", "image", "text")


def inputs_of(port: str) -> dict[str, np.ndarray]:
    """Two rows with a picture each and a beginning that is long enough."""
    if port == "llava":
        return ask(helpers.make_inputs([1, 1], [18, 21]))
    if port == "idefics2":
        return ask(idefics2_helpers.make_inputs([[(28, 28)], [(42, 28)]], [18, 21]))
    if port == "qwen2_vl":
        return ask(qwen2_vl_helpers.make_inputs([[(1, 4, 4)], [(1, 4, 8)]], [18, 21]))
    return ask(molmo_helpers.make_inputs(molmo_helpers.CONFIG, [2, 1], [18, 21]))


@pytest.fixture(scope="module")
def batch():
    return inputs_of("llava")


@pytest.mark.parametrize("port", ["llava", "idefics2", "qwen2_vl", "molmo"])
def test_every_family_answers_as_without_sharing(vlms, port, monkeypatch):
    vlm, inputs = vlms[port], inputs_of(port)
    site = next(s for s in vlm.sites if s.endswith(".0") and vlm.module.is_of_decoder(s))
    shared, apart = both(vlm, inputs, monkeypatch, sites=[site, vlm.head], prompt_states=True)
    np.testing.assert_array_equal(shared.tokens, apart.tokens)
    assert helpers.relative_error(shared.states[site], apart.states[site]) < 1e-5
    real = inputs["attention_mask"] == 1
    ours, expected = (x.prompt_states[site] for x in (shared, apart))
    assert ours.shape == expected.shape == (*real.shape, expected.shape[-1])
    assert helpers.relative_error(ours, expected, real) < 1e-5
    assert helpers.relative_error(shared.states[vlm.head], apart.states[vlm.head]) < 1e-5


def test_rows_padded_on_the_right(small, batch, monkeypatch):
    right = helpers.pad_right(batch)
    shared, apart = both(small.vlm, right, monkeypatch, sites=[LAYER], prompt_states=True)
    np.testing.assert_array_equal(shared.tokens, apart.tokens)
    ours, expected = (x.prompt_states[LAYER] for x in (shared, apart))
    assert helpers.relative_error(ours, expected, right["attention_mask"] == 1) < 1e-5


def test_longer_prompts_of_the_same_bucket_share_the_program(small, batch):
    options = {"max_new_tokens": 4, "sites": [LAYER], "prompt_states": True}
    first = small.vlm.generate(batch, **options)
    before = passes.generate._cache_size()
    wider = {
        name: np.pad(value, ((0, 0), (1, 0))) if name in padding.FILL else value
        for name, value in batch.items()
    }
    again = small.vlm.generate(wider, **options)
    assert passes.generate._cache_size() == before
    np.testing.assert_array_equal(again.tokens, first.tokens)
    ours, expected = (x.prompt_states[LAYER] for x in (again, first))
    assert helpers.relative_error(ours[:, 1:], expected, batch["attention_mask"] == 1) < 1e-5


def test_states_without_generation(small, batch, encoded):
    right, sites = helpers.pad_right(batch), [LAYER, "language_model.model.norm"]
    states, expected = small.vlm.states(right, sites=sites), small.vlm.forward(right, sites=sites)
    for site in sites:
        real = right["attention_mask"] == 1
        assert helpers.relative_error(states[site], expected.states[site], real) < 1e-5
    small.vlm.states(right, sites=[*sites, small.vlm.head])
    assert encoded == [2, len(QUESTIONS)]  # of the head, a shared prefill has only the last states


def test_rotation_that_depends_on_the_length(small, batch):
    """Dynamic scaling rotates all of a prompt by its whole length, which beginnings do not know."""
    longest = int(batch["attention_mask"].sum(1).max())
    real = batch["attention_mask"] == 1
    for length, is_shared in ((longest, True), (longest - 1, False)):
        rope = Rope(500.0, "dynamic", 2.0, length)
        sizes = dataclasses.replace(
            small.vlm.sizes, text=dataclasses.replace(small.vlm.sizes.text, rope=rope)
        )
        vlm = copy.copy(small.vlm)
        vlm.module = small.vlm.module.clone(config=sizes)
        checked = {name: np.asarray(value) for name, value in batch.items()}
        assert (vlm._divided(batch, checked, [])[1] is not None) == is_shared
        states = vlm.states(batch, sites=[LAYER])[LAYER]
        expected = vlm.forward(batch, sites=[LAYER]).states[LAYER]
        assert helpers.relative_error(states, expected, real) < 1e-5


@pytest.mark.parametrize("where", [*KINDS, {"at": [1, 25]}], ids=str)
def test_edits_reach_the_same_positions(small, batch, where, monkeypatch):
    vector = np.random.default_rng(1).standard_normal(small.vlm.site_shapes[LAYER][-1])
    edits = {LAYER: ports.add(vector.astype(np.float32), 2.0, where)}
    options = {"edits": edits, "sites": [LAYER], "prompt_states": True}
    shared, apart = both(small.vlm, batch, monkeypatch, **options)
    np.testing.assert_array_equal(shared.tokens, apart.tokens)
    assert helpers.relative_error(shared.states[LAYER], apart.states[LAYER]) < 1e-5
    ours, expected = (x.prompt_states[LAYER] for x in (shared, apart))
    assert helpers.relative_error(ours, expected, batch["attention_mask"] == 1) < 1e-5


@pytest.mark.parametrize("first", ["all", "generated"])
def test_vectors_of_single_rows_for_generated_tokens(small, batch, first, monkeypatch):
    """Only the edits that reach the prompt see the beginnings, which have fewer rows."""
    random, width = np.random.default_rng(1), small.vlm.site_shapes[LAYER][-1]
    rows = random.standard_normal((len(QUESTIONS), width), np.float32)
    strengths = np.linspace(0.5, 3, len(rows))
    edits = {
        LAYER: [
            ports.add(rows[0], 2.0, first),
            ports.add(rows, 3.0, "generated"),
            ports.add(rows[1], strengths, "generated"),
        ]
    }
    shared, apart = both(small.vlm, batch, monkeypatch, edits=edits, sites=[LAYER])
    np.testing.assert_array_equal(shared.tokens, apart.tokens)
    assert helpers.relative_error(shared.states[LAYER], apart.states[LAYER]) < 1e-5
    states = small.vlm.states(batch, sites=[LAYER], edits=edits)
    expected = small.vlm.forward(batch, sites=[LAYER], edits=edits).states
    real = batch["attention_mask"] == 1
    assert helpers.relative_error(states[LAYER], expected[LAYER], real) < 1e-5


@pytest.mark.parametrize("where", ["all", "generated"])
def test_conditions_share_too(small, batch, where, monkeypatch):
    vector = np.random.default_rng(1).standard_normal(small.vlm.site_shapes[LAYER][-1])
    variants = [{LAYER: ports.add(vector.astype(np.float32), a, where)} for a in (0.0, 2.0, 5.0)]
    shared, apart = both(small.vlm, batch, monkeypatch, "sweep", variants, sites=[LAYER])
    np.testing.assert_array_equal(shared.tokens, apart.tokens)
    ours, expected = (np.concatenate(x.states[LAYER]) for x in (shared, apart))
    assert helpers.relative_error(ours, expected) < 1e-5
    alone = small.vlm.generate(batch, max_new_tokens=4, edits=variants[1], sites=[LAYER])
    np.testing.assert_array_equal(shared.tokens[1], alone.tokens)


def test_rules_count_the_whole_prompt(small, batch, monkeypatch):
    values = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    shared, apart = both(small.vlm.with_generation_config(values), batch, monkeypatch)
    np.testing.assert_array_equal(shared.tokens, apart.tokens)


class TestShare:
    """What is divided, and what is not."""

    def share(self, inputs, blocks=None):
        pictures = {name: x for name, x in inputs.items() if name == "pixel_values"}
        tokens = (helpers.IMAGE,)
        owned = common_prefix.pictures_of_rows(inputs, pictures, tokens, None)
        return owned and common_prefix.share(inputs, owned, tokens, 0, {}, blocks)

    def test_by_hand(self):
        begun = [1, helpers.IMAGE, *range(30, 48)]
        rows = [[0, *begun, 5], [*begun, 6, 7]] * 2
        inputs = {
            "input_ids": np.array(rows),
            "attention_mask": (np.array(rows) > 0) * 1,
            "pixel_values": np.ones((4, 3)),
        }
        found = self.share(inputs)
        assert found is not None
        assert found.picture.tolist() == [0, 0, 0, 0]
        # 20 tokens in common are rounded up to 32, the one or two that remain to 16.
        assert found.prefix["input_ids"].tolist() == [[0] * 12 + begun]
        assert found.prefix["attention_mask"].sum() == 20
        assert found.prefix["pixel_values"].shape == (1, 3)
        assert found.tokens[:2, -3:].tolist() == [[0, 0, 5], [0, 6, 7]]
        assert found.kinds[:2, -3:].tolist() == [[-1, -1, 2], [-1, 1, 2]]
        assert found.ordinals[:2, -1].tolist() == [20, 21]
        assert found.columns[:2, -2:].tolist() == [[-1, 21], [20, 21]]
        # The 22 positions of the batch are rounded up to 32.
        assert found.order[0].tolist() == [0] * 10 + [0, *range(12, 32), 47]
        assert found.order[1].tolist() == [0] * 10 + [*range(12, 32), 46, 47]

    def test_what_earlier_positions_see_stays_in_the_beginning(self, batch):
        ids = batch["input_ids"]
        pictures = np.where(ids == helpers.IMAGE, 0, -1)
        assert self.share(batch, pictures) is not None
        assert self.share(batch, np.zeros_like(ids)) is None  # as in a prefix language model

    def test_pictures_that_differ_in_one_number(self, batch):
        assert self.share(batch) is not None
        changed = {**batch, "pixel_values": batch["pixel_values"].copy()}
        changed["pixel_values"][[0, 2], 0, 0, 0] += 1e-3
        found = self.share(changed)
        assert found is not None
        assert len(set(found.picture)) == 4
        changed["pixel_values"][[3, 4], 0, 0, 0] += 2e-3
        assert self.share(changed) is None  # more than half of the rows begin on their own

    def test_copies_that_fill_a_batch(self, batch):
        kept = [0, 1, *[0] * (len(QUESTIONS) - 2)]
        assert self.share({name: x[kept] for name, x in batch.items()}) is None

    def test_tokens_before_the_picture_that_differ(self, batch):
        ids = batch["input_ids"].copy()
        first = (batch["attention_mask"] == 1).argmax(1)
        ids[np.arange(len(ids)), first + 1] = np.arange(30, 30 + len(ids))
        assert self.share({**batch, "input_ids": ids}) is None

    def test_rows_without_a_picture_or_with_unlike_numbers(self, batch):
        text = {name: batch[name] for name in ("input_ids", "attention_mask")}
        assert self.share(text) is None
        uneven = helpers.make_inputs([2, 0, 1, 1], [20, 20, 20, 20])
        assert self.share(uneven) is None

    def test_edits_of_single_rows_are_not_shared(self, small, batch, monkeypatch):
        width = small.vlm.site_shapes[LAYER][-1]
        rows = np.random.default_rng(0).standard_normal((len(QUESTIONS), width), np.float32)
        strengths = np.linspace(0, 3, len(rows))
        changed = ports.add(rows), ports.add(rows[0], strengths), ports.edit_with(lambda x: x)
        assert list(map(is_same_for_rows, changed)) == [False] * 3
        assert is_same_for_rows(ports.add(rows[0]))
        monkeypatch.setattr(common_prefix, "share", lambda *_: pytest.fail("divided"))
        small.vlm.generate(batch, max_new_tokens=2, edits={LAYER: changed[1]})
