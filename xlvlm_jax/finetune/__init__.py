"""Fine-tunes models on captions or answers: LoRA or all parameters, with optax; resumable."""

from xlvlm_jax.finetune.run import FinetuneSummary, finetune
from xlvlm_jax.finetune.settings import FinetuneSettings

# Their names in version 0.1.
Settings, Summary = FinetuneSettings, FinetuneSummary

__all__ = ["FinetuneSettings", "FinetuneSummary", "Settings", "Summary", "finetune"]
