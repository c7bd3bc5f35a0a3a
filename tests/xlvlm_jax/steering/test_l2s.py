"""L2S: its network by hand and against PyTorch, its states against a forward pass."""

import dataclasses
import itertools
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from xlvlm_jax import Features, steering
from xlvlm_jax.data import Sample
from xlvlm_jax.data.images import read_image
from xlvlm_jax.steering import l2s, methods

SITE = "language_model.model.layers.3"
CONTEXT = "language_model.model.layers.1"


@pytest.fixture
def random():
    return np.random.default_rng(0)


class TestNetwork:
    def test_a_linear_map_is_learnt(self, random):
        contexts = 3 + 2 * random.standard_normal((400, 6))
        shifts = contexts @ random.standard_normal((6, 6))
        *_, figures = l2s.fit_network(contexts, shifts, rate=5e-3)
        assert figures["unexplained"] < 0.02
        assert figures["unexplained by the mean"] > 0.2

    def test_what_is_the_same_for_all_is_kept(self, random):
        contexts = random.standard_normal((50, 4))
        shifts = np.tile([1.0, -2.0, 0.0, 4.0], (50, 1))
        *network, _ = l2s.fit_network(contexts, shifts, epochs=5)
        given = l2s.L2S(*network, CONTEXT, SITE).shift(random.standard_normal((3, 4)))
        np.testing.assert_allclose(given, shifts[:3], atol=0.5)

    def test_many_rows_with_an_offset_keep_their_statistics(self, random):
        contexts = (random.standard_normal((400_000, 2)) + 1e4).astype(np.float32)
        shifts = (random.standard_normal((400_000, 2)) + 100).astype(np.float32)
        _, mean, deviation, scale, figures = l2s.fit_network(contexts, shifts, hidden=2, epochs=0)
        # Of most of the rows: to what a sample of them varies by.
        np.testing.assert_allclose(mean, contexts.mean(0, dtype=np.float64), atol=5e-3)
        np.testing.assert_allclose(deviation, [1, 1], atol=5e-3)
        np.testing.assert_allclose(scale, np.sqrt(100**2 + 1), rtol=1e-4)
        # Of the square, all but the variance is that of the mean.
        np.testing.assert_allclose(figures["unexplained by the mean"], 1 / (100**2 + 1), rtol=0.02)

    def test_a_coordinate_that_is_the_same_in_training_does_not_drown_the_others(self, random):
        contexts = random.standard_normal((40, 5)).astype(np.float32)
        contexts[:, 2] = 0.25
        shifts = contexts @ random.standard_normal((5, 5))
        *network, _ = l2s.fit_network(contexts, shifts, epochs=20)
        learnt = l2s.L2S(*network, CONTEXT, SITE)
        assert learnt.deviation.min() > 0.5
        other = contexts.copy()
        other[:, 2] += 1e-3
        np.testing.assert_allclose(learnt.shift(other), learnt.shift(contexts), atol=0.01)
        # The same everywhere: there is nothing to scale by.
        _, _, deviation, _, _ = l2s.fit_network(np.ones((5, 2)), np.ones((5, 2)), epochs=0)
        np.testing.assert_array_equal(deviation, [1, 1])

    def test_pytorch_computes_the_same(self, random):
        contexts, shifts = random.standard_normal((2, 40, 5)).astype(np.float32)
        params, mean, deviation, scale, _ = l2s.fit_network(contexts, shifts, hidden=7, epochs=3)
        peer = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 5))
        with torch.no_grad():
            for layer, name in ((peer[0], "hidden"), (peer[2], "shift")):
                layer.weight.copy_(torch.tensor(params[name]["kernel"].T))
                layer.bias.copy_(torch.tensor(params[name]["bias"]))
            theirs = scale * peer(torch.tensor((contexts - mean) / deviation))
        ours = l2s.L2S(params, mean, deviation, scale, CONTEXT, SITE).shift(contexts)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)

    def test_the_best_epoch_before_an_error_that_is_not_finite_is_kept(self, random, monkeypatch):
        contexts = random.standard_normal((40, 5)).astype(np.float32)
        shifts = contexts @ random.standard_normal((5, 5)).astype(np.float32)
        options = {"rows_per_step": 32, "rate": 1e-2}
        expected, *_ = l2s.fit_network(contexts, shifts, epochs=4, **options)
        update, steps = l2s._update, []

        def overflowing(*args):
            params, moments = update(*args)
            steps.append(None)
            return jax.tree.map(lambda x: x * (1 if len(steps) < 5 else np.nan), params), moments

        monkeypatch.setattr(l2s, "_update", overflowing)
        with pytest.warns(UserWarning, match=r"after epoch 5, the error .* is nan; .* 4 is kept"):
            params, *_, figures = l2s.fit_network(contexts, shifts, **options)
        assert figures["best epoch"] == 4 and np.isfinite(figures["unexplained"])
        np.testing.assert_array_equal(params["shift"]["bias"], expected["shift"]["bias"])

    @pytest.mark.wrong_types
    def test_messages(self):
        with pytest.raises(ValueError, match=r"shapes \(3, 4\) and \(2, 4\)"):
            l2s.fit_network(np.ones((3, 4)), np.ones((2, 4)))
        rows = np.ones((4, 2))
        with pytest.raises(
            ValueError, match="three rows or more: one to hold out and two to train"
        ):
            l2s.fit_network(rows[:2], rows[:2])
        for share in (0.0, 1.5):
            with pytest.raises(
                ValueError, match=f"validation is {share}; expected a share between"
            ):
                l2s.fit_network(rows, rows, validation=share)
        for name in ("hidden", "rows_per_step", "patience"):
            with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
                l2s.fit_network(rows, rows, **{name: 0})
        with pytest.raises(ValueError, match="epochs is -1; expected at least 0"):
            l2s.fit_network(rows, rows, epochs=-1)
        with pytest.raises(FloatingPointError, match="the shifts have entries that are not finite"):
            l2s.fit_network(rows, rows * np.inf)
        with pytest.raises(FloatingPointError, match=r"after epoch 1, the error .* is nan; lower"):
            l2s.fit_network(rows * [[0], [1], [2], [3]], rows, rate=1e38)


