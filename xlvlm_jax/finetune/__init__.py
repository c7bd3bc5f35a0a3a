"""Fine-tuning on captions or answers: LoRA or all parameters, by optax, resumable."""

from xlvlm_jax.finetune.run import Summary, finetune
from xlvlm_jax.finetune.settings import Settings

__all__ = ["Settings", "Summary", "finetune"]
