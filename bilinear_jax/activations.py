"""The largest activations of SAE features over a token dataset: computed in one pass, stored, and looked up again."""

import dataclasses
import functools
import json
import operator
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn import sites
from bilinear_jax.nn.sae import SAE, SparseCodes


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "rows", "positions"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TopActivations:
    """The ``k`` largest activations of every feature of one SAE, largest first.

    A feature with fewer than ``k`` has value 0, row -1 and position -1 in the places left over; a dead one has
    nothing else.
    """

    values: Float[Array | np.ndarray, "features k"]  # the codes
    rows: Int[Array | np.ndarray, "features k"]  # the dataset row of each
    positions: Int[Array | np.ndarray, "features k"]  # the token of that row, from 0


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class RankedRows:
    """What a published ``top-activations.safetensors`` holds of one SAE: rows alone, the best first."""

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
    """The ``k`` largest activations of every feature of every SAE, in one pass of the language model.

    Only codes that the SAE's own top-k selected, and that aren't 0, count: an inactive feature has no activation.
    Ties go to the earlier row, then to the earlier position. No layer after the last SAE's is run, and no more than
    one batch of codes is held at a time. A progress bar shows on a terminal.

    Args:
        saes: one SAE or several, at any sites and layers, with different names.
        tokens: token ids ``[rows, seq]``; may be a memory-mapped array.
        k: activations kept a feature.
        batch_size: rows a step; the result doesn't depend on it.
        token_mask: ``[rows, seq]``, the tokens that count; by default all but position 0 and the padding at the
            end of each row.
        one_per_row: keep only the largest activation of each row, so that the ``k`` are in ``k`` different
            contexts; ``False`` keeps them all.

    Returns:
        For each SAE's name its ``TopActivations``, numpy arrays ``[features, k]``.

    Raises:
        ValueError: for no SAE, two of the same name, one that doesn't fit the model, tokens that don't, a mask that
            leaves no token, or a model that gives values that are not finite.

    Example:
        >>> from bilinear_jax.nn.sae import SAEConfig
        >>> from bilinear_jax.nn.transformer import Transformer, TransformerConfig
        >>> config = TransformerConfig(n_layer=2, n_head=2, d_model=8, d_hidden=16, n_ctx=6, n_vocab=10)
        >>> tokens = jnp.arange(30).reshape(5, 6) % 10
        >>> lm = LanguageModel(jax.jit(Transformer(config).init)(jax.random.key(0), tokens)["params"], config)
        >>> sae = SAE.init(SAEConfig("mlp_in", 1, d_model=8, expansion=4, k=2), jax.random.key(1))
        >>> top = top_activations(lm, sae, tokens, k=3)["1-mlp-in-x4-k2"]
        >>> top.values.shape, bool((top.positions != 0).all())
        ((32, 3), True)
    """
    from tqdm.auto import tqdm

    saes = (saes,) if isinstance(saes, SAE) else tuple(saes)
    check_names(saes)
    check_dataset(tokens, token_mask)
    if min(k, batch_size) < 1:
        raise ValueError(f"k and batch_size must be at least 1, got {k} and {batch_size}")

    counted = 0
    best = tuple(_nothing(sae.config.n_features, k) for sae in saes)
    batches = token_batches(lm, tokens, token_mask, min(batch_size, len(tokens)))
    with tqdm(total=len(tokens), desc="top activations", disable=None, unit="row") as bar:
        for start, batch, mask in batches:
            best, finite = _merge_batch(lm, saes, best, batch, mask, start, one_per_row=one_per_row)
            if not finite:
                raise not_finite(start, min(len(batch), len(tokens) - start))
            counted += int(mask.sum())
            bar.update(min(len(batch), len(tokens) - start))
    if not counted:
        raise no_token()
    return {sae.name: _finished(top) for sae, top in zip(saes, best, strict=True)}


def check_dataset(tokens, token_mask) -> None:
    """Raises ``ValueError`` unless the tokens are ``[rows, seq]`` and the mask, if there is one, is like them."""
    if tokens.ndim != 2 or not min(tokens.shape):
        raise ValueError(f"tokens are [rows, seq] with at least one of each, got shape {tokens.shape}")
    if token_mask is not None:
        sites.check_token_mask(tokens, token_mask)


