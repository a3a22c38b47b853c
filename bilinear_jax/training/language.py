"""The recipe for a language model: next-token cross entropy on windows of a token stream."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilinear_jax.nn.sites import forward
from bilinear_jax.nn.transformer import Transformer, TransformerConfig, token_losses
from bilinear_jax.training.data import Windows
from bilinear_jax.training.fit import ByStep, TrainState, apply_optimizer, cosine_with_warmup, fit, sum_over_rows


@dataclasses.dataclass(frozen=True)
class LanguageRecipe:
    """How to train a language model. Learning rates go linearly up over ``warmup`` steps, then by a cosine to 0."""

    steps: int  # updates in all
    batch_size: int = 16  # windows of n_ctx tokens an update
    matrix_lr: float = 0.02  # Muon's learning rate, for the layers' weight matrices
    embed_lr: float = 1e-2  # Adam's learning rate, for the embeddings and biases
    weight_decay: float = 0.1  # decoupled, on the weight matrices
    warmup: int = 100  # steps
    clip: float = 1.0  # largest global gradient norm
    seed: int = 0  # of the parameters and of the order of the data


def language_optimizer(recipe: LanguageRecipe) -> optax.GradientTransformation:
    """Muon (orthogonalised momentum) on the stacked ``[n_layer, out, inp]`` matrices, Adam on all else."""

    def matrices(params):
        return jax.tree.map(lambda leaf: optax.contrib.MuonDimensionNumbers(2, 1) if leaf.ndim == 3 else None, params)

    rate = cosine_with_warmup(recipe.matrix_lr, recipe.steps, recipe.warmup)
    embed_rate = cosine_with_warmup(recipe.embed_lr, recipe.steps, recipe.warmup)
    muon = optax.contrib.muon(
        rate,
        adam_learning_rate=embed_rate,
        weight_decay=recipe.weight_decay,
        adam_b2=0.95,
        muon_weight_dimension_numbers=matrices,
    )
    return optax.chain(optax.clip_by_global_norm(recipe.clip), muon)


def train_language(
    config: TransformerConfig,
    recipe: LanguageRecipe,
    tokens: np.ndarray,
    held_out: np.ndarray,
    directory: str | Path,
    *,
    save_every: int = 200,
    evaluate_every: int = 200,
):
    """Train a transformer on a flat token stream; returns its params. Resumes from ``directory``.

    ``held_out``: [rows, n_ctx] tokens, whose mean loss in nats per token is logged as ``held_out_loss``.
    """
    optimizer = language_optimizer(recipe)
    windows = Windows(tokens, config.n_ctx, recipe.batch_size, recipe.seed)

    def loss_of(params, batch):
        return jnp.mean(token_losses(forward(config, params, batch), batch))

    def update(state: TrainState, batch):
        loss, gradient = jax.value_and_grad(loss_of)(state.params, batch)
        params, opt_state = apply_optimizer(optimizer, gradient, state)
        metrics = {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, params, opt_state), metrics

    @jax.jit
    def losses(params, batch):
        return jnp.sum(token_losses(forward(config, params, batch), batch))

    def evaluate(state: TrainState) -> dict[str, float]:
        total = sum_over_rows(lambda rows: {"loss": losses(state.params, rows)}, held_out, recipe.batch_size)
        return {"held_out_loss": total["loss"] / (held_out.shape[0] * (held_out.shape[1] - 1))}

    params = Transformer(config).init(jax.random.key(recipe.seed), jnp.zeros((1, config.n_ctx), jnp.int32))["params"]
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    identity = {"model": dataclasses.asdict(config), "recipe": dataclasses.asdict(recipe), "tokens": len(tokens)}
    return fit(
        update,
        state,
        ByStep(windows.batch_at),
        steps=recipe.steps,
        directory=directory,
        config=identity,
        save_every=save_every,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        name="language model",
    ).params
