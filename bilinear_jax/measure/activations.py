"""The largest activations of SAE features over a token dataset: compute them in one pass, save them and load them."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.errors import check_count
from bilinear_jax.language import Batch, LanguageModel
from bilinear_jax.nn import sites
from bilinear_jax.nn.activations import SparseCodes
from bilinear_jax.nn.sae import SAE
from bilinear_jax.store import checksums
from bilinear_jax.store.files import atomic_file
from weights_convert.export import save_tensors
from weights_convert.files import expanded


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "rows", "positions"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TopActivations:
    """The ``k`` largest activations of every feature of one SAE, largest first.

    A feature with fewer than ``k`` activations is filled up with value 0, row -1 and position -1. A dead feature has
    only these.
    """

    values: Float[Array | np.ndarray, "features k"]  # the codes
    rows: Int[Array | np.ndarray, "features k"]  # the dataset row of each
    positions: Int[Array | np.ndarray, "features k"]  # the position in that row, from 0


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class RankedRows:
    """One SAE's part of a published ``top-activations.safetensors``: rows without values, the best first."""

    rows: Int[Array | np.ndarray, "features n"]  # dataset rows, ranked by their largest activation, position 0 included


def top_activations(
    lm: LanguageModel,
    saes: SAE | Iterable[SAE],
    tokens,
    k: int = 20,
    batch_size: int = 16,
    token_mask=None,
    one_per_row: bool = True,
) -> dict[str, TopActivations]:
    """The ``k`` largest activations of every feature of every SAE, in one pass over a dataset.

    Only codes other than 0 of active features are counted: an inactive feature has no activation. Ties go to
    the earlier row, then to the earlier position. The model stops after the last layer that an SAE reads. Only one
    batch of codes is held at a time. A progress bar shows on a terminal.

    Args:
        saes: one SAE or several, at any sites and layers, with different names.
        tokens: token ids ``[rows, seq]``; may be a memory-mapped array.
        k: number of activations to keep per feature.
        batch_size: rows that are run through the model at once. The result does not depend on it.
        token_mask: ``[rows, seq]``; by default the tokens that count (see ``LanguageModel.batches``).
        one_per_row: keep only the largest activation of each row, so that the ``k`` come from ``k`` different
            contexts. ``False`` keeps all of them.

    Returns:
        The ``TopActivations`` of each SAE, by its name, as numpy arrays ``[features, k]``.

    Raises:
        ValueError: if there is no SAE, two have the same name, or one does not fit the model; if the tokens do not fit
            the model, or the mask leaves no token; if a value is not finite, or more features of a token are active
            than the ``max_active`` of a thresholded activation; or if k is below 1.

    Example:
        >>> from bilinear_jax.nn.sae import SAEConfig
        >>> from bilinear_jax.nn.transformer import TransformerConfig
        >>> config = TransformerConfig(n_layer=2, n_head=2, d_model=8, d_hidden=16, n_ctx=6, n_vocab=10)
        >>> tokens = jnp.arange(30).reshape(5, 6) % 10
        >>> lm = LanguageModel.init(config, jax.random.key(0))
        >>> sae = SAE.init(SAEConfig("mlp_in", 1, d_model=8, expansion=4, k=2), jax.random.key(1))
        >>> top = top_activations(lm, sae, tokens, k=3)["1-mlp-in-x4-k2"]
        >>> top.values.shape, bool((top.positions != 0).all())
        ((32, 3), True)
    """
    saes = (saes,) if isinstance(saes, SAE) else tuple(saes)
    check_names(saes)
    check_count("k", k)
    best = tuple(_nothing(sae.config.n_features, k) for sae in saes)
    for batch in lm.batches(tokens, token_mask, batch_size, description="top activations"):
        best, finite = _merge_batch(lm, saes, best, batch.tokens, batch.mask, batch.first, one_per_row=one_per_row)
        if not finite:
            raise _not_finite(batch, saes)
    return {sae.name: _finished(top) for sae, top in zip(saes, best, strict=True)}


