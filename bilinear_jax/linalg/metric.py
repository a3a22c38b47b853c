"""The metric of data: inputs of second moment C, as coordinates in which they are white.

    C = E[x x^T] = root root^T        x = root s, with E[s s^T] = 1        s = inverse^T x

The eigenpairs of a form x^T Q x by weight treat all directions x alike. The data does not: it has large components
along some directions and hardly any along others. In the data's metric the form is that of s, ``root^T Q root = sum_i
l_i w_i w_i^T``, so that

    x^T Q x = sum_i l_i (p_i . x)^2        p_i = inverse w_i    what to look for in x; E[(p_i . x)^2] = 1
                                           a_i = root w_i       what the data has there: a_i = E[x (p_i . x)] = C p_i

and ``l_i`` is what part i adds to the form on average. The p_i are called filters elsewhere, and the a_i patterns. If x
is Gaussian with mean 0, no other k squares leave less of the form's variance unexplained than those of the k largest
``|l_i|``.

Source: Haufe et al. 2014, "On the interpretation of weight vectors of linear models in multivariate neuroimaging", for
filters and patterns; the rest is the generalised eigenproblem ``Q a = l C^-1 a``.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bilinear_jax.linalg.devices import one_blas_thread

RTOL = 1e-6
"""Directions in which the data has less than this part of its largest second moment are left out."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["root", "inverse", "kept", "shrink"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Metric:
    """The metric of data, made by ``Metric.of``; a pytree. Several of the same rank can be stacked."""

    root: Float[Array, "*U in rank"]  # root root^T is the part of C in the kept directions
    inverse: Float[Array, "*U in rank"]  # inverse^T root = 1, and inverse = C^+ root
    kept: Float[Array, "*U"]  # the share of the trace of C in the kept directions: 1 if all were kept
    shrink: Float[Array, "*U"]  # the share of C that was replaced by an even metric of the same trace

    @staticmethod
    def of(moment: Any, *, rank: int | None = None, shrink: float = 0.0) -> "Metric":
        """The metric of a second moment, decomposed in float64 on the host.

            C' = (1 - shrink) C + shrink (trace C / in) 1

        Args:
            moment: C ``[in, in]``, symmetric and with no negative eigenvalue, up to rounding.
            rank: keep the directions of the largest moments only, at most this many. None: all with at least
                ``RTOL`` of the largest.
            shrink: from 0 to 1: 0 is the data's metric, 1 the one by weight. A little helps where C was measured on few
                tokens.

        Raises:
            ValueError: if the moment is not a matrix as described, is 0 or not finite; if rank or shrink is out of
                range.

        Example:
            >>> metric = Metric.of(jnp.diag(jnp.array([4.0, 0.25, 0.0])))
            >>> metric.root.shape, float(metric.kept)
            ((3, 2), 1.0)
            >>> (metric.inverse.T @ metric.root).tolist()
            [[1.0, 0.0], [0.0, 1.0]]
        """
        c = _checked(moment)
        if not 0 <= shrink <= 1:
            raise ValueError(f"shrink is {shrink}, but it must be between 0 (the data's metric) and 1 (by weight)")
        if rank is not None and not 1 <= rank <= len(c):
            raise ValueError(f"rank is {rank}, but it must be between 1 and {len(c)} (the number of inputs)")
        with one_blas_thread():
            values, vectors = np.linalg.eigh((1 - shrink) * c + shrink * np.trace(c) / len(c) * np.eye(len(c)))
        values, vectors = values[::-1], vectors[:, ::-1]
        if values[-1] < -1e-4 * values[0]:
            raise ValueError("the second moment has a negative eigenvalue, which no E[x x^T] has")
        number = min(int(np.sum(values > RTOL * values[0])), len(c) if rank is None else rank)
        sizes, vectors = np.sqrt(values[:number]), vectors[:, :number]
        return Metric(
            root=jnp.asarray(vectors * sizes, jnp.float32),
            inverse=jnp.asarray(vectors / sizes, jnp.float32),
            kept=jnp.asarray(values[:number].sum() / np.maximum(values, 0).sum(), jnp.float32),
            shrink=jnp.asarray(shrink, jnp.float32),
        )

    @property
    def n_in(self) -> int:
        """Number of inputs."""
        return self.root.shape[-2]


def as_metric(given: Any) -> Metric:
    """A ``Metric`` as it is; of a second moment ``[in, in]``, its metric with all directions."""
    return given if isinstance(given, Metric) else Metric.of(given)


def _checked(moment: Any) -> Float[np.ndarray, "in in"]:
    c = np.asarray(moment)
    if c.ndim != 2 or c.shape[0] != c.shape[1] or not c.size or not np.issubdtype(c.dtype, np.floating):
        raise ValueError(
            f"the second moment is {c.dtype} of shape {c.shape}, but it must be a matrix of real numbers [in, in]"
        )
    c = c.astype(np.float64)
    if not np.isfinite(c).all():
        raise ValueError("the second moment holds values that are not finite")
    largest = np.abs(c).max()
    if not largest:
        raise ValueError("the second moment is 0: measure it on tokens at which the input is not 0")
    if np.abs(c - c.T).max() > 1e-4 * largest:
        raise ValueError("the second moment is not symmetric: give E[x x^T], for inputs x as columns")
    c = (c + c.T) / 2
    return c
