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

Axes: ``in`` inputs, ``hidden`` hidden units, ``out`` outputs, ``U`` output directions, ``new`` a new basis.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", sections 3 and 4.
"""

import dataclasses

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

        Memory: ``U * hidden * in`` numbers for the factors scaled by g, and twice the result. Bound it by calling
        this for a batch of directions at a time.

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

    def _gates(self, directions: Float[Array, "U out"]) -> Float[Array, "U hidden"]:
        """``g = directions down``: how much of each hidden unit every direction reads."""
        if directions.ndim != 2:
            raise ValueError(f"directions are rows [U, out], got shape {directions.shape}: add an axis, u[None]")
        _check_width("directions", directions, "out", self.n_out)
        return directions @ self.down


def with_constant(x: Float[Array, "*batch in"]) -> Float[Array, "*batch extended"]:
    """``[x, 1]``: the input of a tensor with biases (``BilinearTensor.from_mlp``)."""
    return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


def _quadratic_forms(gates, left, right, symmetric: bool) -> Float[Array, "U in in"]:
    # The path is fixed: scale left by the gates, then one GEMM of [U in, hidden] with [hidden, in]. A planner that
    # minimises flops would form the third-order tensor [hidden, in, in] as soon as there are many directions.
    q = jnp.einsum("um,mi,mj->uij", gates, left, right, optimize=[(0, 1), (0, 1)])
    return _symmetrised(q) if symmetric else q


def _symmetrised(q: Float[Array, "U in in"]) -> Float[Array, "U in in"]:
    return (q + jnp.swapaxes(q, -1, -2)) / 2


def _check_width(name: str, x: Array, axis: str, width: int) -> None:
    if x.shape[-1] != width:
        raise ValueError(f"{name} must have {width} coordinates ({axis}), got {x.shape[-1]}")