def site_values(lm: LanguageModel, saes: Iterable[SAE], tokens: Int[Array, "batch seq"]) -> list[Array]:
    """What each SAE reads, ``[batch, seq, d_model]`` in float32. The model is run up to the last layer needed."""
    wanted = [(sae.config.site, sae.config.layer) for sae in saes]
    got = sites.capture(lm.config, lm.params, tokens, dict.fromkeys(wanted), compute_dtype=lm.compute_dtype)
    return [got[site].astype(jnp.float32) for site in wanted]


def _not_finite(batch: Batch, saes: Iterable[SAE]) -> ValueError:
    """The error for codes that are not finite. Those of a token with more active features than slots are NaN too."""
    slots = [f"{sae.config.slots} of {sae.name}" for sae in saes if sae.config.thresholded]
    if not slots:
        return batch.not_finite()
    return ValueError(
        f"{batch.not_finite()}; or more features of a token are active than max_active ({', '.join(slots)}): give the "
        "config a larger max_active, with dataclasses.replace"
    )


@functools.partial(jax.jit, static_argnames="one_per_row")
def _merge_batch(lm, saes, best, tokens, token_mask, first_row, *, one_per_row: bool):
    merged, finite, read = [], jnp.array(True), site_values(lm, saes, tokens)
    for sae, top, x in zip(saes, best, read, strict=True):
        codes = sae.encode(x, sparse=True)
        finite &= jnp.isfinite(codes.values).all(axis=-1, where=token_mask[..., None]).all()
        new = _candidates(codes, token_mask, top.values.shape[1], one_per_row)
        new = dataclasses.replace(new, rows=new.rows + first_row)
        both = jax.tree.map(lambda old, found: jnp.concatenate([old, found], axis=1), top, new)
        _, order = jax.lax.top_k(both.values, top.values.shape[1])
        merged.append(jax.tree.map(lambda part, order=order: jnp.take_along_axis(part, order, axis=1), both))
    return tuple(merged), finite


def _candidates(codes: SparseCodes, token_mask: Bool[Array, "batch seq"], k: int, one_per_row: bool) -> TopActivations:
    """The activations of a batch that can be among the largest; ``-inf`` where there is none."""
    batch, seq = token_mask.shape
    selected = jnp.where(token_mask[..., None] & (codes.values != 0), codes.values, -jnp.inf)
    if one_per_row:
        row = jnp.broadcast_to(jnp.arange(batch)[:, None, None], selected.shape)
        position = jnp.broadcast_to(jnp.arange(seq)[None, :, None], selected.shape)
        values = jnp.full((batch, codes.n_features), -jnp.inf).at[row, codes.indices].max(selected)
        position = jnp.where(selected == values[row, codes.indices], position, seq)
        positions = jnp.full(values.shape, seq).at[row, codes.indices].min(position)
        values, positions = values.T, positions.T
        rows = jnp.broadcast_to(jnp.arange(batch), values.shape)
    else:
        flat = selected.reshape(batch * seq, -1)
        token = jnp.broadcast_to(jnp.arange(batch * seq)[:, None], flat.shape)
        dense = jnp.full((codes.n_features, batch * seq), -jnp.inf)
        dense = dense.at[codes.indices.reshape(flat.shape), token].set(flat, unique_indices=True)
        values, index = jax.lax.top_k(dense, min(k, batch * seq))
        rows, positions = index // seq, index % seq
    return TopActivations(values, rows.astype(jnp.int32), positions.astype(jnp.int32))


def _nothing(n_features: int, k: int) -> TopActivations:
    none = jnp.full((n_features, k), -1, jnp.int32)
    return TopActivations(jnp.full((n_features, k), -jnp.inf), none, none)


def _finished(top: TopActivations) -> TopActivations:
    values, rows, positions = (np.array(part) for part in (top.values, top.rows, top.positions))
    empty = values == -np.inf
    values[empty], rows[empty], positions[empty] = 0, -1, -1
    return TopActivations(values, rows, positions)


