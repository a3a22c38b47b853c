"""Shuffled windows of a token stream, for training, and rows of the held-out text.

The stream is usually a token file, see ``store.tokens``.
"""

import functools

import numpy as np
from jaxtyping import Int

from bilinear_jax.training.fit import BatchIterator

_PREFETCHED = 8  # batches prepared ahead


def batches(
    tokens: np.ndarray, n_ctx: int, batch_size: int, seed: int = 0, *, n_vocab: int | None = None
) -> BatchIterator:
    """An endless iterator over shuffled windows of a token stream, int32 ``[batch_size, n_ctx]``.

    Each epoch cuts the stream at a new offset, and gives each window once, in a new order. A batch depends only on the
    arguments and on the number of batches before it, which is the whole state of the iterator. The next batches are
    prepared in the background.

    Memory: 8 batches. The order is computed, not stored.

    Args:
        tokens: the stream, ``[tokens]``; may be memory-mapped.
        n_ctx: tokens per window.
        batch_size: windows per batch.
        seed: the seed of offsets and order, 0 ... 2^32 - 1.
        n_vocab: the vocabulary size of the model that will read the tokens. None: do not check.

    Returns:
        Grain's iterator: ``next(it)``, ``it.get_state()``, ``it.set_state(state)``.

    Raises:
        ValueError: if the stream is too short for one batch or does not consist of integers; from ``next``, for a
            token id outside ``n_vocab``.

    Example:
        >>> source = batches(np.arange(100), n_ctx=10, batch_size=4, seed=1)
        >>> first, state, second = next(source), source.get_state(), next(source)
        >>> source.set_state(state)
        >>> first.shape, bool((next(source) == second).all())
        ((4, 10), True)
    """
    import grain

    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be one stream of integers [tokens], got {tokens.dtype} of shape {tokens.shape}")
    windows = len(tokens) // n_ctx - 1  # one less, so that every offset gives the same number
    if windows < batch_size:
        raise ValueError(
            f"{len(tokens)} tokens are too few for one batch of {batch_size} windows of {n_ctx}: "
            "give more text, or lower batch_size (for SAEs: rows) or n_ctx"
        )

    @functools.lru_cache(maxsize=2)
    def offset(epoch: int) -> int:
        return int(np.random.default_rng([seed, epoch]).integers(n_ctx))

    def cut(position: int, window: int) -> Int[np.ndarray, " n_ctx"]:
        start = offset(position // windows) + window * n_ctx
        found = tokens[start : start + n_ctx]
        if n_vocab is not None and not 0 <= found.min() <= found.max() < n_vocab:
            raise ValueError(
                f"tokens {found.min()} ... {found.max()} at {start:,} lie outside the vocabulary 0 ... {n_vocab - 1}: "
                "tokenise the text again, with the model's own tokenizer"
            )
        return found.astype(np.int32)

    order = grain.MapDataset.range(windows).seed(seed).shuffle().repeat()
    read = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED)
    return iter(order.map_with_index(cut).batch(batch_size).to_iter_dataset(read))


def held_out_rows(tokens: np.ndarray, n_ctx: int) -> Int[np.ndarray, "rows n_ctx"]:
    """The stream cut into consecutive full rows, not shuffled. Raises ``ValueError`` if there is not one full row."""
    rows = len(tokens) // n_ctx
    if rows == 0:
        raise ValueError(f"{len(tokens)} held-out tokens do not fill one row of {n_ctx}: hold out more text")
    return np.asarray(tokens[: rows * n_ctx], dtype=np.int32).reshape(rows, n_ctx)