def test_the_last_token_by_hand():
    states = np.arange(12.0).reshape(2, 3, 2)
    mask = np.array([[0, 1, 1], [1, 1, 0]])
    np.testing.assert_array_equal(l2s.last_states(states, mask), [[4, 5], [8, 9]])


class TestModel:
    @pytest.fixture(scope="class")
    def fitted(self, vlm, questions):
        """Returns L2S fitted to change yes to the answer of another question; the rest stays."""
        prompts = [sample.prompt for sample in questions]
        positive = prompts[12:] + prompts[12:]
        return steering.fit_l2s(
            vlm,
            questions,
            positive,
            prompts,
            SITE,
            context_site=CONTEXT,
            contrast="prompt",
            epochs=3,
        )

    def test_shifts_are_differences_of_states(self, vlm, questions):
        ours = l2s.last_token_states(vlm, questions[:2], [SITE], ["a dog", "no"])[SITE]
        # Each row by itself, without padding.
        for row, completion in enumerate(("a dog", "no")):
            text = f"{vlm.render(questions[row].prompt)} {completion}"
            inputs = vlm.process([text], [read_image(questions[row].image)])
            expected = vlm.states(inputs, sites=[SITE])[SITE][0, -1]
            np.testing.assert_allclose(ours[row], expected, rtol=1e-3, atol=1e-4)

    def test_each_row_has_its_shift_on_either_side_of_padding(self, vlm, questions, fitted):
        group = [questions[0], questions[-1]]
        inputs = vlm.process(
            [vlm.render(sample.prompt) for sample in group], [read_image(s.image) for s in group]
        )
        contexts = vlm.states(inputs, sites=[CONTEXT])[CONTEXT][:, -1]
        expected = fitted.shift(contexts)
        assert np.abs(expected[0] - expected[1]).max() > 1e-3
        edit = fitted.edits_for(vlm, inputs, 0.5, where="last_prompt")[SITE]
        np.testing.assert_allclose(edit.vector, expected, rtol=1e-4, atol=1e-5)
        assert float(edit.alpha) == 0.5

    def test_comes_back_as_it_was(self, vlm, fitted, tmp_path):
        fitted.save(tmp_path / "l2s.safetensors")
        loaded = steering.load(tmp_path / "l2s.safetensors")
        contexts = np.random.default_rng(0).standard_normal((3, 192))
        np.testing.assert_array_equal(loaded.shift(contexts), fitted.shift(contexts))
        assert (loaded.context_site, loaded.site) == (CONTEXT, SITE)
        assert (loaded.source, loaded.where) == (fitted.source, "all")
        assert loaded.source["shifted samples"] == 12
        assert loaded.source["fingerprint"]

    def test_the_network_reads_the_context_and_the_states_answer_the_prompt(self, vlm, questions):
        """Shifts from the questions, contexts from another prompt, each by itself."""
        few = questions[:3]
        given = {"context_site": CONTEXT, "epochs": 0, "validation": 0.4, "seed": 1}
        answers = (["a dog", "no", "no"], ["no", "a dog", "a dog"])
        contexts = ["Describe the image in detail."] * 3
        apart = steering.fit_l2s(vlm, few, *answers, SITE, contexts=contexts, **given)
        plain = steering.fit_l2s(vlm, few, *answers, SITE, **given)
        # The shifts are the same, so their size is; two rows are left to the mean of the contexts.
        assert apart.scale == plain.scale
        states = [
            np.asarray(
                vlm.states(
                    vlm.process([vlm.render(contexts[0])], [read_image(sample.image)]),
                    sites=[CONTEXT],
                )[CONTEXT][0, -1]
            )
            for sample in few
        ]
        means = [(a + b) / 2 for a, b in itertools.combinations(states, 2)]
        nearest = min(np.abs(apart.mean - mean).max() for mean in means)
        assert nearest < 1e-3 < min(np.abs(plain.mean - mean).max() for mean in means)
        with pytest.raises(ValueError, match="there are 1 contexts for 3 samples; expected one ea"):
            steering.fit_l2s(vlm, few, *answers, SITE, contexts=["?"])

    def test_a_sample_whose_counterpart_is_refused_is_left_out(self, vlm, questions, fitted):
        prompts = [sample.prompt for sample in questions]
        positive = prompts[12:] + prompts[12:]
        positive[3] = "is <image> a dog ?"
        options = {"context_site": CONTEXT, "contrast": "prompt", "epochs": 3}
        odd = steering.fit_l2s(vlm, questions, positive, prompts, SITE, **options)
        assert list(odd.source["skipped"]) == [questions[3].id]
        assert (odd.source["samples"], odd.source["shifted samples"]) == (23, 11)
        kept = [i for i in range(24) if i != 3]
        pick = [[given[i] for i in kept] for given in (questions, positive, prompts)]
        expected = steering.fit_l2s(vlm, *pick, SITE, **options)
        np.testing.assert_allclose(odd.mean, expected.mean, rtol=1e-3, atol=1e-4)
        with pytest.raises(ValueError, match=f"sample {questions[3].id}: .* refuses it"):
            steering.fit_l2s(vlm, questions, positive, prompts, SITE, strict=True, **options)

    def test_messages(self, vlm, questions):
        some, texts = questions[:3], ["a"] * 3
        with pytest.raises(ValueError, match="1 positive and 3 negative counterparts of 3 samples"):
            steering.fit_l2s(vlm, some, ["a"], texts, SITE)
        with pytest.raises(ValueError, match="contrast is 'image'; expected completion or prompt"):
            steering.fit_l2s(vlm, some, texts, texts, SITE, contrast="image")
        with pytest.raises(ValueError, match=r"no site matches 'layers\.30'"):
            steering.fit_l2s(vlm, some, texts, texts, "layers.30")
        # Before the model runs, which refuses neither.
        with pytest.raises(ValueError, match="there are 2 samples; expected three or more, one to"):
            steering.fit_l2s(vlm, some[:2], texts[:2], texts[:2], SITE)
        with pytest.raises(ValueError, match="rows_per_step is 0; expected at least 1"):
            steering.fit_l2s(vlm, some, texts, texts, SITE, rows_per_step=0)
        with pytest.raises(ValueError, match=r"rate is -0\.1; expected a positive number"):
            steering.fit_l2s(vlm, some, texts, texts, SITE, rate=-0.1)
        with pytest.raises(TypeError, match=r"^fit_network\(\) got an unexpected .* 'steps'"):
            steering.fit_l2s(vlm, some, texts, texts, SITE, steps=3)
        with pytest.raises(ValueError, match=r"sample \d+ is empty"):
            l2s.last_token_states(vlm, questions[:1], [SITE], [" "])

    def test_a_sample_whose_state_is_not_finite_is_left_out(
        self, vlm, questions, fitted, monkeypatch
    ):
        states = type(vlm).states

        def overflowing(self, *args, **options):
            found = states(self, *args, **options)
            return {site: given.at[1, -1, 0].set(np.inf) for site, given in found.items()}

        monkeypatch.setattr(type(vlm), "states", overflowing)
        told = rf"the states of sample {questions[1].id} at .*layers\.3' are not finite; load the"
        given = vlm, questions[:3], ["yes"] * 3, ["no"] * 3, SITE
        found = steering.fit_p2s(*given)
        assert found.ids == (questions[0].id, questions[2].id) and np.isfinite(found.vectors).all()
        assert re.match(told, found.source["skipped"][questions[1].id])
        with pytest.raises(FloatingPointError, match=told):
            steering.fit_p2s(*given, strict=True)
        with pytest.raises(
            ValueError, match="none of 1 samples can be processed; the first: the s"
        ):
            monkeypatch.setattr(
                type(vlm),
                "states",
                lambda *args, **options: {
                    site: x * np.inf for site, x in states(*args, **options).items()
                },
            )
            steering.fit_p2s(vlm, questions[:1], ["yes"], ["no"], SITE)


def test_prompts_of_contexts_are_made_before_a_model_is_loaded(monkeypatch):
    asked = Sample("1", Path("a.jpg"), "1", "own", (), {"question": "A dog?"})
    samples = [asked]
    monkeypatch.setattr(
        methods, "_counterparts", lambda _: methods.Examples(samples, ["no"], ["yes"], 1, ["own"])
    )
    examples = methods.method_named("l2s").examples
    assert examples is not None

    def contexts(prompt):
        features = Features.__new__(Features)  # not read
        return examples(
            methods.Request(features, SITE, options={"context_prompt": prompt})
        ).contexts

    assert contexts(None) == ["own"] and contexts("{question} Why?") == ["A dog? Why?"]
    samples.append(dataclasses.replace(asked, id="2", metadata={}))
    with pytest.raises(ValueError, match="sample 2 has no question to put into the prompt"):
        contexts("{question} Why?")