def check_names(saes: tuple[SAE, ...]) -> None:
    """Raises ``ValueError`` if there is no SAE, or if two have the same name."""
    names = [sae.name for sae in saes]
    if not names:
        raise ValueError("no SAE is given: give at least one SAE")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two SAEs are named {', '.join(twice)}: give them different tags, or run them one by one")


# Activations of chosen rows


@jax.jit
def _sparse_codes(lm: LanguageModel, sae: SAE, tokens: Int[Array, "batch seq"]):
    """The codes, and whether they are finite."""
    codes = sae.encode(site_values(lm, [sae], tokens)[0], sparse=True)
    return codes, jnp.isfinite(codes.values).all()


def row_codes(lm: LanguageModel, sae: SAE, tokens, rows, batch_size: int = 8) -> SparseCodes:
    """The codes at every position of some dataset rows. The model is run on these rows only.

    Returns:
        ``SparseCodes`` ``[len(rows), seq, k]``.

    Raises:
        ValueError: for a row that the dataset does not have, or if a value is not finite.
    """
    rows, tokens = np.asarray(rows), sites.token_array(tokens)
    outside = rows[(rows < 0) | (rows >= len(tokens))]
    if outside.size:
        raise ValueError(
            f"there is no row {outside[0]} in the dataset, which has {len(tokens)} rows: pass the tokens over which "
            "the top activations were computed"
        )
    chosen = np.stack([tokens[row] for row in rows])
    parts = []
    for batch in lm.batches(chosen, batch_size=batch_size, allow_no_token=True):
        codes, finite = _sparse_codes(lm, sae, batch.tokens)
        if not finite:
            raise _not_finite(batch, [sae])
        parts.append(codes)
    return jax.tree.map(lambda *part: jnp.concatenate(part)[: len(rows)], *parts)


def feature_codes(codes: SparseCodes, feature: int) -> Float[np.ndarray, "..."]:
    """One feature's activation at every token, 0 where the top-k did not select it."""
    values, indices = np.asarray(codes.values), np.asarray(codes.indices)
    return np.asarray(np.where(indices == feature, values, 0).sum(axis=-1))


def locate(
    lm: LanguageModel, sae: SAE, tokens, ranked: RankedRows, feature: int, k: int, batch_size: int = 8
) -> TopActivations:
    """Find the values and positions of one feature's ``k`` largest activations, given published rows.

    The published ranking includes position 0. Here position 0 and padding do not count. So a row that is listed only
    for its first token is left out, and other rows may change places. The rows are run in the published order, a batch
    at a time, until no later row can exceed the ``k`` activations found: the last row that was run, with its position
    0, bounds all later rows.

    Returns:
        ``TopActivations`` of one feature, ``[1, k]``.
    """
    rows = np.asarray(ranked.rows)[sae.check_feature(feature)]
    found: list[tuple[float, int, int]] = []
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        codes = row_codes(lm, sae, tokens, chosen, batch_size)
        masks = np.asarray(lm.token_mask(np.stack([tokens[row] for row in chosen])))
        for row, mask, value in zip(chosen, masks, feature_codes(codes, feature), strict=True):
            active = mask & (value != 0)
            if active.any():
                position = int(np.argmax(np.where(active, value, -np.inf)))
                found.append((float(value[position]), int(row), position))
        found = sorted(found, key=lambda one: -one[0])[:k]
        if len(found) == k and found[-1][0] >= np.max(feature_codes(codes, feature)[-1]):
            break
    found += [(0.0, -1, -1)] * (k - len(found))
    values, rows, positions = zip(*found, strict=True)
    return TopActivations(np.array([values], np.float32), np.array([rows], np.int32), np.array([positions], np.int32))


# Files


