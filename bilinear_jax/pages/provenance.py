"""Where the numbers of a site come from: hashes of the model, the SAEs, the tokenizer and the dataset."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
from jaxtyping import PyTree

from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.pages.facts import Provenance
from bilinear_jax.store.tokenizers import tokenizer_hash
from bilinear_jax.store.version import library_version


def hash_of(params: PyTree, config=None) -> str:
    """The sha256 of named arrays, sorted by name (their values, types and shapes), and of their config.

    Equal parameters have the same hash, wherever they were loaded from.

    Example:
        >>> hash_of({"a": np.ones(2), "b": np.zeros(1)}) == hash_of({"b": np.zeros(1), "a": np.ones(2)})
        True
        >>> hash_of({"a": np.ones(2)}) == hash_of({"a": np.ones((2, 1))})
        False
    """
    digest = hashlib.sha256()
    if config is not None:
        digest.update(json.dumps(dataclasses.asdict(config), sort_keys=True, default=str).encode())
    leaves = ((jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params))
    for name, leaf in sorted(leaves, key=lambda one: one[0]):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype.newbyteorder('<').str} {array.shape}".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def provenance(tracer: Tracer, tokens, *, counted: int, command: str, dataset: str) -> Provenance:
    """The ``Provenance`` of a site. ``tokens [rows, seq]``: those over which the numbers were measured."""
    lm, tokens = tracer.lm, np.asarray(tokens)
    return Provenance(
        command=command,
        version=library_version(),
        model="a model in memory" if lm.source is None else str(lm.source),
        model_hash=hash_of(lm.params, lm.config),
        layer=tracer.layer,
        inp=tracer.inp.name,
        inp_hash=hash_of(tracer.inp.params, tracer.inp.config),
        out=tracer.out.name,
        out_hash=hash_of(tracer.out.params, tracer.out.config),
        tokenizer_hash=tokenizer_hash(lm.tokenizer),
        dataset=dataset,
        dataset_hash=hash_of(tokens.astype(np.int32)),
        rows=len(tokens),
        tokens=counted,
    )
