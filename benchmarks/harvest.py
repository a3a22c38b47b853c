"""Tokens per second through the activation buffer: all mlp_in and mlp_out sites at once, against one by one.

A model of the published TinyStories shape (6 layers, width 512, context 256) with random weights, float32; 4 rows per
forward pass, a buffer of 8192 tokens, all cores. "One by one" harvests the same tokens once for each of the 12 sites
and computes no layer after the site, as a separate run for each SAE does. Both fill the same chunks and serve all of
their batches.

    python benchmarks/harvest.py      # ratio: seconds of one by one / ours

Peak memory is that of the forward pass that fills the buffer, as XLA reports it: parameters, buffer and intermediate
values. The error is the largest difference between the two batches, divided by the largest entry of each site.
"""

import jax
import numpy as np
from measure import best_of, case, random_params, report

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.training import harvest
from bilinear_jax.training.batches import batches

CONFIG = TransformerConfig(n_layer=6, n_head=8, d_model=512, d_hidden=2048, n_ctx=256, n_vocab=4096)
SITES = [(name, layer) for layer in range(CONFIG.n_layer) for name in ("mlp_in", "mlp_out")]
ROWS, BATCH, BUFFER = 4, 1024, 8192


def peak_bytes(lm: LanguageModel, buffers) -> int:
    tokens = jax.ShapeDtypeStruct((ROWS, CONFIG.n_ctx), np.int32)
    filled = jax.ShapeDtypeStruct((), np.int32)
    memory = harvest._write.lower(lm, buffers, filled, tokens, None, None).compile().memory_analysis()
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return size - memory.alias_size_in_bytes


def main():
    lm = LanguageModel(random_params(CONFIG), CONFIG)
    stream = np.random.default_rng(0).integers(0, CONFIG.n_vocab, 200_000)

    def source(sites):
        return harvest.Harvest(lm, sites, batches(stream, CONFIG.n_ctx, ROWS), BATCH, BUFFER)

    together, apart = source(SITES), [source([site]) for site in SITES]
    last = {}

    def all_at_once():
        for _ in range(BUFFER // BATCH):
            last["together"] = jax.block_until_ready(next(together))

    def one_by_one():
        last["apart"] = {}
        for one in apart:
            for _ in range(BUFFER // BATCH):
                batch = jax.block_until_ready(next(one))
            last["apart"] |= batch

    seconds = best_of(2, {"one by one": one_by_one, "ours": all_at_once})
    for name, value in seconds.items():
        print(f"{name}: {together.size / value:.0f} tokens/s, each at {len(SITES)} sites")
    pairs = [(np.asarray(last["together"][site]), np.asarray(last["apart"][site])) for site in SITES]
    error = max(float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))) for ours, theirs in pairs)
    peak = peak_bytes(lm, together._buffers)
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
    print(f"peak {peak / 2**20:.0f} MiB: buffer {together.nbytes / 2**20:.0f}, parameters {parameters / 2**20:.0f}")
    name = f"{len(SITES)} sites, chunks of {together.size} tokens"
    report("harvest", [case(name, "one by one", seconds["one by one"], seconds["ours"], error, peak)])


if __name__ == "__main__":
    main()
