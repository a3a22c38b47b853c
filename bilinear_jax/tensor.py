"""A bilinear layer is a third-order tensor that is never formed: this file is the whole method.

The layer ``y = down ((left x) * (right x))``, with ``*`` elementwise, is the tensor

    B[o, i, j] = sum_m  down[o, m] left[m, i] right[m, j]

and ``BilinearTensor`` keeps the three factors. An output direction u turns it into a quadratic form, which is what
the layer writes along u, exactly, for every input:

    u . y = x^T Q_u x        Q_u = 1/2 (left^T diag(g) right + right^T diag(g) left)        g = down^T u

The eigenvectors of the interaction matrix Q_u are the input patterns that raise u . y (positive eigenvalues) and
that lower it (negative ones). Only the symmetric part ever acts on ``x x^T``, so that is what Q_u is.

Three moves make everything else: a change of input basis multiplies ``left`` and ``right`` from the right; a change
of output basis multiplies ``down`` from the left; a bias is one more input coordinate, which is always 1.

Axes: ``in`` inputs, ``hidden`` hidden units, ``out`` outputs, ``U`` output directions, ``new`` a new basis,
``rank`` the smaller of ``in`` and ``new``.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", sections 3 and 4.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class BilinearTensor:
    """The three factors of a bilinear layer; a pytree, so it can be an argument of ``jit``, ``vmap`` and ``grad``.

    Raises:
        ValueError: when it is made of factors whose shapes don't fit each other.

    Example:
        The layer y = x_0 x_1, and its interaction matrix:

        >>> tensor = BilinearTensor(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([[1.0]]))
        >>> float(tensor.apply(jnp.array([3.0, 5.0]))[0])
        15.0
        >>> tensor.interaction(jnp.array([[1.0]]))[0].tolist()
        [[0.0, 0.5], [0.5, 0.0]]
    """

    left: Float[Array, "hidden in"]
    right: Float[Array, "hidden in"]
    down: Float[Array, "out hidden"]

    def __post_init__(self):
        for name in ("left", "right", "down"):
            object.__setattr__(self, name, jnp.asarray(getattr(self, name)))
        left, right, down = self.left.shape, self.right.shape, self.down.shape
        if len(left) != 2 or left != right:
            raise ValueError(f"left and right are matrices of one shape [hidden, in], got {left} and {right}")
        if len(down) != 2 or down[1] != left[0]:
            raise ValueError(f"down is [out, hidden] with hidden = {left[0]} as in left {left}, got {down}")

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in ("left", "right", "down")], None

    @classmethod
    def tree_unflatten(cls, _, factors):
        # JAX rebuilds pytrees around placeholders and batched factors, so nothing is checked here.
        tensor = object.__new__(cls)
        for name, factor in zip(("left", "right", "down"), factors, strict=True):
            object.__setattr__(tensor, name, factor)
        return tensor

    @staticmethod
    def from_mlp(
        left: Float[Array, "hidden in"],
        right: Float[Array, "hidden in"],
        down: Float[Array, "out hidden"],
        b_left: Float[Array, " hidden"] | None = None,
        b_right: Float[Array, " hidden"] | None = None,
        b_down: Float[Array, " out"] | None = None,
    ) -> "BilinearTensor":
        """The layer ``y = down ((left x + b_left) * (right x + b_right)) + b_down`` as one tensor.

        With any bias it has one more input, the last one, which is always 1 (``with_constant`` appends it):
        ``b_left`` and ``b_right`` become the last columns of left and right, and ``b_down`` the effect of one more
        hidden unit, constant * constant. Without biases it has the inputs of the layer.

        Example:
            >>> one = jnp.ones((1, 1))
            >>> tensor = BilinearTensor.from_mlp(one, one, one, jnp.array([2.0]), jnp.array([3.0]), jnp.array([4.0]))
            >>> float(tensor.apply(with_constant(jnp.array([5.0])))[0])  # (5 + 2) (5 + 3) + 4
            60.0
        """
        if b_left is None and b_right is None and b_down is None:
            return BilinearTensor(left, right, down)
        hidden, inputs = left.shape

        def with_bias(weight, bias):
            return jnp.concatenate([weight, (jnp.zeros(hidden, weight.dtype) if bias is None else bias)[:, None]], 1)

        left, right = with_bias(left, b_left), with_bias(right, b_right)
        if b_down is not None:
            constant = jnp.zeros((1, inputs + 1), left.dtype).at[0, -1].set(1)
            left, right = jnp.concatenate([left, constant]), jnp.concatenate([right, constant])
            down = jnp.concatenate([down, b_down[:, None]], 1)
        return BilinearTensor(left, right, down)

    @property
    def n_in(self) -> int:
        """Number of inputs, the constant one included."""
        return self.left.shape[-1]

    @property
    def n_out(self) -> int:
        """Number of outputs."""
        return self.down.shape[-2]

    def apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """``y = down ((left x) * (right x))``: the layer itself."""
        _check_width("x", x, "in", self.n_in)
        left, right = jnp.einsum("mi,...i->...m", self.left, x), jnp.einsum("mi,...i->...m", self.right, x)
        return jnp.einsum("om,...m->...o", self.down, left * right)

    def in_basis(self, basis: Float[Array, "in new"]) -> "BilinearTensor":
        """The tensor as a function of coordinates f, where ``x = basis f``: ``Q_u`` becomes ``basis^T Q_u basis``.

        With an SAE's decoder columns as the basis, f are its codes.
        """
        _check_width("basis", basis.T, "in", self.n_in)
        return BilinearTensor(self.left @ basis, self.right @ basis, self.down)

    def out_basis(self, directions: Float[Array, "U out"]) -> "BilinearTensor":
        """The tensor whose output number u is ``directions[u] . y``: what the layer writes along each direction."""
        return BilinearTensor(self.left, self.right, self._gates(directions))

    def interaction(
        self,
        directions: Float[Array, "U out"],
        basis: Float[Array, "in new"] | None = None,
        *,
        symmetric: bool = True,
    ) -> Float[Array, "U new new"]:
        """The interaction matrices ``Q_u`` of the output directions, ``x^T Q_u x = u . apply(x)``.

            Q_u[i, j] = 1/2 sum_m g[u, m] (left[m, i] right[m, j] + right[m, i] left[m, j])      g = directions down

        Args:
            directions: the output directions, a row each.
            basis: gives ``basis^T Q_u basis`` instead, ``[U, new, new]``. It either contracts Q_u once that is
                built or changes the basis of the factors first, whichever needs fewer multiplications: the former
                where a basis is wider than the input, as that of an SAE.
            symmetric: False leaves out the symmetrisation: ``left^T diag(g) right``, which the original torch code
                calls the interaction matrix. It gives the same quadratic form, but its eigenvalues mean nothing.
                For comparison only.

        Memory: the result, twice with a basis, and ``hidden * in`` numbers. Bound it by calling this for a batch of
        directions at a time.

        Example:
            >>> import jax
            >>> tensor = BilinearTensor(*jax.random.normal(jax.random.key(0), (2, 5, 3)), jnp.ones((2, 5)))
            >>> u, x = jnp.array([[1.0, -2.0]]), jnp.array([1.0, 2.0, 3.0])
            >>> bool(jnp.allclose(x @ tensor.interaction(u)[0] @ x, u[0] @ tensor.apply(x), rtol=1e-4))
            True
        """
        gates = self._gates(directions)
        if basis is None:
            return _quadratic_forms(gates, self.left, self.right, symmetric)
        _check_width("basis", basis.T, "in", self.n_in)
        (number, hidden), (inputs, new) = gates.shape, basis.shape
        build_first = number * inputs * (hidden * inputs + new * (inputs + new))
        factors_first = 2 * hidden * inputs * new + number * hidden * new * new
        if factors_first < build_first:
            return _quadratic_forms(gates, self.left @ basis, self.right @ basis, symmetric)
        q = _quadratic_forms(gates, self.left, self.right, symmetric)
        q = jnp.einsum("uik,kj->uij", jnp.einsum("ki,ukj->uij", basis, q), basis)
        return _symmetrised(q) if symmetric else q  # again: the two products round differently

    def matvec(
        self, directions: Float[Array, "U out"], v: Float[Array, "U in"] | Float[Array, " in"]
    ) -> Float[Array, "U in"]:
        """``Q_u v_u`` for every direction, without forming any ``Q_u``; one vector each, or one for all.

            Q_u v = 1/2 (left^T (g * (right v)) + right^T (g * (left v)))      8 hidden in flops

        Memory: a few times ``U * hidden`` numbers.

        Example:
            >>> tensor = BilinearTensor(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([[1.0]]))
            >>> tensor.matvec(jnp.array([[2.0]]), jnp.array([3.0, 5.0])).tolist()  # 1/2 of the gradient of 2 x_0 x_1
            [[5.0, 3.0]]
        """
        _check_width("v", v, "in", self.n_in)
        gates = self._gates(directions)
        from_left = (gates * jnp.broadcast_to(v @ self.right.T, gates.shape)) @ self.left
        from_right = (gates * jnp.broadcast_to(v @ self.left.T, gates.shape)) @ self.right
        return (from_left + from_right) / 2

    def gram(self) -> Float[Array, "hidden hidden"]:
        """Inner products of what the hidden units add to an interaction matrix: all that norms and cosines need.

            Q_u     = sum_m g[m] S_m                                  S_m = 1/2 (left_m right_m^T + right_m left_m^T)
            K[m, n] = <S_m, S_n> = sum_ij S_m[i, j] S_n[i, j]         <Q_u, Q_v> = g_u K g_v^T
            K       = 1/2 ((left left^T) * (right right^T) + (left right^T) * (left right^T)^T)

        ``out_basis`` leaves it as it is; ``in_basis`` changes it. ``6 hidden^2 in`` flops; memory: the result and at
        most three more of its size.

        Example:
            >>> tensor = BilinearTensor(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([[1.0]]))
            >>> tensor.gram().tolist()  # of [[0, 1/2], [1/2, 0]]
            [[0.5]]
        """
        with jax.default_matmul_precision("highest"):
            cross = self.left @ self.right.T
            return ((self.left @ self.left.T) * (self.right @ self.right.T) + cross * cross.T) / 2

    def traces(self, directions: Float[Array, "U out"]) -> Float[Array, " U"]:
        """``trace Q_u = sum_m g[m] (left_m . right_m)``: the mean of u . y over inputs of unit covariance.

        Example:
            >>> tensor = BilinearTensor(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]]), jnp.array([[1.0]]))
            >>> tensor.traces(jnp.array([[1.0], [-2.0]])).tolist()
            [5.0, -10.0]
        """
        with jax.default_matmul_precision("highest"):
            return self._gates(directions) @ jnp.sum(self.left * self.right, axis=-1)

    def norms(
        self, directions: Float[Array, "U out"], gram: Float[Array, "hidden hidden"] | None = None
    ) -> Float[Array, " U"]:
        """Frobenius norms ``|Q_u| = sqrt(sum_ij Q_u[i, j]^2) = sqrt(g K g^T)``, with ``K = gram()``: give it if known.

        A few matrices are cheaper built than K, and then they are. The gradient is 0 where the norm is 0.

        Accuracy: with eps that of the dtype and ``s = sqrt(sum_m g[m]^2 K[m, m])``, the norm if the hidden units didn't
        interfere, the error is a few ``eps s`` where Q_u is built, and by K a few ``eps s^2 / |Q_u|``, at most about
        ``sqrt(eps) s``: so much can be left of a zero matrix whose units cancel. Measured in float32: 1e-7 of the norm,
        7e-7 with one unit 10,000 times the others, 2e-4 where the units cancel to a hundredth.

        Memory: that of ``gram``, or 64 MiB at a time of matrices and scaled factors, at least those of one.

        Example:
            >>> tensor = BilinearTensor(jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.0]]), jnp.array([[1.0]]))
            >>> tensor.norms(jnp.array([[-2.0], [0.0]])).tolist()
            [2.0, 0.0]
        """
        (hidden, inputs), number = self.left.shape, len(directions)

        def square_of_built(gates):
            return jnp.sum(_quadratic_forms(gates[None], self.left, self.right, symmetric=True) ** 2)

        with jax.default_matmul_precision("highest"):
            gates = self._gates(directions)
            if gram is None and number * inputs**2 <= 3 * hidden * inputs + number * hidden:
                batch = min(max(number, 1), max(2**24 // (inputs * max(hidden, inputs)), 1))
                squares = jax.lax.map(square_of_built, gates, batch_size=batch)
            else:
                rows, form = gates, self._checked(gram)
                if number > self.n_out:  # cheaper as forms of the directions themselves
                    rows, form = directions, self.down @ form @ self.down.T
                # In batches: as one product of 4096 x 4096 matrices, this took XLA 20 times as long on a CPU.
                batch = min(max(number, 1), 1024)
                squares = jax.lax.map(lambda row: jnp.sum((row @ form) * row), rows, batch_size=batch)
        zero = squares <= 0
        return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))

    def cosines(
        self, directions: Float[Array, "U out"], gram: Float[Array, "hidden hidden"] | None = None
    ) -> Float[Array, "U U"]:
        """Cosines ``<Q_u, Q_v> / (|Q_u| |Q_v|)`` between all interaction matrices; ``gram()`` is used, if given.

        1 where two directions read the same function of the input, up to a positive factor. Exactly symmetric, and 0
        for a matrix that is zero or can't be told from zero: ``|Q_u|^2 <= 16 eps s^2``, with eps and s as in ``norms``.
        Memory: that of ``gram``, ``U * hidden`` and three times the result.

        Example:
            >>> tensor = BilinearTensor(jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.0]]), jnp.array([[1.0]]))
            >>> tensor.cosines(jnp.array([[2.0], [4.0], [0.0]])).tolist()
            [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
        """
        with jax.default_matmul_precision("highest"):
            gates, gram = self._gates(directions), self._checked(gram)
            inner = gates @ gram @ gates.T
            noise = 16 * jnp.finfo(inner.dtype).eps * (gates**2 @ jnp.diagonal(gram))
        inner = (inner + inner.T) / 2
        zero = jnp.diagonal(inner) <= noise
        inverse = jnp.where(zero, 0, 1 / jnp.sqrt(jnp.where(zero, 1, jnp.diagonal(inner))))
        return jnp.clip(inner * (inverse[:, None] * inverse[None, :]), -1, 1)

    def _gates(self, directions: Float[Array, "U out"]) -> Float[Array, "U hidden"]:
        """``g = directions down``: how much of each hidden unit every direction reads."""
        if directions.ndim != 2:
            raise ValueError(f"directions are rows [U, out], got shape {directions.shape}: add an axis, u[None]")
        _check_width("directions", directions, "out", self.n_out)
        return directions @ self.down

    def _checked(self, gram: Array | None) -> Float[Array, "hidden hidden"]:
        """K: the one given, if it fits, or else a new one."""
        hidden = self.left.shape[0]
        if gram is not None and gram.shape != (hidden, hidden):
            raise ValueError(f"gram must be gram() of this tensor, {(hidden, hidden)}, got shape {gram.shape}")
        return self.gram() if gram is None else gram


def with_constant(x: Float[Array, "*batch in"]) -> Float[Array, "*batch extended"]:
    """``[x, 1]``: the input of a tensor with biases (``BilinearTensor.from_mlp``)."""
    return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


class BasisFactors(NamedTuple):
    """``basis = root @ isometry.T``, with ``rank = min(in, new)``."""

    root: Float[Array, "in rank"]  # the basis in orthonormal coordinates: root root^T = basis basis^T
    isometry: Float[Array, "new rank"]  # orthonormal columns; isometry @ z are the new coordinates of z


def factor_basis(basis: Float[Array, "in new"]) -> BasisFactors:
    """A basis of more vectors than there are inputs, such as an SAE's decoder, brought down to a square one.

        basis^T Q basis = isometry (root^T Q root) isometry^T

    so all there is to know of this ``[new, new]`` matrix is in that of ``in_basis(root)``: it has the same eigenvalues,
    beside zeros, the same trace and norm, and ``isometry @ z`` for an eigenvector z, unit and orthogonal as they are.

    By a QR decomposition of ``basis^T``; one of ``basis basis^T`` would square the condition number. The isometry is
    orthonormal to rounding whatever the basis, one of lower rank included. Memory: three times that of the basis.
    1024 inputs and 8192 features take half a second on two cores; where these have other work, LAPACK's threads wait
    for each other, and ``threadpoolctl.threadpool_limits(1, "blas")`` around the call made it ten times faster.

    Example:
        >>> import jax
        >>> tensor = BilinearTensor(*jax.random.normal(jax.random.key(0), (2, 5, 3)), jnp.ones((2, 5)))
        >>> u, basis = jnp.array([[1.0, -2.0]]), jax.random.normal(jax.random.key(1), (3, 9))
        >>> root, isometry = factor_basis(basis)
        >>> small, large = tensor.in_basis(root).interaction(u)[0], tensor.in_basis(basis).interaction(u)[0]
        >>> bool(jnp.allclose(isometry @ small @ isometry.T, large, atol=1e-4))
        True
    """
    with jax.default_matmul_precision("highest"):
        isometry, upper = jnp.linalg.qr(basis.T)
    return BasisFactors(upper.T, isometry)


def _quadratic_forms(gates, left, right, symmetric: bool) -> Float[Array, "U in in"]:
    # One direction after the other: all at once would be one matrix product too, but slower on a CPU (its factor, left
    # scaled by every gate, leaves the caches), and a planner of contractions would form a tensor [hidden, in, in].
    q = jax.lax.map(lambda gates: (left.T * gates[None]) @ right, gates)
    return _symmetrised(q) if symmetric else q  # of what the loop left: within it, rounding could differ


def _symmetrised(q: Float[Array, "*U in in"]) -> Float[Array, "*U in in"]:
    return (q + jnp.swapaxes(q, -1, -2)) / 2


def _check_width(name: str, x: Array, axis: str, width: int) -> None:
    if x.shape[-1] != width:
        raise ValueError(f"{name} must have {width} coordinates ({axis}), got {x.shape[-1]}")