def not_finite(first_row: int, rows: int) -> ValueError:
    """The error for a model that gives NaN or infinite values in a batch."""
    return ValueError(
        f"the model gives values that are not finite in rows {first_row} ... {first_row + rows - 1}: check its "
        "parameters, its attn_scale and its compute_dtype"
    )


def no_token() -> ValueError:
    """The error for a dataset of which nothing is to be looked at."""
    return ValueError(
        "the token mask leaves no token to measure: it needs some True (by default position 0 and padding don't count)"
    )


def token_batches(lm: LanguageModel, tokens, token_mask, batch_size: int):
    """Batches of one shape: (first row, tokens, mask); the last is filled up with rows that the mask leaves out."""
    for start in range(0, len(tokens), batch_size):
        batch = lm._checked(np.asarray(tokens[start : start + batch_size]))
        mask = lm.token_mask(batch) if token_mask is None else token_mask[start : start + batch_size]
        missing = ((0, batch_size - len(batch)), (0, 0))
        yield start, jnp.pad(batch, missing), jnp.pad(jnp.asarray(mask).astype(bool), missing)


def site_values(lm: LanguageModel, saes: Iterable[SAE], tokens: Int[Array, "batch seq"]) -> list[Array]:
    """What each SAE reads, ``[batch, seq, d_model]`` in float32, from one run of as many layers as that takes."""
    wanted = [(sae.config.site, sae.config.layer) for sae in saes]
    got = sites.capture(lm.config, lm.params, tokens, dict.fromkeys(wanted), compute_dtype=lm.compute_dtype)
    return [got[site].astype(jnp.float32) for site in wanted]


@functools.partial(jax.jit, static_argnames="one_per_row")
def _merge_batch(lm, saes, best, tokens, token_mask, first_row, *, one_per_row: bool):
    merged, read = [], site_values(lm, saes, tokens)
    for sae, top, x in zip(saes, best, read, strict=True):
        codes = sae.encode(x, sparse=True)
        new = _candidates(codes, token_mask, top.values.shape[1], one_per_row)
        new = dataclasses.replace(new, rows=new.rows + first_row)
        both = jax.tree.map(lambda old, found: jnp.concatenate([old, found], axis=1), top, new)
        _, order = jax.lax.top_k(both.values, top.values.shape[1])
        merged.append(jax.tree.map(lambda part, order=order: jnp.take_along_axis(part, order, axis=1), both))
    finite = [jnp.isfinite(x).all(axis=-1, where=token_mask[..., None]).all() for x in read]
    return tuple(merged), functools.reduce(jnp.logical_and, finite)


def _candidates(codes: SparseCodes, token_mask: Bool[Array, "batch seq"], k: int, one_per_row: bool) -> TopActivations:
    """The activations of a batch that can be among the top, ``-inf`` where there is none."""
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
    """Raises ``ValueError`` for no SAE, or for two of the same name."""
    names = [sae.name for sae in saes]
    if not names:
        raise ValueError("name at least one SAE")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two SAEs are named {', '.join(twice)}: give them different tags, or run them one by one")


def check_feature(sae: SAE, feature) -> int:
    """The feature as an int; ``ValueError`` where the SAE has no such feature."""
    try:
        number = operator.index(feature)
    except TypeError:
        raise ValueError(f"name a feature of SAE {sae.name} by an int, got {feature!r}") from None
    if not 0 <= number < sae.config.n_features:
        raise ValueError(f"SAE {sae.name} has features 0 ... {sae.config.n_features - 1}, got {number}")
    return number


# Activations of chosen rows


@jax.jit
def _sparse_codes(lm: LanguageModel, sae: SAE, tokens: Int[Array, "batch seq"]):
    """The codes, and whether what they are of is finite."""
    x = site_values(lm, [sae], tokens)[0]
    return sae.encode(x, sparse=True), jnp.isfinite(x).all()


def row_codes(lm: LanguageModel, sae: SAE, tokens, rows, batch_size: int = 8) -> SparseCodes:
    """The codes at every position of the named dataset rows, running the model on those rows alone.

    Returns:
        ``SparseCodes`` ``[len(rows), seq, k]``.

    Raises:
        ValueError: for a row that the dataset doesn't have, or a model that gives values that are not finite.
    """
    rows = np.asarray(rows)
    outside = rows[(rows < 0) | (rows >= len(tokens))]
    if outside.size:
        raise ValueError(
            f"row {outside[0]} is none of the dataset's {len(tokens)}: give the tokens that the top activations were "
            "computed on"
        )
    chosen = np.stack([tokens[row] for row in rows])
    parts = []
    for start, batch, _ in token_batches(lm, chosen, None, batch_size):
        codes, finite = _sparse_codes(lm, sae, batch)
        if not finite:
            raise not_finite(start, min(batch_size, len(rows) - start))
        parts.append(codes)
    return jax.tree.map(lambda *part: jnp.concatenate(part)[: len(rows)], *parts)


