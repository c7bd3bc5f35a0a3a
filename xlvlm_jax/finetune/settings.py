"""How a model is fine-tuned, and the optimizer that follows from it."""

import dataclasses

import jax
import optax

METHODS = ("lora", "full")
SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a model is fine-tuned.

    Attributes:
        method: "lora" (Hu et al. 2021: factors beside frozen kernels) or "full" (all parameters).
        rank, alpha: of LoRA; the factors' product counts alpha / rank.
        targets: of LoRA, regular expressions for the names of linear layers, or for the end of the
            names; none: all of the decoder's, without the language-model head.
        steps: updates of the parameters; None: as many as `epochs` take.
        epochs: how often each sample is seen, if `steps` is None.
        batch_size: samples that pass through the model together.
        accumulate: batches an update; their gradients are added up.
        rate: the highest learning rate.
        schedule: how it decays after the warm-up: "cosine" or "linear" to zero, or "constant".
        warmup: the share of the steps in which the rate rises from zero.
        weight_decay: of AdamW (Loshchilov and Hutter 2019), on matrices alone.
        clip: the largest global norm of a gradient.
        seed: of the factors, the order of the samples and the choice among their references.

    Raises ValueError for a value that can't be.
    """

    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 16
    accumulate: int = 1
    rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("method", METHODS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        for name in ("rank", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        for name in ("alpha", "epochs", "rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1 or not self.weight_decay >= 0:
            raise ValueError(
                f"warmup must be a share of the steps, 0 to 1, and weight_decay at least 0; got "
                f"{self.warmup} and {self.weight_decay}"
            )
        if self.method == "full" and self.targets:
            raise ValueError("targets are for LoRA; the method 'full' trains all parameters")

    def num_steps(self, num_samples: int) -> int:
        """Updates in all."""
        if self.steps is not None:
            return self.steps
        return max(1, round(self.epochs * num_samples / (self.batch_size * self.accumulate)))

    def learning_rate(self, num_steps: int) -> optax.Schedule:
        """Step -> learning rate."""
        warmup = round(self.warmup * num_steps)
        rest = max(1, num_steps - warmup)
        decay = {
            "cosine": optax.cosine_decay_schedule(self.rate, rest),
            "linear": optax.linear_schedule(self.rate, 0.0, rest),
            "constant": optax.constant_schedule(self.rate),
        }[self.schedule]
        # The first update is not to be lost to a rate of zero.
        rise = optax.linear_schedule(self.rate / (warmup + 1), self.rate, warmup)
        return optax.join_schedules([rise, decay], [warmup]) if warmup else decay

    def optimizer(self, num_steps: int) -> optax.GradientTransformation:
        """AdamW with clipping and the schedule."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(
                self.learning_rate(num_steps),
                weight_decay=self.weight_decay,
                mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
            ),
        )
