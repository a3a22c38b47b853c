"""A small training run, for tests that stop it in all sorts of ways; they run it in processes of its own."""

import json
import os
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sae import SAEConfig
from bilinear_jax.nn.transformer import Transformer, TransformerConfig
from bilinear_jax.training.fit import ByStep, TrainState, apply_optimizer, fit
from bilinear_jax.training.sae import fit_saes
from bilinear_jax.training.sae_recipe import SAERecipe

OPTIMIZER = optax.adam(1e-2)
STEPS = 60


def start() -> TrainState:
    """Parameters, an optimiser's moments, a counter and a key: 3 MB, so that writing them takes a while."""
    params = {"w": jax.random.normal(jax.random.key(0), (500, 500)), "b": jnp.zeros(500)}
    extra = {"seen": jnp.zeros((), jnp.int32), "key": jax.random.key(1)}
    return TrainState(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params), extra)


def update(state: TrainState, batch):
    """Every part of the state, if it were lost, would change the parameters."""
    key, noise_key = jax.random.split(state.extra["key"])
    noise = jax.random.normal(noise_key, (500,)) * state.extra["seen"].astype(jnp.float32)

    def loss_of(params):
        return jnp.mean((params["w"] @ batch + params["b"] - noise) ** 2)

    loss, gradient = jax.value_and_grad(loss_of)(state.params)
    params, opt_state = apply_optimizer(OPTIMIZER, gradient, state)
    return TrainState(state.step + 1, params, opt_state, {"seen": state.extra["seen"] + 1, "key": key}), {"loss": loss}


class Buffered:
    """Batches from a buffer, whose state tells what is in it; each takes ``pause`` seconds."""

    def __init__(self, pause: float = 0.0):
        self._buffer, self._drawn, self._pause = list(range(16)), 0, pause

    def __next__(self):
        time.sleep(self._pause)
        place = int(np.random.default_rng(self._drawn).integers(16))
        self._drawn += 1
        seed, self._buffer[place] = self._buffer[place], 16 + self._drawn
        return np.random.default_rng(seed).normal(size=500).astype(np.float32)

    def get_state(self) -> dict:
        return {"buffer": self._buffer, "drawn": self._drawn}

    def set_state(self, state: dict) -> None:
        self._buffer, self._drawn = state["buffer"], state["drawn"]


class FillsTheDisk(Buffered):
    """Once step 30 has been saved, no file may grow past half a megabyte."""

    def __init__(self, directory: Path):
        super().__init__()
        self._saved = directory / "checkpoints" / "30"

    def __next__(self):
        if self._drawn == 31:
            while not self._saved.exists():
                time.sleep(0.001)
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
        return super().__next__()


def share_compiled(directory: Path) -> None:
    """What one process has compiled, those that come after it for folders beside this one need not."""
    jax.config.update("jax_compilation_cache_dir", str(directory.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def train(directory: Path, data: Buffered) -> TrainState:
    share_compiled(directory)
    return fit(update, start(), data, steps=STEPS, directory=directory, config={}, save_every=3, log_every=2)


def train_slowly(directory: Path) -> None:
    train(directory, Buffered(pause=0.01))


def train_on_a_full_disk(directory: Path) -> None:
    """Leaves the error's text in ``error.txt``."""
    try:
        train(directory, FillsTheDisk(directory))
    except OSError as error:
        (directory / "error.txt").write_text(str(error))


def train_saes_on_a_model(directory: Path) -> None:
    """A model fills a buffer of 3 batches, for an SAE with a lookup and a transcoder; saved at every fourth step."""
    share_compiled(directory)
    config = TransformerConfig(n_layer=1, n_head=1, d_model=8, d_hidden=8, n_ctx=8, n_vocab=8)
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.5, leaf.shape), jnp.float32), shapes)
    recipe = SAERecipe(steps=40, batch_size=32, warmup=2, rows=8, buffer_tokens=100, form="gather")
    tokens = random.integers(0, 8, 4000).astype(np.int32)
    product = {"target": "mlp_out", "bilinear_encoder": True, "product_bias": True, "activation": "batchtopk"}
    configs = [SAEConfig("mlp_in", 0, 8, 2, 2, token_lookup=8), SAEConfig("mlp_in", 0, 8, 2, 2, **product)]
    fit_saes(LanguageModel(params, config), configs, recipe, tokens, directory, save_every=4)


class Stopped(Exception):
    """What stops a run at a step."""


def stopped_at(last: int | None, batch_at) -> ByStep:
    """The batches of ``batch_at``, by step, until step ``last`` raises ``Stopped``. None: it never does."""

    def batch(step: int):
        if step == last:
            raise Stopped
        return batch_at(step)

    return ByStep(batch)


# What is in a run's folder


def checkpoints(directory: Path) -> set[str]:
    """Names of the checkpoints, and of those being written."""
    there = directory / "checkpoints"
    return set(os.listdir(there)) if there.exists() else set()


def complete(directory: Path) -> set[str]:
    return {name for name in checkpoints(directory) if name.isdigit()}


def metrics(directory: Path) -> list[dict]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
