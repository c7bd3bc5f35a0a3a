"""Settings of fine-tuning, and the optimizer made from them."""

import dataclasses
from collections.abc import Sequence

import jax
import optax

METHODS = ("lora", "full")
SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """Settings of fine-tuning.

    Attributes:
        method: "lora" (Hu et al. 2021: low-rank factors beside frozen kernels) or "full" (all
            parameters).
        rank, alpha: rank of LoRA; the product of the factors is scaled by alpha / rank.
        targets: regular expressions for the names, or ends of names, of the linear layers that LoRA
            adapts; empty for all of the decoder except the language-model head.
        steps: number of updates; None for as many as `epochs` take.
        epochs: passes over the samples, if `steps` is None.
        batch_size: samples per batch.
        accumulate: batches per update; their gradients are added up.
        rate: peak learning rate.
        schedule: decay after the warm-up: "cosine" or "linear" to zero, or "constant".
        warmup: share of the steps in which the rate rises from zero.
        weight_decay: weight decay of AdamW (Loshchilov and Hutter 2019), on matrices only.
        clip: maximum global norm of the gradient.
        seed: random seed of the factors, the order of samples and the choice of references.
        recompute: keep only the states between the decoder's layers for gradients and compute
            what is inside of them again: less memory, a third more time, the same results. None:
            on accelerators.

    Raises:
        ValueError: a value is out of range.
    """

    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] = ()
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
    recompute: bool | None = None

    def __post_init__(self) -> None:
        for name, choices in (("method", METHODS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        if isinstance(self.targets, str):
            raise ValueError(
                f"targets are the text {self.targets!r}; expected several patterns, such as "
                f"[{self.targets!r}]"
            )
        # Settings are hashed, as a static argument of compiled functions.
        object.__setattr__(self, "targets", tuple(self.targets))
        for name in ("rank", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        for name in ("alpha", "epochs", "rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1 or not self.weight_decay >= 0:
            raise ValueError(
                f"warmup must be between 0 and 1 and weight_decay at least 0; got "
                f"{self.warmup} and {self.weight_decay}"
            )
        if self.method == "full" and self.targets:
            raise ValueError(
                f"targets are {self.targets}, but method 'full' trains all parameters; leave them "
                "out or use method 'lora'"
            )

    @property
    def recomputes(self) -> bool:
        """Whether layers are computed again for gradients, on this backend."""
        return jax.default_backend() != "cpu" if self.recompute is None else self.recompute

    def num_steps(self, num_samples: int) -> int:
        """Returns the total number of updates."""
        if self.steps is not None:
            return self.steps
        return max(1, round(self.epochs * num_samples / (self.batch_size * self.accumulate)))

    def learning_rate(self, num_steps: int) -> optax.Schedule:
        """Returns the schedule: step -> learning rate."""
        warmup = round(self.warmup * num_steps)
        rest = max(1, num_steps - warmup)
        decay = {
            "cosine": optax.cosine_decay_schedule(self.rate, rest),
            "linear": optax.linear_schedule(self.rate, 0.0, rest),
            "constant": optax.constant_schedule(self.rate),
        }[self.schedule]
        # Starts above zero, so that the first update is not wasted.
        rise = optax.linear_schedule(self.rate / (warmup + 1), self.rate, warmup)
        return optax.join_schedules([rise, decay], [warmup]) if warmup else decay

    def optimizer(self, num_steps: int) -> optax.GradientTransformation:
        """Returns AdamW with clipping and the learning-rate schedule."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(
                self.learning_rate(num_steps),
                weight_decay=self.weight_decay,
                mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
            ),
        )
