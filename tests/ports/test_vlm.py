"""`ports.load` and `VLM`: what is refused, buckets, the checkpoint's processor, no torch."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from sklearn.datasets import load_sample_images
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import ports
from ports import loading

from . import helpers

PROMPT = "<image> w3 what is in the picture w4"


class TestLoading:
    @pytest.fixture
    def directory(self, tmp_path, small):
        """Returns a copy of a good checkpoint that a test may damage."""
        return shutil.copytree(small.directory, tmp_path / "checkpoint")

    def configure(self, directory, **changes):
        file = directory / "config.json"
        config = json.loads(file.read_text())
        for key, value in changes.items():
            if isinstance(value, dict):
                config[key].update(value)
            else:
                config[key] = value
        file.write_text(json.dumps(config))

    def test_no_directory(self, tmp_path):
        with helpers.raises_line(FileNotFoundError, "no directory", str(tmp_path / "x"), "Hub id"):
            ports.load(tmp_path / "x")

    def test_a_hub_id_that_cannot_be_downloaded(self):
        with helpers.raises_line(FileNotFoundError, "'nobody/nothing' is not a local directory"):
            ports.load("nobody/nothing")

    def test_no_configuration(self, tmp_path):
        with helpers.raises_line(FileNotFoundError, f"{tmp_path} has no config.json"):
            ports.load(tmp_path)

    @pytest.mark.parametrize("text", ["", "[]", "5", "{", "\udcff"])
    def test_a_configuration_that_is_not_a_json_object(self, directory, text):
        (directory / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        with helpers.raises_line(ValueError, "config.json: not a JSON object"):
            ports.load(directory)

    @pytest.mark.parametrize("kind", ["bert", "blip-2", None, 5, ["llava"]])
    def test_a_model_type_without_a_port(self, directory, kind):
        self.configure(directory, model_type=kind)
        with helpers.raises_line(ValueError, f"model_type {kind!r} is not supported"):
            ports.load(directory)

    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"vision_feature_select_strategy": "odd"}, "odd"),
            ({"vision_feature_layer": -9}, "vision_feature_layer is -9"),
            ({"text_config": {"hidden_act": "swoosh"}}, "swoosh"),
            ({"text_config": {"rope_scaling": {"type": "longer", "factor": 2.0}}}, "longer"),
            ({"text_config": {"hidden_size": 61}}, "61"),
            ({"text_config": {"model_type": "gemma"}}, "gemma"),
            ({"text_config": {"model_type": "novel"}}, "novel"),
            ({"vision_config": {"model_type": "dinov2"}}, "dinov2"),
        ],
        ids=str,
    )
    def test_a_configuration_that_is_not_implemented(self, directory, changes, part):
        self.configure(directory, **changes)
        with helpers.raises_line(ValueError, part):
            ports.load(directory)

    @pytest.mark.parametrize(
        "changes",
        [
            {"vision_config": {"image_size": 0}},
            {"vision_config": {"patch_size": 0}},
            {"text_config": {"num_attention_heads": 0}},
            {"text_config": {"num_hidden_layers": 0}},
            {"text_config": {"intermediate_size": -1}},
        ],
        ids=str,
    )
    def test_impossible_sizes(self, directory, changes):
        self.configure(directory, **changes)
        with helpers.raises_line(ValueError, str(directory / "config.json")):
            ports.load(directory)

    def test_an_unknown_dtype(self, directory):
        with helpers.raises_line(ValueError, "dtype is 'int8'", "float32, bfloat16, float16"):
            ports.load(directory, dtype="int8")

    def test_what_does_not_need_the_weights_is_found_before_they_are_read(
        self, small, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(loading, "load_sharded", lambda *_: pytest.fail("read the weights"))
        for name in ("adapter", "processor"):
            with pytest.raises(FileNotFoundError, match="nowhere"):
                ports.load(small.directory, **{name: tmp_path / "nowhere"})
        with pytest.raises(ValueError, match="no_such_value"):
            ports.load(small.directory, generation_config={"no_such_value": 1})

    def test_a_checkpoint_without_processor_still_loads(self, small):
        for what in ("processor", "tokenizer"):
            with helpers.raises_line(ValueError, f"{small.directory}: cannot load the {what}"):
                getattr(small.vlm, what)

    @pytest.mark.parametrize(
        ("generation", "eos", "pad"),
        [
            (None, (7,), 0),
            ({"eos_token_id": 5}, (5,), 0),
            ({"eos_token_id": [5, 6], "pad_token_id": 9}, (5, 6), 9),
            ({"eos_token_id": None}, (), 0),
        ],
        ids=str,
    )
    def test_tokens_that_end_a_row(self, directory, generation, eos, pad):
        self.configure(directory, text_config={"eos_token_id": 7, "pad_token_id": 0})
        file = directory / "generation_config.json"
        file.unlink()
        if generation is not None:
            file.write_text(json.dumps(generation))
        loaded = ports.load(directory)
        assert (loaded.eos_tokens, loaded.pad_token) == (eos, pad)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "generation_config.json: not a JSON object (Expecting"),
            ("[]", "generation_config.json: not a JSON object (a list)"),
            ('{"eos_token_id": ["a"]}', "eos_token_id is 'a'; expected an integer id"),
            ('{"pad_token_id": 0.5}', "pad_token_id is 0.5; expected an integer id"),
        ],
    )
    def test_damaged_tokens_that_end_a_row(self, directory, text, message):
        (directory / "generation_config.json").write_text(text)
        with helpers.raises_line(ValueError, message):
            ports.load(directory)


class TestForward:
    def test_sites_may_be_spelt_as_flax_paths(self, small):
        inputs = helpers.make_inputs([1], [5])
        name = "language_model.model.layers.1"
        spelt = "language_model/model/layers_1"
        states = small.vlm.forward(inputs, sites=[name, "language_model/lm_head"]).states
        assert states["language_model/lm_head"].shape[:2] == inputs["input_ids"].shape
        ours = small.vlm.forward(inputs, sites=[spelt]).states[spelt]
        assert ours.shape == states[name].shape == (*inputs["input_ids"].shape, 60)
        assert helpers.relative_error(ours, states[name]) < 1e-6

    def test_a_pattern_means_the_sites_of_both_towers(self, small):
        states = small.vlm.forward(helpers.make_inputs([1], [5]), sites=["layers.*"]).states
        towers = ("vision_tower.vision_model.encoder", "language_model.model")
        assert list(states) == [f"{tower}.layers.{i}" for tower in towers for i in range(2)]

    def test_one_site_is_not_several(self, small):
        name = "language_model.model.layers.1"
        assert small.vlm.find_site("model.language_model.layers.1") == name
        assert small.vlm.find_site("model.layers.1.self_attn.q_pr*") == (f"{name}.self_attn.q_proj")
        with helpers.raises_line(
            ValueError, "'layers.*' matches 2 sites, language_model.model.lay"
        ):
            small.vlm.find_site("layers.*", generated=True)

    def test_in_generation_a_pattern_means_sites_of_the_decoder(self, small):
        inputs = helpers.make_inputs([1], [5])
        names = [f"language_model.model.layers.{i}" for i in range(2)]
        ours = small.vlm.generate(inputs, max_new_tokens=2, sites=["layers.*"])
        expected = small.vlm.generate(inputs, max_new_tokens=2, sites=names)
        assert list(ours.states) == names
        for name in names:
            np.testing.assert_array_equal(ours.states[name], expected.states[name])

    def test_the_end_of_a_name_is_enough(self, small):
        inputs = helpers.make_inputs([1], [5])
        vector = np.random.default_rng(0).standard_normal(60).astype(np.float32)
        name = "language_model.model.layers.1"
        edits = ({site: ports.add(vector)} for site in ("layers.1", name))
        ours, expected = (
            small.vlm.generate(inputs, max_new_tokens=2, sites=site, edits=edit)
            for site, edit in zip(("layers.1", name), edits, strict=True)
        )
        np.testing.assert_array_equal(ours.states["layers.1"], expected.states[name])
        assert small.vlm.find_sites(["layers/1/mlp", "lm_head"], generated=True) == {
            "layers/1/mlp": f"{name}.mlp",
            "lm_head": "language_model.lm_head",
        }
        # Outside of a generation the vision tower has a layer of that name too.
        states = small.vlm.forward(inputs, sites=["layers.1", name]).states
        assert states["layers.1"] is states[name]
        with helpers.raises_line(ValueError, "no site matches 'encoder.layers.1'; nearest: "):
            small.vlm.forward(inputs, edits={"encoder.layers.1": ports.add(vector)})

    def test_a_layer_that_only_the_vision_tower_has_needs_its_full_name(self, small, tmp_path):
        config = json.loads((small.directory / "config.json").read_text())
        config["vision_config"]["num_hidden_layers"] = 4
        (tmp_path / "config.json").write_text(json.dumps(config))
        vlm = ports.load_abstract(tmp_path)
        tower, decoder = "vision_tower.vision_model.encoder.layers", "language_model.model.layers"
        for name in ("layers.3", "layers.3.mlp"):
            with helpers.raises_line(
                ValueError, f"'{name}' is not one of {decoder}.0", f"if you mean '{tower}.3"
            ):
                vlm.find_sites(name)
        assert vlm.find_sites("layers.1") == {"layers.1": f"{decoder}.1"}
        assert vlm.find_site("encoder.layers.3") == vlm.find_site(f"{tower}.3") == f"{tower}.3"
        # A name that the decoder has with no number at all is the tower's.
        assert vlm.find_site("post_layernorm") == "vision_tower.vision_model.post_layernorm"

    def test_edits_may_be_given_by_pattern_and_by_todays_names(self, small):
        inputs = helpers.make_inputs([1], [5])
        vector = np.random.default_rng(0).standard_normal(60).astype(np.float32)
        names = [f"language_model.model.layers.{i}" for i in range(2)]
        expected = small.vlm.forward(inputs, edits={name: ports.add(vector) for name in names})
        ours = small.vlm.forward(inputs, edits={"layers.*": ports.add(vector)})
        np.testing.assert_array_equal(ours.logits, expected.logits)
        # Two names of one site: both edits are done.
        twice = {name: ports.add(vector) for name in ("language_model.model.norm", "**.norm")}
        expected = small.vlm.forward(inputs, edits={"**.norm": ports.add(vector, 2.0)})
        ours = small.vlm.forward(inputs, edits=twice)
        assert helpers.relative_error(ours.logits, expected.logits) < 1e-6

    def test_states_alone_equal_those_with_logits(self, small):
        inputs = helpers.make_inputs([1], [5])
        site = "language_model.model.layers.0"
        expected = small.vlm.forward(inputs, sites=[site]).states[site]
        alone = small.vlm.states(inputs, sites=[site])[site]
        assert alone.shape == expected.shape
        assert helpers.relative_error(alone, expected) < 1e-6

    def test_the_head_alone(self, small):
        kernel = np.asarray(small.vlm.params["language_model"]["lm_head"]["kernel"])
        x = np.random.default_rng(0).standard_normal((2, 3, 60), np.float32)
        np.testing.assert_allclose(small.vlm.unembed(x), x @ kernel, rtol=0, atol=1e-4)
        np.testing.assert_allclose(small.vlm.unembed(x[0, 0]), x[0, 0] @ kernel, rtol=0, atol=1e-4)

    def test_the_head_of_tied_embeddings(self, llava_pair):
        tied = llava_pair("tied embeddings, class position kept").vlm
        table = np.asarray(tied.params["language_model"]["model"]["embed_tokens"]["embedding"])
        x = np.random.default_rng(0).standard_normal((3, 60), np.float32)
        np.testing.assert_allclose(tied.unembed(x), x @ table.T, rtol=0, atol=1e-4)

    def test_inputs_without_tokens(self, small):
        with helpers.raises_line(ValueError, "no input_ids of shape [batch, positions]"):
            small.vlm.forward({"attention_mask": np.ones((1, 3))})

    def test_a_single_row_without_batch(self, small):
        with helpers.raises_line(ValueError, "no input_ids of shape [batch, positions]"):
            small.vlm.forward({"input_ids": np.ones(3, int)})

    def test_a_mask_of_another_shape(self, small):
        with helpers.raises_line(ValueError, "attention_mask has shape (1, 2)", "(1, 3)"):
            small.vlm.forward(
                {"input_ids": np.ones((1, 3), int), "attention_mask": np.ones((1, 2), int)}
            )


def make_processor(**options) -> transformers.LlavaProcessor:
    """Returns a real processor: CLIP's images at 28 pixels, a tokenizer of whole words."""
    return transformers.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        tokenizer=helpers.make_tokenizer(
            ["what", "is", "in", "the", "picture", "USER", ":"], {"<image>": helpers.IMAGE}
        ),
        patch_size=7,
        num_additional_image_tokens=1,
        **{"vision_feature_select_strategy": "default"} | options,
        chat_template=(
            "{% for m in messages %}USER : {% for part in m.content %}"
            "{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
            "{% if add_generation_prompt %} w0{% endif %}"
        ),
    )


