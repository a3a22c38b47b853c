"""Train a bilinear form until it does what its gated model does: distillation.

The loss on a batch of windows of text is

    mean over tokens of KL(softmax(logits) || softmax(logits'))
    + local * mean over layers of  sum |y - y'|^2 / sum |y - mean y|^2

with logits of the gated model and logits' of the form, and with y the output of a gated MLP and y' that of the bilinear
one on the same input, that of the gated model. The first term makes the layers work together; the second keeps each
one true to the MLP that it stands for, which is what its certificate measures. The first updates, ``alone``, have the
second term only: each layer learns its own MLP, which takes a third of the time of an update with both.

The step is Adam's, with a learning rate relative to each weight: ``lr`` times the root mean square that the weights of
a layer had at the start.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from bilinear_jax.language import LanguageModel
from bilinear_jax.measure.bilinear_form import BilinearForm
from bilinear_jax.measure.quadratic import kept, massive, thresholds
from bilinear_jax.nn.architecture import TransformerConfig
from bilinear_jax.nn.attention import model_turns
from bilinear_jax.nn.configs import check_types
from bilinear_jax.nn.transformer import MLP, Layer, embed, run_module, unembed
from bilinear_jax.store.checksums import of_arrays
from bilinear_jax.store.fields import COUNT, NOT_NEGATIVE, SEED, Rule, check_fields
from bilinear_jax.training.batches import batches
from bilinear_jax.training.fit import (
    FitOptions,
    TrainState,
    apply_optimizer,
    cosine_with_warmup,
    fingerprint,
    fit,
)
from bilinear_jax.training.folder import DATA


@dataclasses.dataclass(frozen=True)
class DistilRecipe:
    """How to distil a bilinear form."""

    steps: int  # updates in all
    alone: int = 0  # so many of them, the first, train each layer on its own error only
    batch_size: int = 8  # windows per update
    n_ctx: int = 128  # tokens per window
    lr: float = 3e-3  # largest learning rate, relative to the size of the weights
    lr_alone: float = 1e-2  # the same in the updates ``alone``
    betas: tuple[float, float] = (0.9, 0.98)  # Adam's betas: how much of the two moments is kept at each step
    warmup: int = 5  # steps in which each learning rate rises linearly from 0; then it falls as a cosine
    final: float = 0.05  # learning rate at the end of each, as a fraction of the largest
    local: float = 1.0  # weight of the error of each layer
    compute_dtype: str = "float32"  # of activations, or "bfloat16"; weights, gradients and the optimiser stay float32
    every: int = 2  # the KL is that of every second token (the memory and time of logits); 1: of all
    weights: tuple[str, ...] = ("w_l", "w_r", "w_p", "w_s", "b_r", "b_p")  # of the bilinear MLPs: what is trained
    seed: int = 0  # of the order of the data

    def __post_init__(self):
        check_types(self)
        check_fields(self, COUNT, "steps", "batch_size", "n_ctx", "every")
        check_fields(self, NOT_NEGATIVE, "alone", "lr", "lr_alone", "warmup", "local")
        check_fields(self, Rule("must be at least 0 and below 1", lambda b: all(0 <= x < 1 for x in b)), "betas")
        check_fields(self, Rule("must lie in 0 ... 1", lambda x: 0 <= x <= 1), "final")
        check_fields(self, SEED, "seed")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute_dtype must be float32 or bfloat16; got {self.compute_dtype!r}")
        if self.alone > self.steps:
            raise ValueError(f"alone is {self.alone}, but must be at most steps ({self.steps})")
        known = ("w_l", "w_r", "w_p", "w_s", "b_l", "b_r", "b_p")
        if not self.weights or not set(self.weights) <= set(known):
            raise ValueError(f"weights must be some of {', '.join(known)}; got {self.weights}")
        if self.n_ctx <= self.every:
            raise ValueError(f"n_ctx is {self.n_ctx}, but must be above every ({self.every})")


def distil(
    form: BilinearForm,
    recipe: DistilRecipe,
    tokens: np.ndarray,
    held_out,
    directory: str | Path,
    *,
    token_mask=None,
    certificate: dict[str, Any] | None = None,
    **options: Unpack[FitOptions],
) -> BilinearForm:
    """Train the bilinear MLPs of a form on a text. The same call resumes an interrupted run (see ``fit``).

    Args:
        form: where to start, as ``bilinear_form`` makes it. All its layers are bilinear.
        recipe: how to train it.
        tokens: ``[tokens]``, the training text, one stream.
        held_out: token ids ``[rows, seq]`` that neither the fit nor the training has seen, for the new certificate.
        directory: the folder for checkpoints and ``metrics.jsonl``: the loss, its two terms, and the largest error of a
            layer.
        token_mask: of ``held_out``, as for ``certify``.
        certificate: options of ``certify``.
        options: ``save_every``, ``keep``, ``keep_every``, ``log_every`` and ``log``, as for ``fit``.

    Returns:
        The trained form, with its certificate on ``held_out``.

    Raises:
        ValueError: if the form has nothing to train (its model is bilinear, or some layers keep the original MLP), or
            if the directory holds another run.
        FloatingPointError: if a loss is not finite. The last good checkpoint stays.
    """
    if form.lm.config.original_gate is None or bool(jnp.any(thresholds(form.lm) <= 0)):
        raise ValueError("only a form with bilinear MLPs in place of gated ones in all layers can be distilled")
    if recipe.n_ctx > form.lm.config.n_ctx:
        raise ValueError(f"n_ctx is {recipe.n_ctx}, but the context of the model is {form.lm.config.n_ctx}: lower it")
    mlp = form.lm.params["layers"]["mlp"]
    source = batches(tokens, recipe.n_ctx, recipe.batch_size, recipe.seed, n_vocab=form.lm.config.n_vocab)
    start = {name: jnp.array(mlp[name], jnp.float32, copy=True) for name in recipe.weights}
    optimizer = relative_adam(recipe, start)
    config = {
        "recipe": dataclasses.asdict(recipe),
        "tokens": len(tokens),
        DATA: of_arrays(tokens),
        "start": fingerprint(form.lm.params),
    }
    state = fit(
        distil_update(recipe, optimizer),
        TrainState(jnp.zeros((), jnp.int32), start, optimizer.init(start)),
        _WithModels(source, form),
        steps=recipe.steps,
        directory=directory,
        config=config,
        name="distil",
        **options,
    )
    new = dataclasses.replace(form, lm=with_mlps(form.lm, state.params))
    return dataclasses.replace(new, certificate=new.certify(held_out, token_mask, **(certificate or {})))


def with_mlps(lm: LanguageModel, mlp: PyTree) -> LanguageModel:
    """The form with these weights in its bilinear MLPs, in the dtype that they had."""
    layers = lm.params["layers"]
    new = layers["mlp"] | {name: value.astype(layers["mlp"][name].dtype) for name, value in mlp.items()}
    return dataclasses.replace(lm, params=lm.params | {"layers": layers | {"mlp": new}})


class _WithModels:
    """Batches of tokens, each with the two models, which the update reads but does not own."""

    def __init__(self, source, form: BilinearForm):
        self._source, self._models = source, (form.original, form.lm)
        self.get_state, self.set_state = source.get_state, source.set_state

    def __next__(self) -> tuple[np.ndarray, LanguageModel, LanguageModel]:
        return (next(self._source), *self._models)


def relative_adam(recipe: DistilRecipe, start: PyTree) -> optax.GradientTransformation:
    """Adam, with a step of ``lr`` times the root mean square of the weights of each layer at the start.

    A bias begins at or near 0, so it gets at least a hundredth of the size of ``w_p``, to which it is added.
    """

    def size(value):
        return jnp.sqrt(jnp.mean(value**2, axis=tuple(range(1, value.ndim)), keepdims=True))

    least = {name: value for name, value in start.items() if name.startswith("w_")}
    floor = min((float(jnp.min(size(value))) for value in least.values()), default=1.0) / 100
    sizes = jax.tree.map(lambda value: jnp.maximum(size(value), floor), start)
    phases = ((recipe.lr_alone, recipe.alone), (recipe.lr, recipe.steps - recipe.alone))
    rates = [cosine_with_warmup(lr, max(steps, 2), recipe.warmup, recipe.final * lr) for lr, steps in phases]
    rate = optax.join_schedules(rates, [recipe.alone])

    def relative(updates, _):
        return jax.tree.map(lambda update, one: update * jnp.broadcast_to(one, update.shape), updates, sizes)

    return optax.chain(
        optax.scale_by_adam(*recipe.betas), optax.stateless(relative), optax.scale_by_learning_rate(rate)
    )


def distil_update(recipe: DistilRecipe, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """The pure function ``update(state, (tokens, original, form)) -> (state, metrics)`` of one step."""

    def update(state: TrainState, batch):
        tokens, original, form = batch
        found, local, gradient = layer_errors(state.params, original, form, tokens, recipe)

        def alone():
            return jnp.zeros(()), gradient

        def together():
            kl, of_kl = jax.value_and_grad(divergence)(state.params, found, original, form, tokens, recipe, state.step)
            return kl, jax.tree.map(lambda one, other: one + recipe.local * other, of_kl, gradient)

        kl, gradient = jax.lax.cond(state.step < recipe.alone, alone, together)
        params, opt_state = apply_optimizer(optimizer, gradient, state)
        loss = kl + jnp.where(state.step < recipe.alone, 1, recipe.local) * jnp.mean(local)
        metrics = {"loss": loss, "kl": kl, "layer_error": jnp.mean(local), "largest_layer_error": jnp.max(local)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return update


class Gated(NamedTuple):
    """What the gated model does on some tokens."""

    last: Float[Array, "batch seq d_model"]  # the residual stream after the last layer
    outputs: Float[Array, "n_layer batch seq d_model"]  # of the MLPs
    stays: Bool[Array, "n_layer batch seq 1"]  # where the form keeps the original MLP


def layer_errors(
    mlp: PyTree, original: LanguageModel, form: LanguageModel, tokens: Int[Array, "batch seq"], recipe: DistilRecipe
) -> tuple[Gated, Float[Array, " n_layer"], PyTree]:
    """What the gated model does, the relative squared error of each bilinear MLP, and the gradient of their mean.

    The gradient of a layer is computed where its input is, so that no layer's activations are kept.
    """
    c = _without_original(form)
    turns = model_turns(c, tokens.shape[1])

    def body(x, scanned):
        params, trained, fixed, above = scanned
        values = {}

        def watch(site, value):
            values[site] = value
            return value

        after = run_module(Layer(original.config), params, x, watch, blocks=True, turns=turns)
        y = values["mlp_out"]
        stays = kept(y, above)[..., None]
        used = ~stays & ~massive(y, jnp.ones(y.shape[:2], bool))[0][..., None]
        wide = jnp.where(used, y, 0).astype(jnp.float32)
        mean = wide.sum(axis=(0, 1), keepdims=True) / jnp.maximum(jnp.sum(used, dtype=jnp.float32), 1)
        spread = jnp.sum(jnp.where(used, wide - mean, 0) ** 2)

        def relative_error(trained):
            bilinear = run_module(MLP(c), fixed | trained, values["mlp_in"])
            error = jnp.where(used, wide - bilinear.astype(jnp.float32), 0)
            return jnp.sum(error**2) / jnp.maximum(spread, jnp.finfo(jnp.float32).tiny)

        error, gradient = jax.value_and_grad(relative_error)(trained)
        return after, (y, stays, error, jax.tree.map(lambda value: value / c.n_layer, gradient))

    x = embed(c, original.params, tokens, jnp.dtype(recipe.compute_dtype))
    fixed = form.params["layers"]["mlp"]
    scanned = (original.params["layers"], mlp, fixed, thresholds(form))
    last, (outputs, stays, errors, gradient) = jax.lax.scan(body, x, scanned)
    return Gated(last, outputs, stays), errors, gradient


def divergence(
    mlp: PyTree,
    gated: Gated,
    original: LanguageModel,
    form: LanguageModel,
    tokens: Int[Array, "batch seq"],
    recipe: DistilRecipe,
    step: Int[Array, ""] | int = 0,
) -> Float[Array, ""]:
    """The KL of the form's next tokens from those of the gated model, in nats a token.

    It is that of the tokens at positions ``step mod every``, ``+ every``, ...: all of them have their turn. Where the
    gated model's output is massive, and at position 0, the MLPs of the form give that output.
    """
    c = _without_original(form)
    turns = model_turns(c, tokens.shape[1])
    layers = {name: value for name, value in form.params["layers"].items() if not name.startswith("original")}

    def body(x, scanned):
        params, y, stays = scanned

        def keep(site, value):
            return jnp.where(stays, y, value) if site == "mlp_out" else value

        return run_module(Layer(c), params, x, keep, blocks=True, turns=turns), None

    x = embed(c, original.params, tokens, jnp.dtype(recipe.compute_dtype))
    scanned = (layers | {"mlp": layers["mlp"] | mlp}, gated.outputs, gated.stays)
    last, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), x, scanned)
    chosen = jnp.arange(tokens.shape[1] // recipe.every) * recipe.every + step % recipe.every

    def of_a_row(total, rows):
        p = jax.nn.log_softmax(unembed(original.config, original.params, rows[0]))
        q = jax.nn.log_softmax(unembed(c, form.params, rows[1]))
        return total + jnp.sum(jnp.exp(p) * (p - q)), None

    rows = (gated.last[:, chosen], last[:, chosen])
    total, _ = jax.lax.scan(jax.checkpoint(of_a_row, prevent_cse=False), jnp.zeros(()), rows)
    return total / (tokens.shape[0] * len(chosen))


def _without_original(form: LanguageModel) -> TransformerConfig:
    """The configuration of the form with bilinear MLPs everywhere."""
    return dataclasses.replace(form.config, original_gate=None, original_above=False)
