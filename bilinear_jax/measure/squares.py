"""Interventions that check an explanation: take away the squares that make a feature fire, or put them there.

In the metric by firing (``explain.parts``), the form of an output feature is a sum of squares of p_i . x, where x is
the MLP's input, and a_i = C p_i is what the data has along p_i (``linalg.metric``). Since p_i . a_j is 1 for i = j and
else 0,

    x' = x + sum_{i < n} (t_i - p_i . x) a_i        has p_i . x' = t_i for i < n, and p_j . x' = p_j . x for all others

so the pre-activation changes by exactly ``sum_{i < n} l_i (t_i^2 - (p_i . x)^2)``. Two things are done to the model,
and it is run to the end:

    ablated    t = 0 at tokens at which the feature fires
    steered    at as many tokens at which it does not, t_i is what p_i finds where it fires: the root of its mean square
               there, with the sign of its mean; 0 if l_i is negative

Each has a control: the same with random directions in place of the p_i, orthonormal in the same metric. Other features
that read the p_i change too, and so does all that comes after the MLP.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.errors import check_count
from bilinear_jax.explain.logits import logit_effects_of
from bilinear_jax.explain.parts import firing_metrics
from bilinear_jax.explain.samples import Layer, Samples, gather, halves
from bilinear_jax.explain.spectra import top_eigh
from bilinear_jax.explain.tracer import Index, Tracer
from bilinear_jax.nn import sites
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.transformer import unembed

ROWS = 8  # rows in which a feature is acted on: those with most firings
RAISED = 10  # tokens that a feature raises most, by its direct path


@dataclasses.dataclass(frozen=True)
class Acted:
    """What became of some output features at the tokens at which something was done. All arrays are on the host."""

    predicted: Float[np.ndarray, " features"]  # mean change of the pre-activation, as the explanation says
    change: Float[np.ndarray, " features"]  # the mean change that was measured
    fires: Float[np.ndarray, " features"]  # share of these tokens at which the feature fires now
    logits: Float[np.ndarray, " features"]  # mean change of the logits of the tokens that it raises most, less that of
    # all logits


@dataclasses.dataclass(frozen=True)
class SquareInterventions:
    """What ablating and steering squares does to output features, beside random directions; nan where none fires."""

    features: Int[np.ndarray, " features"]
    n: int  # squares that are acted on
    tokens: Int[np.ndarray, " features"]  # tokens at which it was done, of either kind
    ablated: Acted
    ablated_random: Acted
    steered: Acted
    steered_random: Acted

    def table(self) -> str:
        """A Markdown table with a row for each feature; in brackets the control.

        Example:
            >>> import bilinear_jax as bj
            >>> tracer, tokens = bj.Tracer(bj.load("ts-nano"), layer=2), bj.load_corpus("ts-nano")[:16, :64]
            >>> print(bj.intervene_on_squares(tracer, tokens, features=[417]).table().splitlines()[0])
            | feature | tokens | ablated: predicted | measured | still fires | logits | steered: fires | logits |
        """
        titles = ["feature", "tokens", "ablated: predicted", "measured", "still fires", "logits"]
        rows = [[*titles, "steered: fires", "logits"], ["---"] * 8]
        for row, feature in enumerate(self.features):

            def pair(own: Acted, random: Acted, name: str, row=row) -> str:
                return f"{getattr(own, name)[row]:.2f} ({getattr(random, name)[row]:.2f})"

            away, there = (self.ablated, self.ablated_random), (self.steered, self.steered_random)
            numbers = [f"{self.ablated.predicted[row]:.2f}", f"{self.ablated.change[row]:.2f}"]
            numbers += [pair(*away, "fires"), pair(*away, "logits"), pair(*there, "fires"), pair(*there, "logits")]
            rows.append([str(feature), str(self.tokens[row]), *numbers])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def intervene_on_squares(
    tracer: Tracer,
    tokens,
    choose=None,
    *,
    features: Index,
    n: int = 1,
    seed: int = 0,
    token_mask=None,
    batch_size: int = 16,
) -> SquareInterventions:
    """Ablate and steer the first n squares of output features, and measure what the model does.

    Args:
        tracer: with an SAE of mlp_out as its output, read by its encoder rows.
        tokens: token ids ``[rows, seq]`` to act on, of which the ``ROWS`` with most firings of each feature are used.
            Without ``choose``, the squares are chosen on the first half of the rows, and acted on in the second.
        choose: other token ids, to choose the squares on.
        features: which output features (as for ``Tracer.q``).
        n: squares, the largest |eigenvalues| by firing.
        seed: of the control, and of the tokens at which the feature is steered.
        token_mask: of ``tokens``; by default the tokens that count.
        batch_size: rows that are run through the model at once to find where the features fire.

    Raises:
        ValueError: if the outputs are no SAE's encoder rows, the MLP has biases (a constant input cannot be changed), n
            is out of range, or the tokens do not fit.
        UnknownNameError: if a feature does not exist.

    Memory: logits of ``ROWS`` rows.

    Example:
        >>> import bilinear_jax as bj
        >>> tracer, tokens = bj.Tracer(bj.load("ts-nano"), layer=2), bj.load_corpus("ts-nano")[:16, :64]
        >>> found = bj.intervene_on_squares(tracer, tokens, features=[417])
        >>> bool(np.allclose(found.ablated.predicted, found.ablated.change, atol=1e-3))
        True
    """
    check_count("n", n)
    tracer.require_encoder()
    layer, some = tracer.scored(features)
    if layer.tensor.n_in > tracer.lm.config.d_model:
        raise ValueError(
            "the MLP of this model has biases or a linear map, so its squares read a constant input, which no "
            "intervention changes: use a model without"
        )
    if n > layer.tensor.n_in:
        raise ValueError(f"n is {n}, but a form has {layer.tensor.n_in} squares: ask for fewer")
    scoring_rows, choosing_rows, masks = halves(tokens, choose, token_mask)
    choosing = gather(layer, choosing_rows, masks[0], batch_size)
    scoring = gather(layer, scoring_rows, masks[1], batch_size)
    mask = np.asarray(layer.lm.token_mask(scoring_rows) if masks[1] is None else masks[1], bool)
    raised = np.asarray(logit_effects_of(layer.lm, tracer.out, some.tolist(), RAISED).raised)
    keys = jax.random.split(jax.random.key(seed), len(some))
    act = functools.partial(_of_one, layer, choosing, scoring, np.asarray(scoring_rows), mask, n)
    found = [act(int(feature), jnp.asarray(ids), key) for feature, ids, key in zip(some, raised, keys, strict=True)]
    numbers, acted = zip(*found, strict=True)
    done = {name: Acted(*np.array([one[name] for one in acted]).T) for name in acted[0]}
    return SquareInterventions(some, n, np.array(numbers), **done)


class _Squares(NamedTuple):
    vectors: Float[Array, "n in"]  # p
    patterns: Float[Array, "n in"]  # a


def _of_one(
    layer: Layer, choosing: Samples, scoring: Samples, rows, mask, n: int, feature: int, raised, key
) -> tuple[int, dict[str, tuple[float, ...]]]:
    """At how many tokens of each kind something was done, and by what was done the four numbers of ``Acted``."""
    sae = layer.sae
    assert sae is not None
    fired, held = (one.fired(np.array([feature]), sae.config.n_features)[0] for one in (choosing, scoring))
    metric = jax.tree.map(lambda leaf: leaf[0], firing_metrics(choosing.x, fired[None], choosing.moment))
    top = top_eigh(layer.tensor, layer.directions[feature][None], n, metric=metric, exact=True)
    values, own = np.asarray(top.values[0]), _Squares(top.vectors[0], top.patterns[0])
    turn = jnp.linalg.qr(jax.random.normal(key, (metric.root.shape[1], n)))[0]
    random = _Squares((metric.inverse @ turn).T, (metric.root @ turn).T)

    fires = np.zeros(mask.shape, bool)
    fires[mask] = held
    best = np.argsort(-fires.sum(axis=1), kind="stable")[:ROWS]
    here, silent = fires[best], mask[best] & ~fires[best]
    number = int(min(here.sum(), silent.sum()))
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    where = {"ablated": _some_of(here, number, rng), "steered": _some_of(silent, number, rng)}
    model = functools.partial(_run, layer.lm, layer.layer, sae, layer.directions[feature], jnp.asarray(feature), raised)
    tokens, done = jnp.asarray(rows[best], jnp.int32), {}
    clean = jax.device_get(model(tokens, own, jnp.zeros(n), jnp.zeros(here.shape, bool)))
    for end, squares in (("", own), ("_random", random)):
        found_in = choosing.x[fired] @ np.asarray(squares.vectors).T  # [tokens, n]
        size = np.sqrt((found_in**2).mean(axis=0)) * np.sign(found_in.mean(axis=0)) if fired.any() else np.zeros(n)
        for name, places in where.items():
            targets = np.where((values > 0) & (name == "steered"), size, 0).astype(np.float32)
            new = jax.device_get(model(tokens, squares, jnp.asarray(targets), jnp.asarray(places)))
            predicted = (targets**2 - clean.along**2) @ values if squares is own else np.full(places.shape, np.nan)
            changes = (predicted, new.z - clean.z, new.fires, new.logits - clean.logits)
            done[name + end] = tuple(float(one[places].mean()) if number else np.nan for one in changes)
    return number, done


def _some_of(places: Bool[np.ndarray, "rows seq"], number: int, rng) -> Bool[np.ndarray, "rows seq"]:
    """As many of some places, at random."""
    found = np.zeros(places.size, bool)
    found[rng.permutation(np.flatnonzero(places))[:number]] = True
    return found.reshape(places.shape)


class _Ran(NamedTuple):
    """What a run of the model gives at each token."""

    along: Float[Array, "batch seq n"]  # p . x
    z: Float[Array, "batch seq"]  # u . y
    fires: Bool[Array, "batch seq"]
    logits: Float[Array, "batch seq"]  # the mean of those that the feature raises most, less that of all


@functools.partial(jax.jit, static_argnames="layer")
def _run(lm, layer: int, sae: SAE, direction, feature, raised, tokens, squares: _Squares, targets, where) -> _Ran:
    """The model with ``p . x`` set to the targets at some tokens."""
    with jax.default_matmul_precision("highest"):

        def edit(x):
            moved = (targets[None, None] - x @ squares.vectors.T.astype(x.dtype)) @ squares.patterns.astype(x.dtype)
            return jnp.where(where[..., None], x + moved, x)

        wanted = [("mlp_in", layer), ("mlp_out", layer), ("resid_post", lm.config.n_layer - 1)]
        edits = {wanted[0]: edit}
        got = sites.capture(lm.config, lm.params, tokens, wanted, edits, compute_dtype=lm.compute_dtype)
        x, y = (got[site].astype(jnp.float32) for site in wanted[:2])
        fires = sae.encode(y, sparse=True).fires(feature)
        logits = unembed(lm.config, lm.params, got[wanted[2]])
        raises = logits[..., raised].mean(axis=-1) - logits.mean(axis=-1)
        return _Ran(x @ squares.vectors.T, y @ direction, fires, raises)