@pytest.fixture(scope="module")
def photographed(tmp_path_factory):
    """Returns a checkpoint with its processor in its directory, as on the hub."""
    directory = tmp_path_factory.mktemp("photographed")
    config = helpers.llava_config(vision={"image_size": 28})
    pair = helpers.make_llava(directory, config)
    make_processor().save_pretrained(directory)
    return pair


@pytest.fixture(scope="module")
def photographs():
    """Returns the two pictures in scikit-learn: uint8[427, 640, 3]."""
    return load_sample_images().images


class TestProcessor:
    @pytest.fixture(scope="class")
    def inputs(self, photographed, photographs):
        return photographed.vlm.processor(
            images=photographs,
            text=[PROMPT, "the picture <image>"],
            padding=True,
            return_tensors="np",
        )

    def test_is_transformers_pil_processor_to_the_bit(self, inputs, photographed, photographs):
        directly = CLIPImageProcessorPil.from_pretrained(photographed.directory)
        expected = directly(photographs, return_tensors="np")["pixel_values"]
        assert inputs["pixel_values"].shape == (2, 3, 28, 28)
        assert np.std(inputs["pixel_values"]) > 0.5
        np.testing.assert_array_equal(inputs["pixel_values"], expected)

    def test_expands_the_image_tokens(self, inputs):
        np.testing.assert_array_equal((inputs["input_ids"] == helpers.IMAGE).sum(1), [16, 16])

    def test_forward_on_photographs_equals_pytorchs(self, inputs, photographed):
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        logits, states = helpers.torch_forward(photographed.torch_model, arrays)
        sites = ["multi_modal_projector", "language_model.model.layers.1"]
        ours = photographed.vlm.forward(inputs, sites=sites)
        assert max(helpers.site_errors(ours.states, states, arrays).values()) < 1e-5
        valid = arrays["attention_mask"] == 1
        np.testing.assert_allclose(np.asarray(ours.logits)[valid], logits[valid], rtol=0, atol=1e-4)

    def test_tokens_on_photographs_equal_pytorchs(self, inputs, photographed):
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        theirs = helpers.torch_generate(photographed.torch_model, arrays, 32).sequences
        ours = photographed.vlm.generate(inputs, max_new_tokens=32)
        new = theirs[:, arrays["input_ids"].shape[1] :]
        np.testing.assert_array_equal(ours.tokens, new)
        texts = photographed.vlm.processor.batch_decode(new, skip_special_tokens=True)
        assert photographed.vlm.decode(ours.tokens) == texts and all(texts)

    def test_no_prompts(self, photographed):
        with helpers.raises_line(ValueError, "got no prompts; expected one or more"):
            photographed.vlm.process([], [])

    def test_decodes_the_tokens_of_a_prompt_without_its_special_ones(self, photographed):
        vlm = photographed.vlm
        ids = vlm.tokenizer("what is in the picture <image>")["input_ids"]
        assert helpers.IMAGE in ids
        assert vlm.decode(ids) == "what is in the picture"
        assert vlm.decode(jnp.array([ids, ids])) == ["what is in the picture"] * 2
        with pytest.raises(ValueError, match=r"token id -1 at \[1\] does not exist"):
            vlm.decode([4, -1])

    def test_renders_a_prompt_in_the_chat_template(self, photographed):
        assert photographed.vlm.render("what is it") == "USER : <image> what is it w0"

    def test_makes_a_batch_of_prompts_with_an_image_each(self, photographed, photographs):
        batch = photographed.vlm.process(["<image> w1", "the <image> w2 w3"], photographs)
        assert {type(value) for value in batch.values()} == {np.ndarray}
        np.testing.assert_array_equal(batch["attention_mask"][:, :3], [[0, 0, 1], [1, 1, 1]])
        photographed.vlm._check(batch)

    @pytest.mark.parametrize("strategy", ["default", "full"])
    @pytest.mark.parametrize(
        "said",
        [
            None,  # 2023: preprocessor_config.json alone
            {"processor_class": "LlavaProcessor"},
            {"patch_size": None, "vision_feature_select_strategy": None},
            {"patch_size": 7, "vision_feature_select_strategy": "as the model's"},  # of 2024
        ],
    )
    def test_old_files_give_the_arrays_of_complete_ones(
        self, tmp_path, photographed, photographs, strategy, said
    ):
        for name in ("complete", "old"):
            shutil.copytree(photographed.directory, tmp_path / name)
            config = json.loads((tmp_path / name / "config.json").read_text())
            config["vision_feature_select_strategy"] = strategy
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        make_processor(vision_feature_select_strategy=strategy).save_pretrained(
            tmp_path / "complete"
        )
        (tmp_path / "old" / "processor_config.json").unlink()
        make_processor().image_processor.save_pretrained(tmp_path / "old")
        if said is not None:
            if said.get("vision_feature_select_strategy"):
                said = {**said, "vision_feature_select_strategy": strategy}
            (tmp_path / "old" / "processor_config.json").write_text(json.dumps(said))
        complete, old = (ports.load(tmp_path / name) for name in ("complete", "old"))
        expected, ours = (
            vlm.process(["<image> w1", "the <image> w2 w3"], photographs) for vlm in (complete, old)
        )
        assert (ours["input_ids"] == helpers.IMAGE).sum() == 2 * (16 + (strategy == "full"))
        assert set(ours) == set(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(ours[name], array)
        if said is None:
            options = {"max_new_tokens": 4, "sites": ["language_model.model.layers.1"]}
            jax.tree.map(
                np.testing.assert_array_equal,
                old.generate(ours, **options),
                complete.generate(expected, **options),
            )

    def changed(self, photographed, tmp_path, **files):
        """Returns a copy of the checkpoint with other texts in files; None leaves one out."""
        directory = shutil.copytree(photographed.directory, tmp_path / "changed")
        for name, text in files.items():
            file = directory / name.replace("__", ".")
            file.unlink(missing_ok=True)
            if text is not None:
                file.write_text(text)
        return ports.load_abstract(directory)

    TEMPLATE = "{% for m in messages %}U {{ m.content[0].type }} <image> {% endfor %}w0"

    def test_a_template_in_tokenizer_config_alone(self, photographed, tmp_path):
        file = photographed.directory / "tokenizer_config.json"
        values = json.loads(file.read_text()) | {"chat_template": self.TEMPLATE}
        files = {"tokenizer_config__json": json.dumps(values), "chat_template__jinja": None}
        vlm = self.changed(photographed, tmp_path, **files)
        assert vlm.render("what is it") == "U image <image> w0"

    def test_a_template_in_chat_template_json(self, photographed, tmp_path):
        files = {
            "chat_template__json": json.dumps({"chat_template": self.TEMPLATE}),
            "chat_template__jinja": None,
        }
        vlm = self.changed(photographed, tmp_path, **files)
        assert vlm.render("what is it") == "U image <image> w0"

    @pytest.mark.parametrize(
        "template",
        [
            "{% for m in messages %}USER: {{ m.content + ' w0' }}{% endfor %}",
            "{% for m in messages %}USER: {{ m.content }} w0{% endfor %}",
            "{% for m in messages %}USER: {% for part in m.content %}"
            "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %} w0{% endfor %}",
        ],
    )
    def test_templates_for_text_alone_get_the_image_as_text(self, photographed, tmp_path, template):
        vlm = self.changed(photographed, tmp_path, chat_template__jinja=template)
        assert vlm.render("what is it") == "USER: <image>\nwhat is it w0"
        assert vlm.render("say <image>") == "USER: <image>\nsay <image> w0"

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{% for m in messages %}", "its chat template fails (TemplateSyntaxError: Unexp"),
            ("{{ raise_exception('no images') }}", "fails (TemplateError: no images)"),
            ("USER w0", "fails (it renders 0 <image> for one image); replace it"),
        ],
    )
    def test_templates_that_fail(self, photographed, tmp_path, template, message):
        vlm = self.changed(photographed, tmp_path, chat_template__jinja=template)
        with helpers.raises_line(ValueError, message, str(vlm.directory)):
            vlm.render("what is it")

    def test_a_tokenizer_with_another_image_token(self, photographed, tmp_path):
        values = json.loads((photographed.directory / "config.json").read_text())
        values["image_token_index"] = 95
        vlm = self.changed(photographed, tmp_path, config__json=json.dumps(values))
        with helpers.raises_line(
            ValueError, "'<image>' has id 101 in the tokenizer, but config.json says 95; use files"
        ):
            _ = vlm.processor

    def test_a_sentencepiece_model_alone_names_the_packages_it_needs(self, photographed, tmp_path):
        files = {"tokenizer__json": None, "tokenizer__model": "a model"}
        vlm = self.changed(photographed, tmp_path, **files)
        for what in ("tokenizer", "processor"):
            with helpers.raises_line(
                ValueError, f"cannot load the {what}", "needs sentencepiece and protobuf"
            ):
                getattr(vlm, what)

    def test_the_tokenizer_alone(self, photographed):
        assert photographed.vlm.tokenizer.decode([4, 5, helpers.IMAGE]) == "what is <image>"
        assert photographed.vlm.image_tokens == (helpers.IMAGE,)