def feature_codes(codes: SparseCodes, feature: int) -> Float[np.ndarray, "..."]:
    """One feature's activation at every token, 0 where the top-k didn't select it."""
    values, indices = np.asarray(codes.values), np.asarray(codes.indices)
    return np.asarray(np.where(indices == feature, values, 0).sum(axis=-1))


def locate(
    lm: LanguageModel, sae: SAE, tokens, ranked: RankedRows, feature: int, k: int, batch_size: int = 8
) -> TopActivations:
    """Values and positions of one feature's ``k`` largest activations, from published rows.

    The published rows were ranked with position 0 included. Here position 0 and padding don't count, so a row that
    is listed for its first token alone is passed over, and others change places. Rows are run in the published order,
    a batch at a time, until ``k`` are found that no later row can exceed: none has an activation above the largest of
    the last row run, position 0 included.

    Returns:
        ``TopActivations`` of one feature, ``[1, k]``.
    """
    rows = np.asarray(ranked.rows)[check_feature(sae, feature)]
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
    """One safetensors file with ``<SAE name>.values``, ``.rows`` and ``.positions``; whole or not at all.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "top-activations.safetensors"
        >>> one = TopActivations(np.ones((4, 2), np.float32), np.zeros((4, 2), np.int32), np.ones((4, 2), np.int32))
        >>> save_top_activations(path, {"2-mlp-out-x4-k16": one})
        >>> load_top_activations(path)["2-mlp-out-x4-k16"].values.shape
        (4, 2)
    """
    from safetensors.numpy import save

    path = Path(path)
    arrays = {}
    for name, top in tops.items():
        arrays[f"{name}.values"] = np.asarray(top.values, np.float32)
        arrays[f"{name}.rows"] = np.asarray(top.rows, np.int32)
        arrays[f"{name}.positions"] = np.asarray(top.positions, np.int32)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(save(arrays))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


_PUBLISHED_KEY = re.compile(r"\d+-[a-z]+-[a-z]+")


def load_top_activations(path: str | Path) -> dict[str, TopActivations | RankedRows]:
    """Read a file of ``save_top_activations``, or a published ``top-activations.safetensors``.

    The published file has keys ``<layer>-<point>`` of dataset rows ``[n, features]`` and gives ``RankedRows``.

    Raises:
        ValueError: for a file that is cut short, or keys of neither kind.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): compute or download it again") from error
    tops: dict[str, TopActivations | RankedRows] = {}
    for key in sorted(arrays):
        name, _, part = key.rpartition(".")
        if _PUBLISHED_KEY.fullmatch(key) and arrays[key].ndim == 2:
            tops[key] = RankedRows(arrays[key].T)
        elif part == "values" and {f"{name}.rows", f"{name}.positions"} <= arrays.keys():
            tops[name] = TopActivations(arrays[key], arrays[f"{name}.rows"], arrays[f"{name}.positions"])
        elif part not in ("rows", "positions") or f"{name}.values" not in arrays:
            raise ValueError(
                f"{path} holds {key!r}; top activations have keys '<SAE name>.values', '.rows' and '.positions', or "
                "the published '<layer>-<point>'"
            )
    return tops


def find_top(tops: Mapping[str, Any], sae: SAE, where: str) -> TopActivations | RankedRows:
    """One SAE's entry, under its name or under the published ``<layer>-<point>``; ``ValueError`` lists what exists."""
    point = "-".join([str(sae.config.layer), *sae.config.site.split("_")])
    for key in (sae.name, point):
        if key in tops:
            found = tops[key].rows.shape[0]
            if found != sae.config.n_features:
                raise ValueError(
                    f"{key} in {where} is of {found} features, SAE {sae.name} has {sae.config.n_features}: it was "
                    "computed with another SAE; pass tokens= to compute it anew"
                )
            return tops[key]
    raise ValueError(
        f"no top activations of SAE {sae.name} in {where}, which holds: {', '.join(sorted(tops)) or 'nothing'}; "
        "pass tokens= to compute them"
    )
