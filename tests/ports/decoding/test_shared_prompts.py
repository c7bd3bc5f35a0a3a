"""Several questions about one picture: tokens and states equal those of rows computed apart."""

from collections.abc import Mapping

import numpy as np
import pytest

import ports
from ports.inputs import common_prefix

from .. import helpers, idefics2_helpers, molmo_helpers, qwen2_vl_helpers

LAYER = "language_model.model.layers.0"
KINDS = ("all", "prompt", "generated", "last_prompt", "image", "text")
QUESTIONS = (0, 1, 1, 0, 1, 0, 0, 1)  # the picture of each row
LENGTHS = (3, 1, 7, 4, 2, 5, 1, 3)  # of its question


def ask(inputs: Mapping[str, np.ndarray], pictures=QUESTIONS, seed=5) -> dict[str, np.ndarray]:
    """Returns rows that ask questions about the picture of one of the rows of `inputs` each."""
    random = np.random.default_rng(seed)
    rows = []
    for picture, length in zip(pictures, LENGTHS, strict=True):
        own = inputs["input_ids"][picture][inputs["attention_mask"][picture] == 1]
        rows.append([*own, *random.integers(3, 20, length)])
    length = max(map(len, rows))
    asked = {
        "input_ids": np.array([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": np.array([[0] * (length - len(r)) + [1] * len(r) for r in rows]),
    }
    old = inputs["input_ids"].shape[1] - inputs["attention_mask"].sum(1)
    for name, value in inputs.items():
        if name in (*asked, "mm_token_type_ids"):
            continue
        parts = list(value)
        if "image_grid_thw" in inputs and name == "pixel_values":
            parts = np.split(value, np.cumsum(inputs["image_grid_thw"].prod(1))[:-1])
            asked[name] = np.concatenate([parts[picture] for picture in pictures])
            continue
        asked[name] = np.stack([parts[picture] for picture in pictures])
        if name == "image_input_idx":
            moved = np.array([length - len(row) for row in rows]) - old[list(pictures)]
            places = asked[name]
            asked[name] = np.where(places < 0, places, places + moved[:, None, None])
    return asked


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


def both(vlm, inputs, monkeypatch, method="generate", *args, **options):
    """Returns the results with and without shared beginnings; the first did share."""
    divided = []
    share = common_prefix.share

    def noted(*args):
        divided.append(share(*args))
        return divided[-1]

    monkeypatch.setattr(common_prefix, "share", noted)
    shared = getattr(vlm, method)(inputs, *args, max_new_tokens=4, **options)
    assert divided
    assert divided[-1] is not None
    monkeypatch.setattr(common_prefix, "share", lambda *_: None)
    apart = getattr(vlm, method)(inputs, *args, max_new_tokens=4, **options)
    monkeypatch.undo()
    return shared, apart


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


WHERES = (
    "all",
    "prompt",
    "generated",
    "last_prompt",
    "image",
    "text",
    {"from": 20},
    {"at": [1, 25]},
)


@pytest.mark.parametrize("where", [*KINDS, {"from": 20}, {"at": [1, 25]}], ids=str)
def test_edits_reach_the_same_positions(small, batch, where, monkeypatch):
    vector = np.random.default_rng(1).standard_normal(small.vlm.site_shapes[LAYER][-1])
    edits = {LAYER: ports.add(vector.astype(np.float32), 2.0, where)}
    options = {"edits": edits, "sites": [LAYER], "prompt_states": True}
    shared, apart = both(small.vlm, batch, monkeypatch, **options)
    np.testing.assert_array_equal(shared.tokens, apart.tokens)
    assert helpers.relative_error(shared.states[LAYER], apart.states[LAYER]) < 1e-5
    ours, expected = (x.prompt_states[LAYER] for x in (shared, apart))
    assert helpers.relative_error(ours, expected, batch["attention_mask"] == 1) < 1e-5


@pytest.mark.parametrize("where", ["all", "generated"])
def test_conditions_share_too(small, batch, where, monkeypatch):
    vector = np.random.default_rng(1).standard_normal(small.vlm.site_shapes[LAYER][-1])
    variants = [{LAYER: ports.add(vector.astype(np.float32), a, where)} for a in (0.0, 2.0, 5.0)]
    shared, apart = both(small.vlm, batch, monkeypatch, "sweep", variants, sites=[LAYER])
    np.testing.assert_array_equal(shared.tokens, apart.tokens)
    assert helpers.relative_error(shared.states[LAYER], apart.states[LAYER]) < 1e-5
    for tokens, edits in zip(shared.tokens, variants, strict=True):
        alone = small.vlm.generate(batch, max_new_tokens=4, edits=edits).tokens
        np.testing.assert_array_equal(tokens, alone)


def test_rules_count_the_whole_prompt(small, batch, monkeypatch):
    values = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    shared, apart = both(small.vlm.with_generation_config(values), batch, monkeypatch)
    np.testing.assert_array_equal(shared.tokens, apart.tokens)


class TestShare:
    """What is divided, and what is not."""

    def share(self, inputs, **options):
        return common_prefix.share(inputs, (helpers.IMAGE,), 0, {}, **options)

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
        assert found.index[:2, -1].tolist() == [20, 21]
        assert found.columns[:2, -2:].tolist() == [[-1, 21], [20, 21]]
        assert found.order[0].tolist() == [0, *range(12, 32), 47]
        assert found.order[1].tolist() == [*range(12, 32), 46, 47]

    def test_pictures_that_differ_in_one_number(self, batch):
        assert self.share(batch) is not None
        changed = {**batch, "pixel_values": batch["pixel_values"].copy()}
        changed["pixel_values"][[0, 2], 0, 0, 0] += 1e-3
        found = self.share(changed)
        assert found is not None
        assert len(set(found.picture)) == 4
        changed["pixel_values"][[3, 4], 0, 0, 0] += 2e-3
        assert self.share(changed) is None  # more than half of the rows begin on their own

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
        vlm, width = small.vlm, small.vlm.site_shapes[LAYER][-1]
        monkeypatch.setattr(common_prefix, "share", lambda *_: pytest.fail("divided"))
        rows = np.random.default_rng(0).standard_normal((len(QUESTIONS), width), np.float32)
        strengths = np.linspace(0, 3, len(rows))
        for edit in (ports.add(rows), ports.add(rows[0], strengths), ports.edit_with(lambda x: x)):
            vlm.generate(batch, max_new_tokens=2, edits={LAYER: edit})
