"""A small random Llama with the words of a judge."""

import json

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = "<pad> <s> </s> <unk> \n\n safe unsafe S1 S2 S10 , how to do it sure no [user] [assistant]"
TEMPLATE = (
    "<s> {% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
WIDTH, INNER, HEADS = 32, 48, 4


def write_judge(directory):
    """Writes the checkpoint, with half as many key-value heads as heads; returns its tokenizer."""
    words = WORDS.split(" ")
    tokenizer = Tokenizer(models.WordLevel({x: i for i, x in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(words),
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (WIDTH // 2, WIDTH),
        "self_attn.v_proj": (WIDTH // 2, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }
    rng = np.random.default_rng(3)
    tensors = {"model.embed_tokens": rng.normal(0, 0.3, (len(words), WIDTH))}
    for i in range(2):
        for name, shape in shapes.items():
            tensors[f"model.layers.{i}.{name}"] = rng.normal(0, 0.3, shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}"] = np.ones(WIDTH)
    tensors["model.norm"] = np.ones(WIDTH)
    named = {f"{name}.weight": x.astype(np.float32) for name, x in tensors.items()}
    safetensors.numpy.save_file(named, directory / "model.safetensors", metadata={"format": "pt"})
    return fast
