"""Five image classifiers at once, against five runs of the same loop in plain torch in the same process.

MNIST's shape: 60,000 images of 784 pixels, 256 hidden units, 10 classes, batches of 2048, noise of 0.5 on every pixel,
AdamW with weight decay, 29 updates per epoch. The images are random, which does not change the speed. Seconds are those
of one epoch of all five models; a run of 100 epochs takes 100 times as long. Torch's loop takes its batches from a
DataLoader, as the published code does ("torch"), or from tensors indexed by a permutation, its fastest form ("torch,
indexed").

The largest relative error is that of the parameters of one model, divided by the largest entry of each, after ten
updates from the same initial values, on the same batches with the same noise.

    python benchmarks/images.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from measure import best_of, case, report

from bilinear_jax.nn.image import ImageConfig, unit_range
from bilinear_jax.training.images import ImageRecipe, image_state, image_update
from bilinear_jax.training.noise import pixel_noise

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


def torch_model():
    """The classifier as a torch module."""
    import torch
    from torch import nn

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(CONFIG.n_inputs, CONFIG.d_hidden, bias=False)
            self.layer = nn.Linear(CONFIG.d_hidden, 2 * CONFIG.d_hidden, bias=False)
            self.head = nn.Linear(CONFIG.d_hidden, CONFIG.n_classes, bias=False)

        def forward(self, x):
            left, right = self.layer(self.embed(x)).chunk(2, dim=-1)
            return self.head(left * right)

    recipe, model = RECIPES[0], Classifier()
    return model, torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)


def torch_update(model, optimizer, x, y):
    import torch

    loss = torch.nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def error(images, labels, updates=10):
    """How far our parameters are from torch's after some updates of one epoch, on our batches with our noise."""
    import torch

    recipe = RECIPES[0]
    images, labels = images[: updates * recipe.batch_size], labels[: updates * recipe.batch_size]
    state = image_state(CONFIG, [recipe])
    model, optimizer = torch_model()
    start = jax.tree.map(lambda leaf: np.array(leaf[0]), state.params)
    layer = np.concatenate([start["layers"][name][0] for name in ("w_l", "w_r")])
    with torch.no_grad():
        for part, weight in ((model.embed, start["w_e"]), (model.layer, layer), (model.head, start["w_u"])):
            part.weight.copy_(torch.from_numpy(weight))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(recipe.seed), 1), 0)
    order = np.array(jax.random.permutation(key, len(images))).reshape(updates, -1)
    for place, chosen in enumerate(order):
        x = unit_range(jnp.asarray(images[chosen]))
        x = x + recipe.noise * pixel_noise(jax.random.fold_in(key, place), x.shape)
        torch_update(model, optimizer, torch.from_numpy(np.array(x)), torch.from_numpy(labels[chosen]).long())
    state, _ = jax.jit(image_update(CONFIG, [recipe]))(state, (jnp.asarray(images), jnp.asarray(labels)))
    left, right = model.layer.weight.detach().chunk(2)
    pairs = [
        (state.params["w_e"][0], model.embed.weight.detach()),
        (state.params["layers"]["w_l"][0, 0], left),
        (state.params["layers"]["w_r"][0, 0], right),
        (state.params["w_u"][0], model.head.weight.detach()),
    ]
    return max(float(np.abs(np.asarray(a) - b.numpy()).max() / np.abs(b.numpy()).max()) for a, b in pairs)


def torch_epochs(images, labels):
    """Functions that do the next epoch of five torch models, one after another, by both ways of taking batches."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    recipe, models = RECIPES[0], [torch_model() for _ in RECIPES]
    x, y = torch.from_numpy(images).float() / 255, torch.from_numpy(labels).long()
    loader = DataLoader(TensorDataset(x, y), recipe.batch_size, shuffle=True, drop_last=True)

    def indexed():
        batches = len(x) // recipe.batch_size
        for chosen in torch.randperm(len(x))[: batches * recipe.batch_size].view(batches, -1):
            yield x[chosen], y[chosen]

    def epoch(batches):
        for model, optimizer in models:
            for some, targets in batches():
                torch_update(model, optimizer, some + recipe.noise * torch.randn_like(some), targets)

    return {"torch": lambda: epoch(lambda: loader), "torch, indexed": lambda: epoch(indexed)}


def main():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60_000, CONFIG.n_inputs), dtype=np.uint8)
    labels = rng.integers(0, CONFIG.n_classes, len(images), dtype=np.int32)
    ours, peak = our_epoch(images, labels)
    functions, off = {"ours": ours}, 0.0
    try:
        functions |= torch_epochs(images, labels)
        off = error(images, labels)
    except ImportError:
        print("torch is not installed: measuring ours alone")
    seconds = best_of(3, functions)
    print(f"ours: {seconds['ours'] / len(RECIPES):.3f} s an epoch of one model")
    name = "an epoch of 5 models"
    cases = [case(name, other, seconds[other], seconds["ours"], off, peak) for other in functions if other != "ours"]
    report("images", cases)


if __name__ == "__main__":
    main()
