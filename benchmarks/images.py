"""Five image classifiers at once against five runs of the same loop in plain torch, in the same process.

MNIST's shape: 60,000 images of 784 pixels, 256 hidden units, 10 classes, batches of 2048, noise of 0.5 on every pixel,
AdamW with weight decay, 29 updates an epoch; random images, for speed doesn't depend on them. Seconds are those of an
epoch of all five models; a run of 100 epochs is 100 times as much. Torch's loop takes its batches from a DataLoader, as
the published code does ("torch"), and from tensors indexed by a permutation, its fastest form ("torch, indexed").

    python benchmarks/images.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from measure import best_of, case, report

from bilinear_jax.nn.image import ImageConfig
from bilinear_jax.training.images import ImageRecipe, image_state, image_update

CONFIG = ImageConfig()
RECIPES = [ImageRecipe(seed=seed) for seed in range(5)]


def our_epoch(images, labels):
    """A function that does the next epoch of all models; and the memory that it takes."""
    state, batch = image_state(CONFIG, RECIPES), (jnp.asarray(images), jnp.asarray(labels))
    update = jax.jit(image_update(CONFIG, RECIPES), donate_argnums=0).lower(state, batch).compile()
    memory = update.memory_analysis()

    def epoch():
        nonlocal state
        state, metrics = update(state, batch)
        jax.block_until_ready(state)
        return metrics

    return epoch, memory.argument_size_in_bytes + memory.temp_size_in_bytes


def torch_epochs(images, labels):
    """Functions that do the next epoch of five torch models, one after another, by both ways of taking batches."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(CONFIG.n_inputs, CONFIG.d_hidden, bias=False)
            self.layer = nn.Linear(CONFIG.d_hidden, 2 * CONFIG.d_hidden, bias=False)
            self.head = nn.Linear(CONFIG.d_hidden, CONFIG.n_classes, bias=False)

        def forward(self, x):
            left, right = self.layer(self.embed(x)).chunk(2, dim=-1)
            return self.head(left * right)

    recipe = RECIPES[0]
    models = [Classifier() for _ in RECIPES]
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay) for model in models
    ]
    x, y = torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()
    loader = DataLoader(TensorDataset(x, y), recipe.batch_size, shuffle=True, drop_last=True)

    def indexed():
        batches = len(x) // recipe.batch_size
        for chosen in torch.randperm(len(x))[: batches * recipe.batch_size].view(batches, -1):
            yield x[chosen], y[chosen]

    def epoch(batches):
        for model, optimizer in zip(models, optimizers, strict=True):
            for some, targets in batches():
                loss = nn.functional.cross_entropy(model(some + recipe.noise * torch.randn_like(some)), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    return {"torch": lambda: epoch(lambda: loader), "torch, indexed": lambda: epoch(indexed)}


def main():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60_000, CONFIG.n_inputs), dtype=np.uint8)
    labels = rng.integers(0, CONFIG.n_classes, len(images), dtype=np.int32)
    ours, peak = our_epoch(images, labels)
    functions = {"ours": ours}
    try:
        functions |= torch_epochs(images, labels)
    except ImportError:
        print("torch is not installed: measuring ours alone")
    seconds = best_of(3, functions)
    print(f"ours: {seconds['ours'] / len(RECIPES):.3f} s an epoch of one model")
    name = "an epoch of 5 models"
    cases = [case(name, other, seconds[other], seconds["ours"], 0.0, peak) for other in functions if other != "ours"]
    report("images", cases)


if __name__ == "__main__":
    main()
