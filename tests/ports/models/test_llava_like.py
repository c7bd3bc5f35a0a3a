"""Names of checkpoints with LLaVA's layout, and the cells of their pictures."""

import types

import numpy as np
import pytest

from ports.models import llava_like


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            "language_model.model.layers.3.mlp.up_proj.weight",
            "model.language_model.layers.3.mlp.up_proj.weight",
            "model.language_model.model.layers.3.mlp.up_proj.weight",
        ],
    )
    def test_of_the_decoder(self, name):
        expected = "language_model.model.layers.3.mlp.up_proj.weight"
        assert llava_like.canonical_name(name) == expected

    @pytest.mark.parametrize("prefix", ["vision_tower.", "model.vision_tower."])
    @pytest.mark.parametrize("level", ["", "vision_model."])
    def test_of_the_vision_tower(self, prefix, level):
        name = f"{prefix}{level}post_layernorm.bias"
        assert llava_like.canonical_name(name) == "vision_tower.vision_model.post_layernorm.bias"

    def test_of_the_head_and_the_projector(self):
        head = "language_model.lm_head.weight"
        assert llava_like.canonical_name("lm_head.weight") == head
        assert llava_like.canonical_name(head) == head
        projector = "multi_modal_projector.linear_1.bias"
        assert llava_like.canonical_name(f"model.{projector}") == projector

    @pytest.mark.parametrize("prefix", ["vision_tower.", "model.vision_tower."])
    def test_of_pixtrals_tower(self, prefix):
        for name in ("patch_conv.weight", "transformer.layers.1.attention.q_proj.weight"):
            assert llava_like.canonical_name(prefix + name) == f"vision_tower.{name}"

    def test_of_what_is_not_used_are_left_out(self):
        for name in (
            "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
            "vision_tower.vision_model.embeddings.position_ids",
            "vision_tower.vision_model.head.probe",
            "model.vision_tower.head.mlp.fc1.weight",
        ):
            assert llava_like.canonical_name(name) is None

    @pytest.mark.parametrize(
        ("hub", "today"),
        [
            ("language_model.model.layers.3.mlp", "model.language_model.layers.3.mlp"),
            ("language_model.lm_head.weight", "lm_head.weight"),
            ("vision_tower.vision_model.encoder.layers.0", "model.vision_tower.encoder.layers.0"),
            (
                "vision_tower.transformer.layers.0.ffn_norm",
                "model.vision_tower.transformer.layers.0.ffn_norm",
            ),
            ("multi_modal_projector.linear.bias", "model.multi_modal_projector.linear.bias"),
        ],
    )
    def test_of_transformers_and_back(self, hub, today):
        assert llava_like.transformers_name(hub) == today
        assert llava_like.canonical_name(today) == hub


@pytest.mark.parametrize(("tokens", "first"), [(4, 1), (5, 2), (3, -1)])
def test_cells_with_a_class_position_or_without_the_first_patch(tokens, first):
    vision = types.SimpleNamespace(side=2, patch_size=14, image_size=30)
    config = types.SimpleNamespace(tokens_per_image=tokens, image_tokens=(9,), vision=vision)
    ids = np.array([[0, *[9] * tokens, 0]])
    ((layout,),) = llava_like.patch_layout(config, {"input_ids": ids}, lambda: None)
    assert layout.positions[0, 0] == first
    assert layout.positions[1].tolist() == [tokens - 1, tokens]
    # The patches leave out 2 of 30 pixels at the right and at the bottom.
    np.testing.assert_allclose(layout.boxes[1, 0], [0, 14 / 30, 14 / 30, 28 / 30])
