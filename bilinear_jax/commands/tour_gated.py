"""The tour of a gated model: its bilinear form, and what raises the logit of one token in one layer."""

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bilinear_jax as bj
from bilinear_jax.commands import certify, common
from bilinear_jax.measure.quadratic import check_gated, kept, thresholds
from bilinear_jax.nn.attention import rms_norm
from bilinear_jax.nn.transformer import unembedding
from bilinear_jax.show.text import Context, context_text, pieces, shown_around, token_label
from bilinear_jax.store.terminal import say

ROWS, SEQ, LOSS_TOKENS = 16, 128, 128
EIGENPAIRS, CONTEXTS, PAIRS, EMBEDDINGS = 3, 4, 8, 500
LETTERS = 4
"""A token of fewer letters says little about a text."""


class Largest(NamedTuple):
    """Where one eigenvector contributes most, each place from another row."""

    values: np.ndarray  # [n], signed, the largest first
    rows: np.ndarray
    positions: np.ndarray


def tour_gated(options: argparse.Namespace) -> None:
    """Run every step on a text. Print the results and save ``certificate.png`` and ``spectrum.png`` in ``options.out``.

    Raises:
        OSError: if ``options.out`` cannot be written.
        ValueError: if the MLPs are not gated, the text is too short, or ``options.token`` is not one token.
    """
    out = common.figures_folder(options.out)
    lm = bj.load(options.model)
    check_gated(lm)
    if lm.config.gate is None:
        raise ValueError(f"{options.model} has bilinear MLPs, so it needs no form: leave out --data")
    tokens, data = common.load_tokens(options, lm, ROWS, SEQ)
    if len(tokens) < 4:
        raise ValueError(f"{data} has {tokens.size} tokens, but the tour needs at least {4 * SEQ}: give more text")
    token = frequent_word(lm, tokens) if options.token is None else options.token
    u = bj.Directions.tokens(lm, token) - _mean_token(lm)

    common.heading("The model")
    c = lm.config
    size = sum(leaf.size for leaf in jax.tree.leaves(lm.params))
    say(f"{options.model}: {c.n_layer} layers gated by {c.gate}, d_model {c.d_model}, {size / 1e6:.1f} million")
    say("parameters. It writes:\n")
    say(str(lm.generate("Once upon a time", max_length=30, temperature=0.7, seed=0)))

    common.heading("Its bilinear form: every MLP as the bilinear one that is nearest to it on this text")
    form = bj.bilinear_form(lm, tokens, loss_tokens=LOSS_TOKENS)
    result = certify.result_of(form, tokens.shape, model=str(options.model), data=data)
    say(certify.text(result))
    out.mkdir(parents=True, exist_ok=True)
    common.save_figure(certify.figure_of(result), out / "certificate.png")

    name = repr(token) if isinstance(token, str) else token_label(lm.tokenizer, token)
    common.heading(f"Which layers move the logit of {name}, against the mean of all tokens")
    spread, r2 = moved(form.certificate, u)
    best = np.argsort(-(np.maximum(r2, 0) * spread**2))
    layer = int(best[0]) if options.layer is None else options.layer
    tracer = bj.Tracer(form, layer, out=u)  # its error says which layers there are
    rows = [[one, f"{spread[one]:.4f}", f"{r2[one]:.4f}"] for one in best[:5].tolist()]
    say(common.columns(["layer", "moves it by", "R2 of the form"], rows))
    say("moves it by: standard deviation over the held-out tokens, before the scale of the final norm")

    common.heading(f"What the MLP of layer {layer} looks for: eigenvectors, and where they contribute most")
    top = tracer.top_eigh(k=EIGENPAIRS)
    values = bj.spectra.eigh(tracer.tensor, u.vectors).values[0]
    title = f"What moves the logit of {name} in layer {layer}: eigenvalues"
    common.save_figure(bj.figures.eigenvalue_spectrum(values, title=title), out / "spectrum.png")
    found = contributions(form, layer, top.values[0], top.vectors[0], tokens)
    for place, value in enumerate(np.asarray(top.values[0]).tolist()):
        largest = largest_of(found[place], CONTEXTS)
        say(f"eigenvalue {value:+.4f} +- {float(top.bounds[0, place]):.0e}")
        for context in _contexts(lm, tokens, found[place], largest):
            say(f"  {context.value:+8.3f} : {context_text(context, 1.0, None)}")
    say(f"These {EIGENPAIRS} hold {float(top.explained[0]):.1%} of the squares of its interaction matrix.")

    common.heading("Its strongest interactions between embeddings of tokens of the text")
    counts = np.bincount(tokens.ravel(), minlength=lm.config.n_vocab)
    frequent = np.argsort(-counts, kind="stable")[: min(EMBEDDINGS, int((counts > 0).sum()))]
    embeddings = bj.Directions.tokens(lm, frequent.tolist(), of="w_e")
    labels = [token_label(lm.tokenizer, one) for one in frequent.tolist()] + ["always (the constant input)"]
    pairs = bj.Tracer(form, layer, inp=embeddings, out=u).top_interactions(PAIRS)
    for i, j, value in zip(pairs.i.tolist(), pairs.j.tolist(), np.asarray(pairs.value).tolist(), strict=True):
        say(f"  {value:+9.4f}  {labels[i]}  x  {labels[j]}")
    say("These are the largest that the weights allow. In later layers the stream holds much besides embeddings.")

    common.heading("What was found")
    whole = result["certificate"]["form"]["loss_added_all"]
    say(f"With every MLP bilinear, the loss on this text rises by {whole:.3f} nats a token. In layer {layer} the form")
    say(f"explains {r2[layer]:.1%} of what the MLP does to the logit of {name}. So far can these lists be trusted.")
    say(f"Figures: {out / 'certificate.png'}, {out / 'spectrum.png'}")


