"""Train a bilinear form until it does what its gated model does: distillation.

The loss on a batch of windows of text is

    mean over tokens of KL(softmax(logits) || softmax(logits'))
    + local * mean over layers of  sum |y - y'|^2 / sum |y - mean y|^2

with logits of the gated model and logits' of the form, and with y the output of a gated MLP and y' that of the bilinear
one on the same input, that of the gated model. The first term makes the layers work together; the second keeps each
one true to the MLP that it stands for, which is what its certificate measures.

The step is Adam's, with a learning rate relative to each weight: ``lr`` times the root mean square that the weights of
a layer had at the start.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from bilinear_jax.language import LanguageModel
from bilinear_jax.measure.bilinear_form import BilinearForm
from bilinear_jax.measure.quadratic import embedded, kept, massive, thresholds
from bilinear_jax.nn.configs import check_types
from bilinear_jax.nn.transformer import MLP, Layer, run_module, unembed
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
    batch_size: int = 8  # windows per update
    n_ctx: int = 128  # tokens per window
    lr: float = 3e-3  # largest learning rate, relative to the size of the weights
    betas: tuple[float, float] = (0.9, 0.98)  # Adam's betas: how much of the two moments is kept at each step
    warmup: int = 5  # steps in which the learning rate rises linearly from 0; then it falls as a cosine
    final: float = 0.05  # learning rate at the end, as a fraction of the largest
    local: float = 1.0  # weight of the error of each layer
    every: int = 2  # the KL is that of every second token (the memory and time of logits); 1: of all
    weights: tuple[str, ...] = ("w_l", "w_r", "w_p", "w_s", "b_r", "b_p")  # of the bilinear MLPs: what is trained
    seed: int = 0  # of the order of the data

    def __post_init__(self):
        check_types(self)
        check_fields(self, COUNT, "steps", "batch_size", "n_ctx", "every")
        check_fields(self, NOT_NEGATIVE, "lr", "warmup", "local")
        check_fields(self, Rule("must be at least 0 and below 1", lambda b: all(0 <= x < 1 for x in b)), "betas")
        check_fields(self, Rule("must lie in 0 ... 1", lambda x: 0 <= x <= 1), "final")
        check_fields(self, SEED, "seed")
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
    rate = cosine_with_warmup(recipe.lr, recipe.steps, recipe.warmup, recipe.final * recipe.lr)

    def relative(updates, _):
        return jax.tree.map(lambda update, one: update * jnp.broadcast_to(one, update.shape), updates, sizes)

    return optax.chain(
        optax.scale_by_adam(*recipe.betas), optax.stateless(relative), optax.scale_by_learning_rate(rate)
    )


def distil_update(recipe: DistilRecipe, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """The pure function ``update(state, (tokens, original, form)) -> (state, metrics)`` of one step."""

    def update(state: TrainState, batch):
        tokens, original, form = batch
        gradient_of = jax.value_and_grad(distil_loss, has_aux=True)
        (loss, (kl, local)), gradient = gradient_of(state.params, original, form, tokens, recipe, state.step)
        params, opt_state = apply_optimizer(optimizer, gradient, state)
        metrics = {"loss": loss, "kl": kl, "layer_error": jnp.mean(local), "largest_layer_error": jnp.max(local)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return update


def distil_loss(
    mlp: PyTree,
    original: LanguageModel,
    form: LanguageModel,
    tokens: Int[Array, "batch seq"],
    recipe: DistilRecipe,
    step: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Float[Array, " n_layer"]]]:
    """The loss, and its two terms: the KL in nats a token, and the relative squared error of each layer.

    The KL is that of the tokens at positions ``step mod every``, ``+ every``, ...: all of them have their turn.
    """
    student, above = with_mlps(form, mlp), thresholds(form)

    def body(streams, scanned):
        theirs, ours = streams
        params, own, above = scanned
        values = {}

        def tap(site, value):
            values[site] = value
            return value

        theirs = jax.lax.stop_gradient(run_module(Layer(original.config), params, theirs, tap, blocks=True))
        x, y = (jax.lax.stop_gradient(values[site]) for site in ("mlp_in", "mlp_out"))
        used = (~kept(y, above) & ~massive(y, jnp.ones(y.shape[:2], bool))[0])[..., None]
        error = jnp.where(used, y - run_module(MLP(student.config), own["mlp"], x), 0).astype(jnp.float32)
        wide = jnp.where(used, y, 0).astype(jnp.float32)
        mean = wide.sum(axis=(0, 1), keepdims=True) / jnp.maximum(jnp.sum(used, dtype=jnp.float32), 1)
        spread = jnp.sum(jnp.where(used, wide - mean, 0) ** 2)
        ours = run_module(Layer(student.config), own, ours, blocks=True)
        return (theirs, ours), jnp.sum(error**2) / jnp.maximum(spread, jnp.finfo(jnp.float32).tiny)

    x = embedded(original, tokens)
    scanned = (original.params["layers"], student.params["layers"], above)
    (theirs, ours), local = jax.lax.scan(body, (x, x), scanned)
    chosen = jnp.arange(tokens.shape[1] // recipe.every) * recipe.every + step % recipe.every

    def divergence(total, rows):
        p = jax.nn.log_softmax(unembed(original.config, original.params, rows[0]))
        q = jax.nn.log_softmax(unembed(student.config, student.params, rows[1]))
        return total + jnp.sum(jnp.exp(p) * (p - q)), None

    rows = (jax.lax.stop_gradient(theirs)[:, chosen], ours[:, chosen])
    total, _ = jax.lax.scan(jax.checkpoint(divergence, prevent_cse=False), jnp.zeros(()), rows)
    kl = total / (tokens.shape[0] * len(chosen))
    return kl + recipe.local * jnp.mean(local), (kl, local)
