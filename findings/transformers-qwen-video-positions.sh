#!/usr/bin/env bash
# transformers 5.24.0: in Qwen2-VL, text after a video gets rotary positions that lie inside the video.
#
# Qwen2-VL numbers patches by time, row and column. In transformers 4.57.6 it goes on after the largest of
# the three: text after a video of more frames than rows and columns begins after its last frame. One would guess that a release which runs the same checkpoints keeps their
# positions. In 5.24.0 the text goes on after the rows and columns alone, so that its positions repeat those
# of later frames: the longer the video, the more of its frames lie at or after the question about it.
#
# Output seen (six frames of 2 x 2 patches, the first at 2; positions in time of the patches' last frame, and
# of the three tokens that follow):
#   4.57.6: frames 2 to 7, text 8 9 10
#   5.24.0: frames 2 to 7, text 4 5 6
set -euo pipefail
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
cat > "$directory/run.py" <<'PYTHON'
import torch
import transformers
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

FRAMES, VIDEO = 6, 61
rope = {"mrope_section": [2, 3, 3]}
text = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rope},  # transformers 5
    "rope_scaling": {"type": "mrope", **rope},  # transformers 4
}
config = Qwen2VLConfig(
    text_config=text,
    vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
    image_token_id=60,
    video_token_id=VIDEO,
    vision_start_token_id=62,
    vision_end_token_id=63,
)
model = Qwen2VLForConditionalGeneration(config).model
# Patches are merged two by two, so 4 x 4 of them are 2 x 2 tokens.
tokens = torch.tensor([[5, 62] + [VIDEO] * (FRAMES * 2 * 2) + [63, 7, 8]])
given = {"video_grid_thw": torch.tensor([[FRAMES, 4, 4]]), "attention_mask": torch.ones_like(tokens)}
if transformers.__version__.startswith("5"):
    given["mm_token_type_ids"] = torch.where(tokens == VIDEO, 2, 0)
positions, _ = model.get_rope_index(tokens, **given)
time = positions[0, 0].tolist()
first, last, after = time[2], time[-4], time[-3:]
print(f"{transformers.__version__}: frames {first} to {last}, text", *after)
assert positions[:, 0, -3:].tolist() == [after] * 3  # text has the same position along all axes
assert (first, last) == (2, 7)
assert after == ([4, 5, 6] if transformers.__version__.startswith("5") else [8, 9, 10])
PYTHON
for version in 4.57.6 5.24.0; do
    python3 -m venv "$directory/$version"
    "$directory/$version/bin/pip" install --quiet transformers==$version torch==2.13.0
    HF_HUB_OFFLINE=1 "$directory/$version/bin/python" -W ignore "$directory/run.py" 2> "$directory/errors" || {
        cat "$directory/errors" >&2
        exit 1
    }
done
