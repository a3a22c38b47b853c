"""The optimiser of SAEs: an Optax transformation around another one that keeps decoder columns at unit length."""

import jax
import jax.numpy as jnp
import optax


def unit_decoder(
    inner: optax.GradientTransformation, name: str = "w_dec", axis: int = -2
) -> optax.GradientTransformation:
    """An optimiser that keeps decoder columns at unit length.

    For every leaf called ``name``, with columns w along ``axis``: the gradient g becomes ``g - (g . w) w`` before
    ``inner`` gets it, and the update u from ``inner`` becomes ``(w + u) / |w + u| - w``. Other leaves go to ``inner``
    unchanged. The initial columns must have unit length, as those of ``SAE.init`` do. The state is that of ``inner``.

    Args:
        inner: the optimiser to wrap.
        name: the name of the decoder leaves.
        axis: the axis of ``d_model``: -2 in the published orientation ``[d_model, features]``.

    Raises:
        ValueError: if ``update`` is called without ``params``, or if no leaf has the name.

    Example:
        >>> optimizer = unit_decoder(optax.sgd(1.0))
        >>> params, gradient = {"w_dec": jnp.array([[1.0], [0.0]])}, {"w_dec": jnp.array([[5.0], [-1.0]])}
        >>> updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        >>> optax.apply_updates(params, updates)["w_dec"].T
        Array([[0.70710677, 0.70710677]], dtype=float32)

    Source: the bilinear-MLP paper, appendix on SAE training; Bricken et al. 2023.
    """

    def is_decoder(path) -> bool:
        return bool(path) and getattr(path[-1], "key", None) == name

    def perpendicular(path, g, w):
        return g - w * jnp.sum(g * w, axis=axis, keepdims=True) if is_decoder(path) else g

    def to_the_sphere(path, u, w):
        if not is_decoder(path):
            return u
        moved = w + u
        length = jnp.sqrt(jnp.sum(moved**2, axis=axis, keepdims=True))
        return moved / jnp.maximum(length, jnp.finfo(moved.dtype).tiny) - w

    def init(params):
        if not any(is_decoder(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)):
            raise ValueError(
                f"unit_decoder found no leaf called {name!r} among the params: pass the name of the decoder"
            )
        return inner.init(params)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("unit_decoder needs the params: call update(gradient, state, params)")
        updates = jax.tree_util.tree_map_with_path(perpendicular, updates, params)
        updates, state = inner.update(updates, state, params)
        return jax.tree_util.tree_map_with_path(to_the_sphere, updates, params), state

    return optax.GradientTransformation(init, update)
