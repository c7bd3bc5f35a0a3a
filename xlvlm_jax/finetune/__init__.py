"""Fine-tunes models on captions or answers: LoRA or all parameters, with optax; resumable."""

from xlvlm_jax.finetune.run import Summary, finetune
from xlvlm_jax.finetune.settings import Settings

__all__ = ["Settings", "Summary", "finetune"]
