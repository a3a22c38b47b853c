"""How far a bilinear form stands for its gated model, on tokens that the form was not made from.

For every layer: the R2 of the MLP's output, and the loss added when this layer alone is swapped. For all layers at
once: the loss added. Beside them, the loss added when the layer's MLP is replaced by its mean (the scale on which to
read the others), and the same numbers for two controls: hidden units that are linear, and quadratic hidden units whose
coefficients were dealt out to others at random. The numbers depend on the text. They are true for text like it.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm.auto import tqdm

from bilinear_jax.language import Batch, LanguageModel
from bilinear_jax.measure.quadratic import (
    Coefficients,
    after_layers,
    after_swapped,
    embedded,
    kept,
    quadratic_output,
    thresholds,
    through_layers,
)
from bilinear_jax.nn.attention import model_turns
from bilinear_jax.nn.transformer import MLP, Layer, cross_entropy, run_module, unembed
from bilinear_jax.store.files import finite_or_null


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["r2", "loss_added", "loss_added_error", "loss_added_all", "loss_added_all_error"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Scores:
    """How well some MLPs stand for those of a model. Losses are in nats a token; errors are standard errors."""

    r2: Float[Any, " n_layer"]  # 1 - sum |y - y'|^2 / sum |y - mean|^2 of the MLP's output y, on the model's own inputs
    loss_added: Float[Any, " n_layer"]  # when this layer alone is swapped
    loss_added_error: Float[Any, " n_layer"]
    loss_added_all: Float[Any, ""]  # when all layers are swapped
    loss_added_all_error: Float[Any, ""]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("form", "controls", "loss_removed", "loss_removed_error", "loss", "kept", "r2_kept"),
        *("output_covariance", "error_square"),
    ],
    meta_fields=["tokens", "loss_tokens"],
)
@dataclasses.dataclass(frozen=True)
class Certificate:
    """What a bilinear form leaves out, measured on held-out tokens. The scores of the form are attributes of it too."""

    form: Scores
    controls: Mapping[str, Scores]  # "linear" and "shuffled"
    loss_removed: Float[Any, " n_layer"]  # loss added when this layer's output is replaced by its mean
    loss_removed_error: Float[Any, " n_layer"]
    loss: Float[Any, ""]  # of the model itself
    kept: Int[Any, " n_layer"]  # number of tokens after position 0 that keep the original MLP
    r2_kept: Float[Any, " n_layer"]  # what R2 the bilinear MLP would have where the original one is kept
    output_covariance: Float[Any, "n_layer d_model d_model"]  # of y
    error_square: Float[Any, "n_layer d_model d_model"]  # mean of e e^T with e = y - y'
    tokens: int  # number of tokens of r2 and of loss_added_all
    loss_tokens: int  # number of tokens of the losses of single layers

    def __getattr__(self, name: str):
        if name in Scores.__dataclass_fields__:
            return getattr(self.form, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def of(self, directions: Float[Any, "U d_model"]) -> Float[Array, "n_layer U"]:
        """R2 of ``u . y`` for output directions u, in every layer: ``1 - u^T E[e e^T] u / (u^T Cov[y] u)``.

        A direction is an SAE feature's, a row of the unembedding, or any other. nan where ``u . y`` is constant.
        """
        u = jnp.asarray(directions, jnp.float32)
        if u.ndim != 2 or u.shape[1] != self.error_square.shape[-1]:
            raise ValueError(
                f"directions have shape {u.shape}, but they must be rows [U, {self.error_square.shape[-1]}]"
            )
        with jax.default_matmul_precision("highest"):
            left, spread = (
                jnp.einsum("ud,lde,ue->lu", u, jnp.asarray(matrix), u)
                for matrix in (self.error_square, self.output_covariance)
            )
        return 1 - left / spread

    def as_json(self) -> dict[str, Any]:
        """Everything but the two covariances, as JSON: arrays are lists, and a number that is not finite is None."""

        def plain(part: Any) -> Any:
            if isinstance(part, Mapping):
                return {name: plain(value) for name, value in part.items()}
            if dataclasses.is_dataclass(part):
                return {one.name: plain(getattr(part, one.name)) for one in dataclasses.fields(part)}
            return np.asarray(part).tolist()

        left_out = ("output_covariance", "error_square")
        names = [one.name for one in dataclasses.fields(self) if one.name not in left_out]
        return finite_or_null({name: plain(getattr(self, name)) for name in names})


def certify(
    lm: LanguageModel,
    form: LanguageModel,
    tokens,
    token_mask=None,
    *,
    controls: Mapping[str, Coefficients],
    mean: Float[Array, "n_layer d_model"],
    batch_size: int = 8,
    loss_tokens: int = 512,
) -> Certificate:
    """Measure how far a bilinear form stands for its model.

    Args:
        lm: the gated model.
        form: its bilinear form, as ``with_coefficients`` makes it, perhaps trained since.
        tokens: token ids ``[rows, seq]`` that the form was not made from.
        token_mask: the tokens that count, as for ``LanguageModel.batches``. Position 0 never does.
        controls: by name, coefficients of other forms of this model.
        mean: of each MLP's output, for ``loss_removed``.
        batch_size: rows at once.
        loss_tokens: the losses of single layers are measured on the first rows with together about this many tokens.
            They take half a forward pass for each layer and each kind of swap.

    Raises:
        ValueError: as ``LanguageModel.batches``, and if a value is not finite.
    """
    above = thresholds(form)
    sums, losses = None, []
    for batch in lm.batches(tokens, token_mask, batch_size, description="R2 and losses"):
        x = embedded(lm, batch.tokens)
        after, found = _sums(lm, form, dict(controls), above, x, batch.mask)
        found = jax.tree.map(lambda value: np.asarray(value, np.float64), jax.device_get(found))
        if not all(np.isfinite(value).all() for value in jax.tree.leaves(found)):
            raise batch.not_finite()
        sums = found if sums is None else jax.tree.map(np.add, sums, found)
        streams = {"clean": after, "form": after_layers(form, x)}
        streams |= {name: after_swapped(lm, c, above, x) for name, c in controls.items()}
        counted = np.asarray(batch.mask.at[:, 0].set(False))
        losses.append(
            {name: np.asarray(_token_losses(lm, end, batch.tokens))[counted] for name, end in streams.items()}
        )
    assert sums is not None  # batches gives at least one
    whole = {name: np.concatenate([batch[name] for batch in losses]) for name in losses[0]}
    clean = whole.pop("clean")
    rows = max(1, loss_tokens // np.shape(tokens)[1])
    first = next(iter(lm.batches(tokens[:rows], None if token_mask is None else token_mask[:rows], rows)))
    single, loss_count = _single_layers(lm, form, dict(controls), mean, above, first)
    served = sums["count"] > 0
    r2 = {name: np.where(served, 1 - error / _spread(sums, ""), 1.0) for name, error in sums["error"].items()}
    scores = {}
    for name in r2:
        every, error = _added(whole[name], clean)
        scores[name] = Scores(r2[name], single[name][0], single[name][1], every, error)
    count = np.maximum(sums["count"], 1)[:, None, None]
    mean_y = sums["sum"][:, :, None] / count
    return Certificate(
        form=scores.pop("form"),
        controls=scores,
        loss_removed=single["removed"][0],
        loss_removed_error=single["removed"][1],
        loss=np.array(clean.mean()),
        kept=sums["kept"].astype(int),
        r2_kept=1 - sums["kept_error"] / _spread(sums, "kept_"),
        output_covariance=(sums["outer"] / count - mean_y * mean_y.swapaxes(1, 2)).astype(np.float32),
        error_square=(sums["error_outer"] / count).astype(np.float32),
        tokens=len(clean),
        loss_tokens=loss_count,
    )


def _spread(sums: Mapping[str, np.ndarray], kind: str) -> np.ndarray:
    """``sum |y - mean|^2``, nan if it is 0."""
    mean_square = (sums[f"{kind}sum"] ** 2).sum(axis=-1) / np.maximum(sums[f"{kind}count"], 1)
    spread = sums[f"{kind}square"] - mean_square
    return np.where(spread > 0, spread, np.nan)


def _added(swapped: np.ndarray, clean: np.ndarray) -> tuple[Any, Any]:
    """The mean of the loss added over tokens (the last axis), and its standard error."""
    added = np.asarray(swapped, np.float64) - clean
    number = added.shape[-1]
    return added.mean(axis=-1), added.std(axis=-1, ddof=min(1, number - 1)) / number**0.5


@jax.jit
def _sums(lm, form, controls, above, x, mask) -> tuple[Float[Array, "batch seq d_model"], dict[str, Any]]:
    """The residual stream after the last layer, given that before the first, and sums over the counted tokens in every
    layer; with ``kept_``, over those that keep the original MLP."""

    def visit(params, extra, values):
        mlp, coefficients, above = extra
        x, y = values["mlp_in"], values["mlp_out"].astype(jnp.float32)
        stays = kept(y, above)
        used = (mask & ~stays)[..., None]
        outputs = {"form": run_module(MLP(form.config), mlp, x)}
        outputs |= {name: quadratic_output(params["mlp"], c, x) for name, c in coefficients.items()}
        errors = {name: y - other.astype(jnp.float32) for name, other in outputs.items()}
        served = jnp.where(used, y, 0)
        error = jnp.where(used, errors["form"], 0)
        whole = jnp.where(stays[..., None] & filled[..., None], y, 0)
        return {
            "count": jnp.sum(used),
            "sum": served.sum(axis=(0, 1)),
            "square": jnp.sum(served**2),
            "outer": jnp.einsum("bsd,bse->de", served, served),
            "error": {name: jnp.sum(jnp.where(used, each, 0) ** 2) for name, each in errors.items()},
            "error_outer": jnp.einsum("bsd,bse->de", error, error),
            "kept": jnp.sum(mask & stays),
            "kept_count": jnp.sum(filled & stays),
            "kept_sum": whole.sum(axis=(0, 1)),
            "kept_square": jnp.sum(whole**2),
            "kept_error": jnp.sum(jnp.where(stays[..., None] & filled[..., None], errors["form"], 0) ** 2),
        }

    # Position 0 of each row of the dataset, too, is measured where the original is kept.
    filled = mask.at[:, 0].set(jnp.any(mask, axis=1))
    mask = mask.at[:, 0].set(False)
    extras = form.params["layers"]["mlp"], controls, above
    return through_layers(lm, x, visit, extras)


@jax.jit
def _token_losses(lm: LanguageModel, x: Float[Array, "batch seq d_model"], tokens) -> Float[Array, "batch seq"]:
    """The loss of each token given those before it, from the residual stream after the last layer; 0 at position 0."""

    def of_row(row):
        x, targets = row
        return cross_entropy(unembed(lm.config, lm.params, x[None]), targets[None])[0]

    losses = jax.lax.map(of_row, (x, jnp.roll(tokens, -1, axis=1)))
    return jnp.roll(losses, 1, axis=1).at[:, 0].set(0)


@jax.jit
def _swapped(lm, form, controls, mean, above, tokens) -> dict[str, Float[Array, "n_layer batch seq d_model"]]:
    """The residual stream after every layer, if only the MLP of this layer is swapped; "clean" if none is."""

    def visit(params, extra, values):
        mlp, coefficients, mean, above = extra
        x, y = values["mlp_in"], values["mlp_out"]
        outputs = {"clean": y, "form": run_module(MLP(form.config), mlp, x)}
        outputs |= {name: quadratic_output(params["mlp"], c, x) for name, c in coefficients.items()}
        outputs["removed"] = jnp.broadcast_to(mean.astype(y.dtype), y.shape)
        stays = kept(y, above)[..., None]
        return {name: values["resid_mid"] + jnp.where(stays, y, other) for name, other in outputs.items()}

    extras = form.params["layers"]["mlp"], controls, mean, above
    return through_layers(lm, embedded(lm, tokens), visit, extras)[1]


@jax.jit
def _finish(lm: LanguageModel, x: Float[Array, "batch seq d_model"], first: Int[Array, ""] | int, tokens):
    """The losses of the tokens if x is the residual stream before layer ``first``."""

    c = lm.config
    turns = model_turns(c, x.shape[1])

    def body(layer, x):
        params = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), lm.params["layers"])
        return run_module(Layer(c), params, x, blocks=True, turns=turns)

    return _token_losses(lm, jax.lax.fori_loop(first, c.n_layer, body, x), tokens)


def _single_layers(lm, form, controls, mean, above, batch: Batch) -> tuple[dict[str, tuple], int]:
    """By kind of swap: the loss added by each layer alone and its standard error. And the number of tokens."""
    streams = _swapped(lm, form, controls, mean, above, batch.tokens)
    counted = np.asarray(batch.mask.at[:, 0].set(False))
    clean = np.asarray(_finish(lm, streams.pop("clean")[-1], lm.config.n_layer, batch.tokens))[counted]
    kinds = {}
    with tqdm(total=len(streams) * lm.config.n_layer, desc="layer by layer", unit="swap", disable=None) as bar:
        for name in list(streams):
            rows = []
            for layer, x in enumerate(streams.pop(name)):
                rows.append(np.asarray(_finish(lm, x, layer + 1, batch.tokens))[counted])
                bar.update()
            kinds[name] = _added(np.stack(rows), clean)
    return kinds, int(counted.sum())
