"""The rows that a dictionary with ``token_lookup`` adds to its reconstruction, one for each token id."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer as JaxTracer
from jaxtyping import Array, Float


def rows_of(
    table: Float[Array, "ids d_model"], tokens: Any, shape: tuple[int, ...], name: str
) -> Float[Array, "*shape d_model"]:
    """The row of each token of dictionary ``name``. An id without a row is an error, or NaN if ids are traced.

    Raises:
        ValueError: without tokens; unless they are integers of this shape; and for an id without a row.
    """
    rows = len(table)
    if tokens is None:
        raise ValueError(
            f"SAE {name} adds a row for each of {rows} tokens, but no tokens are given: call sae(x, tokens) or "
            "decode(codes, x, tokens), with the token id of each vector"
        )
    ids = tokens if isinstance(tokens, JaxTracer) else np.asarray(tokens)  # JAX would first cut them to 32 bits
    if ids.shape != shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"tokens have type {ids.dtype} and shape {ids.shape}, but SAE {name} needs integers of shape {shape}: give "
            "the token id of each vector"
        )
    if isinstance(ids, np.ndarray) and ids.size and not 0 <= ids.min() <= ids.max() < rows:
        raise ValueError(
            f"tokens have ids {ids.min()} ... {ids.max()}, but SAE {name} has rows for 0 ... {rows - 1}: give those of "
            "the model that it was trained on"
        )
    return table.at[jnp.asarray(ids)].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
