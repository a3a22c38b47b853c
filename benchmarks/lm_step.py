"""Tokens per second of a whole training step, against a plain torch model of the same shape in the same process.

The published TinyStories shape (29M parameters: 6 layers, width 512, context 256), float32, 8 x 256 tokens, all cores.
A step is forward, backward, clipping to norm 1, and AdamW. Torch runs eagerly, with its fused AdamW. The error is the
largest relative difference of the loss over the first four steps, from the same parameters.

    python benchmarks/lm_step.py
"""

import jax
import numpy as np
from forward import torch_model
from measure import best_of, case, report

from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.training.language import LanguageRecipe, initial_state, language_update

CONFIG = TransformerConfig(n_layer=6, n_head=8, d_model=512, d_hidden=2048, n_ctx=256, n_vocab=4096)
RECIPE = LanguageRecipe(steps=1000, batch_size=8, warmup=1)


def our_step(state, tokens):
    """A function that does the next step, and returns its loss; and the memory that it takes."""
    update = jax.jit(language_update(CONFIG, RECIPE), donate_argnums=0).lower(state, tokens).compile()
    memory = update.memory_analysis()

    def step():
        nonlocal state
        state, metrics = update(state, tokens)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step, memory.argument_size_in_bytes + memory.temp_size_in_bytes


def torch_step(params, tokens):
    import torch
    import torch.nn.functional as F

    model = torch_model(CONFIG, params)
    tokens = torch.from_numpy(tokens).long()
    targets = torch.roll(tokens, -1, dims=1)
    targets[:, -1] = -100  # counts for nothing
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RECIPE.lr, betas=RECIPE.betas, weight_decay=RECIPE.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(RECIPE.rate(1.0)(step)))

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE.clip)
        optimizer.step()
        schedule.step()
        return loss.item()

    return step


def main():
    tokens = np.random.default_rng(0).integers(0, CONFIG.n_vocab, (RECIPE.batch_size, CONFIG.n_ctx), dtype=np.int32)
    state = initial_state(CONFIG, RECIPE)
    functions, traces = {}, {}

    def follow(name, step):
        traces[name] = []
        functions[name] = lambda: traces[name].append(step())

    try:
        follow("torch", torch_step(jax.tree.map(np.array, state.params), tokens))
    except ImportError:
        print("torch is not installed: measuring ours alone")
    step, peak = our_step(state, tokens)
    follow("ours", step)
    seconds = best_of(5, functions)
    for name, value in seconds.items():
        print(f"{name}: {tokens.size / value:.0f} tokens/s")
    cases = []
    if "torch" in functions:
        ours, theirs = (np.asarray(traces[name][:4]) for name in ("ours", "torch"))
        error = float(np.max(np.abs(ours / theirs - 1)))
        shape = f"{RECIPE.batch_size} x {CONFIG.n_ctx} tokens"
        cases = [case(shape, "torch", seconds["torch"], seconds["ours"], error, peak)]
    report("lm_step", cases)


if __name__ == "__main__":
    main()
