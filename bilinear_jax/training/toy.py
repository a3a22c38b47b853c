"""The recipe for toy models: mean squared error on random inputs, for many seeds in one call."""

import dataclasses
import math
import tempfile
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from bilinear_jax.nn.configs import check_types
from bilinear_jax.nn.toy import Toy, ToyConfig, toy_targets
from bilinear_jax.nn.transformer import run_module
from bilinear_jax.store.fields import COUNT, Rule, check_fields
from bilinear_jax.training.fit import ByStep, TrainState, apply_optimizer, cosine_with_warmup, fit

STEPS_TOGETHER = 100
"""Number of updates in one program."""


@dataclasses.dataclass(frozen=True)
class ToyRecipe:
    """How to train a toy model."""

    steps: int = 2000  # updates, a multiple of 100
    batch_size: int = 256  # random inputs per update, each 1 with probability 1/2
    lr: float = 1e-2  # largest learning rate of Adam; it follows a cosine to 0

    def __post_init__(self):
        check_types(self)
        whole = Rule(f"must be a multiple of {STEPS_TOGETHER}", lambda n: n >= 1 and n % STEPS_TOGETHER == 0)
        check_fields(self, whole, "steps")
        check_fields(self, COUNT, "batch_size")
        check_fields(self, Rule("must be a positive number", lambda x: 0 < x < math.inf), "lr")


def train_toy(config: ToyConfig, recipe: ToyRecipe | None = None, seeds: Sequence[int] = (0,)) -> PyTree:
    """Train toy models of several seeds under one ``vmap``. Returns the params of ``Toy``, ``[seeds, ...]``.

    Example:
        >>> from bilinear_jax.tensor import BilinearTensor
        >>> params = jax.tree.map(lambda leaf: leaf[0], train_toy(ToyConfig(n_inputs=3)))
        >>> tensor = BilinearTensor(params["w_l"], params["w_r"], params["w_p"])
        >>> q = tensor.interaction(jnp.eye(3)[:1])[0]  # output 0 is the AND of inputs 0 and 1: x_0 x_1
        >>> bool(jnp.allclose(q, jnp.array([[0.0, 0.5, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]), atol=0.02))
        True
    """
    recipe = ToyRecipe() if recipe is None else recipe
    if not len(seeds):
        raise ValueError("there are no seeds: give at least one")
    optimizer = optax.adam(cosine_with_warmup(recipe.lr, recipe.steps, 10))
    module = Toy(config)
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])

    def loss(params, x):
        return jnp.mean((run_module(module, params, x) - toy_targets(config, x)) ** 2)

    def step(model, number):
        params, opt_state, key = model
        shape = (recipe.batch_size, config.n_inputs)
        x = jax.random.bernoulli(jax.random.fold_in(key, number), shape=shape).astype(jnp.float32)
        value, gradient = jax.value_and_grad(loss)(params, x)
        return (*apply_optimizer(optimizer, gradient, TrainState(number, params, opt_state)), key), value

    def some_steps(params, opt_state, key, first):
        (params, opt_state, _), losses = jax.lax.scan(
            step, (params, opt_state, key), first + jnp.arange(STEPS_TOGETHER)
        )
        return params, opt_state, losses[-1]

    def update(state: TrainState, _):
        first = state.step * STEPS_TOGETHER
        params, opt_state, losses = jax.vmap(some_steps, (0, 0, 0, None))(state.params, state.opt_state, keys, first)
        return TrainState(state.step + 1, params, opt_state), {"loss": losses.mean()}

    params = jax.jit(jax.vmap(lambda key: module.init(key, jnp.zeros(config.n_inputs))["params"]))(keys)
    start = TrainState(jnp.zeros((), jnp.int32), params, jax.vmap(optimizer.init)(params))
    described = {"config": dataclasses.asdict(config), "recipe": dataclasses.asdict(recipe), "seeds": list(seeds)}
    steps = recipe.steps // STEPS_TOGETHER
    with tempfile.TemporaryDirectory() as folder:
        return fit(
            update, start, ByStep(lambda _: ()), steps=steps, directory=folder, config=described, name="toy models"
        ).params