WITHOUT_TORCH = """
    import numpy as np
    import ports

    vlm = ports.load(sys.argv[1])
    inputs = vlm.processor(images=[np.load(sys.argv[2])], text=[sys.argv[3]], return_tensors="np")
    print(vlm.generate(inputs, max_new_tokens=4).tokens.tolist())
    assert "torch" not in sys.modules
"""


@pytest.mark.slow
def test_the_core_needs_no_torch(photographed, photographs, tmp_path):
    inputs = photographed.vlm.processor(images=photographs[:1], text=[PROMPT], return_tensors="pt")
    theirs = helpers.torch_generate(
        photographed.torch_model, {name: value.numpy() for name, value in inputs.items()}, 4
    ).sequences[:, inputs["input_ids"].shape[1] :]
    np.save(tmp_path / "photograph.npy", photographs[0])
    printed = helpers.run_python(
        WITHOUT_TORCH, photographed.directory, tmp_path / "photograph.npy", PROMPT
    )
    assert json.loads(printed.splitlines()[-1]) == theirs.tolist()


def test_half_precision_generates(small):
    loaded = ports.load(small.directory, dtype="bfloat16")
    site = "language_model.model.norm"
    out = loaded.generate(helpers.make_inputs([1], [4]), max_new_tokens=3, sites=[site])
    assert out.tokens.shape == (1, 3)
    assert out.states[site].dtype == jnp.bfloat16
