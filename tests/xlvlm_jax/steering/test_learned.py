"""Learnt shifts on the embedded model reach their target with one compiled program."""

import dataclasses

import numpy as np
import pytest

from xlvlm_jax import steering
from xlvlm_jax.data.images import read_image
from xlvlm_jax.steering import learned

SITE = "language_model.model.layers.6"
OPTIONS = {"batch_size": 8, "evaluate_every": 6, "validation": 0.25}


@pytest.fixture(scope="module")
def targets(questions):
    """Returns targets: yes becomes no, the other answers stay."""
    return ["no"] * 12 + [sample.metadata["answer"] for sample in questions[12:]]


@pytest.fixture(scope="module")
def fitted(vlm, questions, targets):
    return steering.fit_learned(vlm, questions, targets, SITE, steps=24, rate=0.05, **OPTIONS)


def test_the_target_answers_are_given(vlm, questions, targets, fitted):
    inputs = vlm.process(
        [vlm.render(sample.prompt) for sample in questions],
        [read_image(sample.image) for sample in questions],
    )

    def answers(edits):
        tokens = np.asarray(vlm.generate(inputs, max_new_tokens=3, edits=edits).tokens)
        return np.array(
            [t.strip() for t in vlm.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
        )

    plain, steered = answers(fitted.edits(0.0)), answers(fitted.edits_for(vlm, inputs))
    assert (plain[:12] == "yes").sum() >= 11
    assert (steered[:12] == "no").sum() >= 11
    assert (steered == plain)[12:].sum() >= 10


def test_the_best_step_is_kept(fitted):
    looks = fitted.source["history"]
    assert looks[0]["step"] == 0
    best = min(looks, key=lambda look: look["validation"])
    assert fitted.source["best step"] == best["step"] > 0
    assert best["validation"] < looks[0]["validation"] / 2
    assert fitted.source["targets"]["no"] >= 12


def test_a_harmful_shift_is_left_at_zero(vlm, questions):
    """If the model already gives the answer, a large step harms: step 0 stays the best."""
    targets = [sample.metadata["answer"] for sample in questions]
    found = steering.fit_learned(
        vlm, questions, targets, SITE, steps=6, rate=50.0, patience=1, **OPTIONS
    )
    assert found.source["best step"] == 0
    np.testing.assert_array_equal(found.vector, 0)


def test_other_vectors_targets_and_positions_run_the_same_program(vlm, questions, targets, fitted):
    before = learned._update._cache_size()
    others = ["no"] * 24
    for start, where in ((np.ones(192), "all"), (None, "generated"), (None, {"from": 70})):
        steering.fit_learned(
            vlm,
            questions,
            targets if start is None else others,
            SITE,
            start=start,
            where=where,
            steps=1,
            rate=0.05,
            **OPTIONS,
        )
    assert learned._update._cache_size() == before


def test_only_the_named_tokens_are_shifted(vlm, questions, targets, fitted):
    """At an index before the pictures' tokens and after all others, where there is none."""

    def losses(at):
        found = steering.fit_learned(
            vlm,
            questions[:4],
            targets[:4],
            SITE,
            start=np.full(192, 9, np.float32),
            where={"at": at},
            steps=1,
            **OPTIONS,
        )
        assert found.where == {"at": at}
        return found.source["history"][0]["validation"]

    outside = list(range(10_000, 10_120))  # as many indices each, so that they share a program
    beyond, one, everywhere = losses(outside), losses([3, *outside[1:]]), losses([*range(120)])
    unshifted = steering.fit_learned(
        vlm, questions[:4], targets[:4], SITE, steps=1, **OPTIONS
    ).source["history"][0]["validation"]
    assert beyond == pytest.approx(unshifted, rel=1e-5)
    assert abs(one - unshifted) > 1e-4 and abs(everywhere - one) > 1e-4


def test_a_loss_that_is_not_finite_ends_the_run(vlm, questions, targets, fitted):
    odd = np.full(192, np.nan)
    with pytest.raises(FloatingPointError, match="at step 0, the loss is nan; load the model in"):
        steering.fit_learned(vlm, questions, targets, SITE, start=odd, **OPTIONS)
    with pytest.raises(FloatingPointError, match="at step 6, the loss is nan; lower the learning"):
        steering.fit_learned(vlm, questions, targets, SITE, steps=6, rate=1e38, **OPTIONS)


def test_the_best_step_before_a_loss_that_is_not_finite_is_kept(
    vlm, questions, targets, fitted, monkeypatch
):
    update, steps = learned._update, []

    def overflowing(*args, **options):
        learnt, moments, value = update(*args, **options)
        steps.append(None)
        return (learnt if len(steps) < 9 else {"vector": learnt["vector"] * np.nan}), moments, value

    monkeypatch.setattr(learned, "_update", overflowing)
    with pytest.warns(UserWarning, match="at step 12, the loss is not finite; the best step befo"):
        found = steering.fit_learned(vlm, questions, targets, SITE, steps=24, rate=0.05, **OPTIONS)
    assert found.source["best step"] == 6 and len(steps) == 12
    assert [look["step"] for look in found.source["history"]] == [0, 6]
    assert np.isfinite(found.vector).all() and found.vector.any()


def test_the_width_is_that_of_the_site(vlm, questions, targets):
    gate = next(name for name in vlm.sites if name.endswith("layers.6.mlp.gate_proj"))
    width = vlm.site_shapes[gate][-1]
    assert width != 192
    found = steering.fit_learned(vlm, questions[:4], targets[:4], gate, steps=1, **OPTIONS)
    assert found.vector.shape == (width,) and np.any(found.vector)
    with pytest.raises(ValueError, match=rf"start has shape \(192,\); .* have width {width}"):
        steering.fit_learned(vlm, questions, targets, gate, start=np.ones(192))


def test_each_step_is_waited_for(vlm, questions, targets, fitted, waited_for):
    values = waited_for(learned)
    steering.fit_learned(vlm, questions, targets, SITE, steps=3, rate=0.05, **OPTIONS)
    assert [set(learnt) for learnt, *_ in values] == 3 * [{"vector"}]


def test_a_map_of_low_rank(vlm, questions, targets, fitted, tmp_path):
    found = steering.fit_learned(
        vlm, questions, targets, SITE, rank=2, steps=18, rate=0.3, **OPTIONS
    )
    looks = found.source["history"]
    # At first it shifts nothing, as the vector does not.
    assert looks[0]["validation"] == pytest.approx(
        fitted.source["history"][0]["validation"], rel=1e-5
    )
    assert min(look["validation"] for look in looks) < looks[0]["validation"] / 2
    found.save(tmp_path / "map.safetensors")
    loaded = steering.load(tmp_path / "map.safetensors")
    x = np.random.default_rng(0).standard_normal((2, 5, 192)).astype(np.float32)
    expected = x + 2 * x @ found.down.T @ found.up.T
    ours = loaded.edits_for(vlm, None, 2.0)[SITE](x)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    assert loaded.source == found.source


def test_messages(vlm, questions, targets):
    with pytest.raises(ValueError, match=r"1 samples and validation=0\.2"):
        steering.fit_learned(vlm, questions[:1], targets[:1], SITE)
    with pytest.raises(ValueError, match=r"24 samples and validation=1\.0"):
        steering.fit_learned(vlm, questions, targets, SITE, validation=1.0)
    with pytest.raises(ValueError, match=r"weights have shape \(2,\) .*; expected \[24\]"):
        steering.fit_learned(vlm, questions, targets, SITE, weights=[1, 2])
    with pytest.raises(ValueError, match=r"minimum of -1; .* all positive"):
        steering.fit_learned(vlm, questions, targets, SITE, weights=[1] * 23 + [-1])
    with pytest.raises(ValueError, match="rank is 0; expected at least 1"):
        steering.fit_learned(vlm, questions, targets, SITE, rank=0)
    with pytest.raises(ValueError, match="3 answers for 24 samples"):
        steering.fit_learned(vlm, questions, targets[:3], SITE)
    with pytest.raises(ValueError, match="where is a mask"):
        steering.fit_learned(vlm, questions, targets, SITE, where=np.ones((24, 90)))
    with pytest.raises(ValueError, match="where is a mask or has indices for each row"):
        steering.fit_learned(vlm, questions, targets, SITE, where={"at": np.ones((24, 2), int)})
    for name in ("steps", "batch_size", "evaluate_every", "patience"):
        with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
            steering.fit_learned(vlm, questions, targets, SITE, **{name: 0})
    with pytest.raises(ValueError, match=r"rate is nan and penalty 0\.0; expected a positive rate"):
        steering.fit_learned(vlm, questions, targets, SITE, rate=np.nan)
    with pytest.raises(ValueError, match="nothing can be learnt at site"):
        steering.fit_learned(vlm, questions, targets, "multi_modal_projector")


def test_a_refused_sample_is_left_out_with_its_answer(vlm, questions, targets):
    odd = [dataclasses.replace(questions[0], prompt="is <image> a dog ?"), *questions[1:4]]
    wanted = ["three", "no", "no", "no"]
    found = steering.fit_learned(vlm, odd, wanted, SITE, steps=1, **OPTIONS)
    assert list(found.source["skipped"]) == [questions[0].id]
    assert (found.source["samples"], found.source["targets"]) == (3, {"no": 3})
    expected = steering.fit_learned(vlm, odd[1:], wanted[1:], SITE, steps=1, **OPTIONS)
    np.testing.assert_allclose(found.vector, expected.vector, atol=1e-4)
    with pytest.raises(ValueError, match="only one of 2 samples can be processed, expected two"):
        steering.fit_learned(vlm, odd[:2], wanted[:2], SITE, **OPTIONS)
    with pytest.raises(ValueError, match=f"sample {questions[0].id}: .* refuses it"):
        steering.fit_learned(vlm, odd, wanted, SITE, strict=True, **OPTIONS)