def frequent_word(lm, tokens: np.ndarray) -> int:
    """The most frequent token that begins a word and has at least four letters; else the most frequent of all."""
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=lm.config.n_vocab)
    order = [token for token in np.argsort(-counts, kind="stable").tolist() if counts[token]]
    for token in order:
        label = token_label(lm.tokenizer, token)
        if label.startswith("␣") and len(label) > LETTERS and label[1:].isalpha():
            return token
    return order[0]


def _mean_token(lm) -> bj.Directions:
    """The mean direction of all tokens' logits, which a probability does not depend on."""
    mean = unembedding(lm.params).astype(jnp.float32).mean(axis=0)
    return bj.Directions((mean * lm.params.get("final_gain", jnp.ones(mean.shape)))[None], ("the mean",))


def moved(certificate: Any, u: bj.Directions) -> tuple[np.ndarray, np.ndarray]:
    """By layer: the standard deviation of ``u . y`` of the MLP's output y, and the R2 of the form there."""
    vector = np.asarray(u.vectors[0], np.float64)
    variance = np.einsum("d,lde,e->l", vector, np.asarray(certificate.output_covariance, np.float64), vector)
    return np.sqrt(np.maximum(variance, 0)), np.asarray(certificate.of(u.vectors)[:, 0], np.float64)


def contributions(form, layer: int, values: Any, vectors: Any, tokens: np.ndarray) -> np.ndarray:
    """``value (v . z)^2`` of each eigenvector v at every token, ``[k, rows, seq]``; 0 where the original MLP is kept.

    z is what the tensor reads: ``r / rms(r)`` of the residual stream r before the norm, and a 1 behind it. Summed over
    all eigenvectors of a matrix, they are what the form's MLP adds to the logit at the token.
    """
    lm, above, found = form.original, thresholds(form.lm)[layer], []
    for batch in lm.batches(tokens, batch_size=8, description="eigenvectors"):
        got = lm.capture(batch.tokens, [("resid_mid", layer), ("mlp_out", layer)])
        r = got["resid_mid", layer].astype(jnp.float32)
        z = rms_norm(r, None, lm.config.rms_eps) if lm.config.norms[1] else r
        z = jnp.concatenate([z, jnp.ones((*z.shape[:2], vectors.shape[1] - z.shape[-1]))], axis=-1)
        with jax.default_matmul_precision("highest"):
            each = values[:, None, None] * jnp.einsum("bsd,kd->kbs", z, vectors) ** 2
        used = batch.mask & ~kept(got["mlp_out", layer], above)
        found.append(np.asarray(jnp.where(used[None], each, 0))[:, : batch.rows])
    return np.concatenate(found, axis=1)


def largest_of(contributions: np.ndarray, n: int) -> Largest:
    """The n rows ``[rows, seq]`` with the largest |contribution|, and where it is."""
    positions = np.abs(contributions).argmax(axis=1)
    values = np.take_along_axis(contributions, positions[:, None], axis=1)[:, 0]
    rows = np.argsort(-np.abs(values), kind="stable")[:n]
    return Largest(values[rows], rows, positions[rows])


def _contexts(lm, tokens: np.ndarray, contributions: np.ndarray, largest: Largest) -> list[Context]:
    found = []
    for value, row, position in zip(*(part.tolist() for part in largest), strict=True):
        texts = pieces(lm.tokenizer, tokens[row])
        start, stop = shown_around(texts, position, 10, len(texts) - 1)
        shown = contributions[row, start:stop]
        found.append(Context(value, row, position, start, tuple(texts[start:stop]), shown))
    return found
