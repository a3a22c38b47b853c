"""``SAERecipe``: how to train dictionaries, and the parts of their loss."""

import dataclasses
from typing import NamedTuple

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.configs import check_types
from bilinear_jax.nn.sparse import FORMS
from bilinear_jax.store.fields import COUNT, NOT_NEGATIVE, SEED, Rule, check_fields

FASTEST = "fastest"
"""The value of ``SAERecipe.form`` for which the forms are timed. Two runs may then differ in their last digits."""


class Loss(NamedTuple):
    """The parts of the loss of a dictionary, see ``training.sae_loss``."""

    k_aux: int = 0
    aux_coefficient: float = 1 / 32
    matryoshka: tuple[float, ...] = ()
    bandwidth: float = 0.2


PLAIN = Loss()
"""The loss without its optional parts."""


@dataclasses.dataclass(frozen=True)
class SAERecipe:
    """How to train dictionaries. The learning rate rises over ``warmup`` steps, then falls to ``final_lr``."""

    steps: int  # updates in all
    batch_size: int = 4096  # tokens per update
    lr: float = 1e-4  # largest learning rate of Adam
    final_lr: float = 2e-5  # learning rate at the end
    warmup: int = 0  # steps in which the learning rate rises linearly from 0
    buffer_tokens: int = 65_536  # activations of this many tokens are shuffled together
    rows: int = 32  # windows of n_ctx tokens per forward pass of the language model
    n_ctx: int | None = None  # tokens per window; None: the context of the model
    compute_dtype: str | None = None  # of the model's activations: "float32", "bfloat16"; None: the model's own
    k_aux: int = 0  # dead features that reconstruct the error in the auxiliary loss; 0: no auxiliary loss
    aux_coefficient: float = 1 / 32  # weight of the auxiliary loss
    matryoshka: tuple[float, ...] = ()  # shares of the features, the first ones, that must reconstruct alone too
    sparsity: float = 0.1  # weight of the sparsity loss of jumprelu and relu; with relu and k, its first value
    bandwidth: float = 0.2  # of the threshold's straight-through derivative (jumprelu), in units of the threshold
    frozen_decoder: bool = False  # a control: decoder columns stay as they are at random
    narrow: float = 0.6  # of readable transcoders: share of the steps in which the inputs of a factor fall to reads
    dead_after: int = 1_000_000  # tokens without firing after which a feature counts as dead
    seed: int = 0  # seed of the parameters and of the order of the data
    form: str = "scan"  # of the sparse products: scan, gather, dense, or fastest: timed once, when the run begins

    def __post_init__(self):
        check_types(self)
        check_fields(self, COUNT, "steps", "batch_size", "rows")
        check_fields(self, COUNT._replace(most=10**15), "buffer_tokens", "dead_after")  # memory and int32 allow less
        check_fields(self, NOT_NEGATIVE, "lr", "k_aux", "warmup", "aux_coefficient", "sparsity")
        check_fields(self, Rule("must be above 0 and below 2", lambda width: 0 < width < 2), "bandwidth")
        rising = Rule(
            "must be shares of the features that rise, each above 0 and below 1",
            lambda shares: all(0 < a < b for a, b in zip(shares, (*shares[1:], 1.0), strict=False)),
        )
        check_fields(self, rising, "matryoshka")
        check_fields(self, Rule("must be above 0 and at most 1", lambda share: 0 < share <= 1), "narrow")
        check_fields(self, SEED, "seed")
        if self.n_ctx is not None:
            check_fields(self, Rule("must be at least 2: position 0 is not trained on", lambda n: n >= 2), "n_ctx")
        if self.compute_dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"compute_dtype must be float32, bfloat16 or none; got {self.compute_dtype!r}")
        if not 0 <= self.final_lr <= self.lr:
            raise ValueError(f"final_lr must lie in 0 ... lr ({self.lr}), got {self.final_lr}")
        if self.dead_after + self.batch_size >= 2**31:
            raise ValueError(f"dead_after must be below 2^31 tokens, got {self.dead_after}")
        if self.form not in (*FORMS, FASTEST):
            raise ValueError(f"form is {self.form!r}, but it must be one of {', '.join((*FORMS, FASTEST))}")

    @property
    def loss(self) -> Loss:
        return Loss(self.k_aux, self.aux_coefficient, self.matryoshka, self.bandwidth)


def window(recipe: SAERecipe, lm: LanguageModel) -> int:
    """The tokens of a window. Raises ``ValueError`` if the model's context is shorter."""
    if recipe.n_ctx is not None and recipe.n_ctx > lm.config.n_ctx:
        raise ValueError(f"n_ctx is {recipe.n_ctx}, but the context of the model is {lm.config.n_ctx}: lower it")
    return recipe.n_ctx or lm.config.n_ctx
