"""Flax Linen ports of vision-language models.

    vlm = ports.load("llava-hf/llava-1.5-7b-hf", dtype="bfloat16")
    inputs = vlm.process([vlm.render("What is in the picture?")], [image])
    answer = vlm.generate(inputs, max_new_tokens=20)

This package does not depend on `xlvlm_jax` and can be used on its own.
"""

from ports import lazy_names, torch_notice

torch_notice.leave_out()
lazy_names.attach(__name__)
