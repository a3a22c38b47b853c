"""One of several processes that train together: ``python joined.py DIRECTORY``, joined as the environment says.

Run by ``test_mesh.py``, which runs the same functions on one device and compares.
"""

import json
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sae import SAEConfig
from bilinear_jax.nn.transformer import Transformer, TransformerConfig
from bilinear_jax.training.batches import held_out_rows
from bilinear_jax.training.fit import ByStep, TrainState, fit
from bilinear_jax.training.language import LanguageRecipe, fit_language
from bilinear_jax.training.mesh import OnMesh, join_processes, make_mesh, one_copy, place
from bilinear_jax.training.sae import fit_saes
from bilinear_jax.training.sae_recipe import SAERecipe

CONFIG = TransformerConfig(n_layer=2, n_head=2, d_model=16, d_hidden=32, n_ctx=16, n_vocab=32, pad_id=0)
SAES = [SAEConfig("mlp_in", 0, 16, 4, 4), SAEConfig("mlp_out", 1, 16, 4, 4)]


def stream() -> np.ndarray:
    """Ever larger steps around a circle of 31 tokens, now and then a jump."""
    random = np.random.default_rng(0)
    steps = np.where(random.random(6000) < 0.1, random.integers(1, 31, 6000), np.arange(6000) // 10)
    return (1 + np.cumsum(steps) % 31).astype(np.int32)


def weights():
    """Those of a model, without the seconds that it takes to compile their initialisation."""
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(Transformer(CONFIG).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.2, leaf.shape), jnp.float32), shapes)


def train_lm(directory: Path, mesh) -> list[dict]:
    """The metrics, without the seconds."""
    recipe = LanguageRecipe(steps=6, batch_size=8, warmup=2, compute_dtype="float32", accumulation=2)
    held_out = held_out_rows(stream()[:200], CONFIG.n_ctx)
    options = dict(params=weights(), mesh=mesh, save_every=3, evaluate_every=2)
    fit_language(CONFIG, recipe, stream(), held_out, directory, **options)
    return metrics(directory)


def train_sae(directory: Path, mesh) -> list[dict]:
    recipe = SAERecipe(steps=6, batch_size=64, lr=1e-2, warmup=2, rows=8, buffer_tokens=256, form="gather")
    saes = fit_saes(LanguageModel(weights(), CONFIG), SAES, recipe, stream(), directory, mesh=mesh)
    codes = [sae.encode(jnp.ones((1, 16))) for sae in saes]
    return [{"codes": np.asarray(code).tolist()} for code in codes] + metrics(directory)


def metrics(directory: Path) -> list[dict]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def start() -> TrainState:
    params = {"w_l": jax.random.normal(jax.random.key(0), (8, 6))}
    return TrainState(jnp.zeros((), jnp.int32), params, (), {"key": jax.random.key(1)})


def update(state: TrainState, batch):
    key, noise = jax.random.split(state.extra["key"])

    def loss_of(params):
        return jnp.mean((batch @ params["w_l"].T + jax.random.normal(noise, (8,))[None]) ** 2)

    loss, gradient = jax.value_and_grad(loss_of)(state.params)
    params = jax.tree.map(lambda weight, slope: weight - 0.1 * slope, state.params, gradient)
    return TrainState(state.step + 1, params, (), {"key": key}), {"loss": loss}


def train_until_told(directory: Path, mesh, stop_at: int | None = None) -> np.ndarray:
    """Ten steps, logged at every third; process 1 tells itself to stop in step ``stop_at``."""

    def batch_at(step: int):
        if step == stop_at and jax.process_index() == 1:
            signal.raise_signal(signal.SIGTERM)
        return np.random.default_rng(step).normal(size=(8, 6)).astype(np.float32)

    state = place(start(), mesh)
    data = OnMesh(ByStep(batch_at), mesh)
    end = fit(update, state, data, steps=10, directory=directory, config={}, save_every=4, log_every=3)
    return np.asarray(one_copy(end.params["w_l"], mesh))


if __name__ == "__main__":
    join_processes(timeout=60)
    mesh = make_mesh(data=2, model=2)
    directory = Path(sys.argv[1])
    found = {"lm": train_lm(directory / "lm", mesh), "sae": train_sae(directory / "sae", mesh)}
    (directory / f"{jax.process_index()}.json").write_text(json.dumps(found))
    train_until_told(directory / "stopped", mesh, stop_at=4)