def save_top_activations(path: str | Path, tops: Mapping[str, TopActivations]) -> None:
    """Write one safetensors file with ``<SAE name>.values``, ``.rows`` and ``.positions``.

    The file appears only when it is complete, and replaces an older one. Raises ``ValueError`` for numbers that do not
    fit into float32 (values) and int32 (rows and positions).

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "top-activations.safetensors"
        >>> one = TopActivations(np.ones((4, 2), np.float32), np.zeros((4, 2), np.int32), np.ones((4, 2), np.int32))
        >>> save_top_activations(path, {"2-mlp-out-x4-k16": one})
        >>> load_top_activations(path)["2-mlp-out-x4-k16"].values.shape
        (4, 2)
    """
    path = expanded(path)
    arrays = {}
    for name, top in tops.items():
        for part, dtype in (("values", np.float32), ("rows", np.int32), ("positions", np.int32)):
            given = np.asarray(getattr(top, part))
            with np.errstate(all="ignore"):
                stored = arrays[f"{name}.{part}"] = given.astype(dtype)
                same = np.isfinite(stored) if part == "values" else stored == given
            if not same.all():
                raise ValueError(f"the {part} of {name} do not fit into {np.dtype(dtype)}: compute them again")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        save_tensors(partial, arrays)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())


_PUBLISHED_KEY = re.compile(r"\d+-[a-z]+-[a-z]+")


def load_top_activations(path: str | Path) -> dict[str, TopActivations | RankedRows]:
    """Read a file of ``save_top_activations``, or a published ``top-activations.safetensors``.

    A published file has keys ``<layer>-<point>`` with dataset rows ``[n, features]``. It gives ``RankedRows``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that is cut short, for keys of neither kind, for arrays that are not top activations, or
            if the ``config.json`` beside it says that the file has changed.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: compute it with top_activations, or name another")
    checksums.check_file(path)
    try:
        arrays = load_file(path)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}): compute or download it again"
        ) from error
    tops: dict[str, TopActivations | RankedRows] = {}
    for key in sorted(arrays):
        name, _, part = key.rpartition(".")
        if _PUBLISHED_KEY.fullmatch(key) and arrays[key].ndim == 2:
            tops[key] = RankedRows(arrays[key].T)
        elif part == "values" and {f"{name}.rows", f"{name}.positions"} <= arrays.keys():
            tops[name] = _checked(path, name, *(arrays[f"{name}.{part}"] for part in ("values", "rows", "positions")))
        elif part not in ("rows", "positions") or f"{name}.values" not in arrays:
            raise ValueError(
                f"{path} holds the key {key!r}, but top activations have the keys '<SAE name>.values', '.rows' and "
                "'.positions', or the published '<layer>-<point>': give another file"
            )
    return tops


def _checked(path: str | Path, name: str, values: np.ndarray, rows: np.ndarray, positions: np.ndarray):
    whole = values.ndim == 2 and values.shape == rows.shape == positions.shape
    whole = whole and jnp.issubdtype(values.dtype, jnp.floating) and bool(np.isfinite(values).all())
    if not whole or any(part.dtype.kind not in "iu" or part.min(initial=0) < -1 for part in (rows, positions)):
        raise ValueError(
            f"{path} has no top activations of {name} (values, rows and positions [features, k], finite, rows and "
            "positions whole numbers from -1): compute or download it again"
        )
    return TopActivations(values, rows, positions)


def find_top(tops: Mapping[str, Any], sae: SAE, where: str) -> TopActivations | RankedRows:
    """One SAE's entry, by its name or by the published ``<layer>-<point>``.

    Raises:
        ValueError: if there is none, or it has another number of features. The message lists the entries there are.
    """
    point = "-".join([str(sae.config.layer), *sae.config.site.split("_")])  # published ones are those of SAEs
    for key in (sae.name,) if sae.config.target else (sae.name, point):
        if key in tops:
            found = tops[key].rows.shape[0]
            if found != sae.config.n_features:
                raise ValueError(
                    f"{key} in {where} has {found} features, but SAE {sae.name} has {sae.config.n_features}: it was "
                    "computed with another SAE. Pass tokens= to compute it again"
                )
            return tops[key]
    raise ValueError(
        f"there are no top activations of SAE {sae.name} in {where}, only of: {', '.join(sorted(tops)) or 'nothing'}. "
        "Pass tokens= to compute them"
    )
