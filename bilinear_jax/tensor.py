"""The bilinear layer as a third-order tensor, stored as three factors. The whole method is in this file.

The layer ``y = down ((left x) * (right x))``, with ``*`` elementwise, is the tensor

    B[o, i, j] = sum_m  down[o, m] left[m, i] right[m, j]

The tensor itself is never formed: ``BilinearTensor`` keeps the three factors. For an output direction u, the output
along u is a quadratic form of the input. This is exact for every input:

    u . y = x^T Q_u x        Q_u = 1/2 (left^T diag(g) right + right^T diag(g) left)        g = down^T u

Q_u is the interaction matrix of u. Its eigenvectors are input patterns: those with positive eigenvalues raise u . y,
and those with negative eigenvalues lower it. Q_u is symmetric because only the symmetric part of a matrix acts on
``x x^T``.

All else is built from three operations. A change of input basis multiplies ``left`` and ``right`` from the right. A
change of output basis multiplies ``down`` from the left. A bias is one more input coordinate, which is always 1.

Axes: ``in`` inputs, ``hidden`` hidden units, ``out`` outputs, ``U`` output directions, ``new`` a new basis, ``rank``
the smaller of ``in`` and ``new``.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", sections 3 and 4.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Shaped

from bilinear_jax.linalg.scale import as_floats, shift, unit_scale


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class BilinearTensor:
    """The three factors of a bilinear layer; a pytree, so it can be an argument of ``jit``, ``vmap`` and ``grad``.

    Factors of float32 or float64 are kept as they are. Integers, booleans and half floats become float32.

    Raises:
        ValueError: if the shapes of the factors do not fit each other, or a factor does not hold real numbers.

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
            object.__setattr__(self, name, as_floats(name, getattr(self, name)))
        left, right, down = self.left.shape, self.right.shape, self.down.shape
        if len(left) != 2 or left != right:
            raise ValueError(
                f"left has shape {left} and right {right}, but both must be matrices [hidden, in] of one shape"
            )
        if len(down) != 2 or down[1] != left[0]:
            raise ValueError(
                f"down has shape {down}, but it must be [out, {left[0]}]: its hidden units are the rows of left {left}"
            )

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in ("left", "right", "down")], None

    @classmethod
    def tree_unflatten(cls, _, factors):
        # No check here: JAX also rebuilds pytrees around placeholders and batched factors.
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
        linear: Float[Array, "out in"] | None = None,
    ) -> "BilinearTensor":
        """The layer ``y = down ((left x + b_left) * (right x + b_right)) + b_down + linear x`` as one tensor.

        If there is any bias or a linear map, the tensor has one more input, the last one, which is always 1.
        ``with_constant`` appends it to x. ``b_left`` and ``b_right`` become the last columns of left and right.
        ``b_down`` becomes one more hidden unit, constant * constant, and ``linear`` one more for each input,
        input * constant. Without all these, the tensor has the inputs of the layer.

        Example:
            >>> one = jnp.ones((1, 1))
            >>> tensor = BilinearTensor.from_mlp(one, one, one, jnp.array([2.0]), jnp.array([3.0]), jnp.array([4.0]))
            >>> float(tensor.apply(with_constant(jnp.array([5.0])))[0])  # (5 + 2) (5 + 3) + 4
            60.0
        """
        if b_left is None and b_right is None and b_down is None and linear is None:
            return BilinearTensor(left, right, down)
        hidden, inputs = left.shape

        def with_bias(weight, bias):
            return jnp.concatenate([weight, (jnp.zeros(hidden, weight.dtype) if bias is None else bias)[:, None]], 1)

        left, right = with_bias(left, b_left), with_bias(right, b_right)
        if b_down is not None:
            constant = jnp.zeros((1, inputs + 1), left.dtype).at[0, -1].set(1)
            left, right = jnp.concatenate([left, constant]), jnp.concatenate([right, constant])
            down = jnp.concatenate([down, b_down[:, None]], 1)
        if linear is not None:
            left = jnp.concatenate([left, jnp.eye(inputs, inputs + 1, dtype=left.dtype)])
            right = jnp.concatenate([right, jnp.zeros((inputs, inputs + 1), left.dtype).at[:, -1].set(1)])
            down = jnp.concatenate([down, linear], 1)
        return BilinearTensor(left, right, down)

    @property
    def n_in(self) -> int:
        """Number of inputs, including the constant one."""
        return self.left.shape[-1]

    @property
    def n_out(self) -> int:
        """Number of outputs."""
        return self.down.shape[-2]

    def apply(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """The layer itself: ``y = down ((left x) * (right x))``."""
        _check_width("x", x, "in", self.n_in)
        left, right = jnp.einsum("mi,...i->...m", self.left, x), jnp.einsum("mi,...i->...m", self.right, x)
        return jnp.einsum("om,...m->...o", self.down, left * right)

    def in_basis(self, basis: Float[Array, "in new"]) -> "BilinearTensor":
        """The tensor as a function of coordinates f, where ``x = basis f``. ``Q_u`` becomes ``basis^T Q_u basis``.

        If the basis holds the decoder columns of an SAE, f are its codes.
        """
        _check_width("basis", basis.T, "in", self.n_in)
        return BilinearTensor(self.left @ basis, self.right @ basis, self.down)

    def out_basis(self, directions: Float[Array, "U out"]) -> "BilinearTensor":
        """The tensor whose output u is ``directions[u] . y``: what the layer writes along each direction."""
        return BilinearTensor(self.left, self.right, self._gates(directions))

    def interaction(
        self,
        directions: Float[Array, "U out"],
        basis: Float[Array, "in new"] | None = None,
        *,
        symmetric: bool = True,
    ) -> Float[Array, "U new new"]:
        """The interaction matrices ``Q_u`` of the output directions: ``x^T Q_u x = u . apply(x)``.

            Q_u[i, j] = 1/2 sum_m g[u, m] (left[m, i] right[m, j] + right[m, i] left[m, j])      g = directions down

        Args:
            directions: the output directions, one a row.
            basis: if given, the result is ``basis^T Q_u basis``, ``[U, new, new]``. There are two orders of
                computation: build Q_u, then contract it with the basis; or change the basis of the factors first. The
                one with fewer multiplications is used. It is the first where the basis is wider than the input, as for
                an SAE.
            symmetric: False returns ``left^T diag(g) right`` without symmetrising, for comparison only. The original
                torch code calls this the interaction matrix. It gives the same quadratic form, but its eigenvalues have
                no meaning.

        Memory: the result, twice with a basis, and ``hidden * in`` numbers. To use less, call this for a batch of
        directions at a time.

        Example:
            >>> import jax
            >>> tensor = BilinearTensor(*jax.random.normal(jax.random.key(0), (2, 5, 3)), jnp.ones((2, 5)))
            >>> u, x = jnp.array([[1.0, -2.0]]), jnp.array([1.0, 2.0, 3.0])
            >>> bool(jnp.allclose(x @ tensor.interaction(u)[0] @ x, u[0] @ tensor.apply(x), rtol=1e-4))
            True
        """
        unit, at_inputs, at_down = self.unit()
        gates, at_gates = unit.scaled_gates(directions)
        exponents = (at_inputs + at_down + at_gates)[:, :, None]
        if basis is None:
            return shift(_quadratic_forms(gates, unit.left, unit.right, symmetric), exponents)
        _check_width("basis", basis.T, "in", self.n_in)
        scaled, at_basis = unit_scale(basis)
        exponents = exponents + 2 * at_basis
        (number, hidden), (inputs, new) = gates.shape, scaled.shape
        build_first = number * inputs * (hidden * inputs + new * (inputs + new))
        factors_first = 2 * hidden * inputs * new + number * hidden * new * new
        if factors_first < build_first:
            return shift(_quadratic_forms(gates, unit.left @ scaled, unit.right @ scaled, symmetric), exponents)
        q = _quadratic_forms(gates, unit.left, unit.right, symmetric)
        q = jnp.einsum("uik,kj->uij", jnp.einsum("ki,ukj->uij", scaled, q), scaled)
        return shift(_symmetrised(q) if symmetric else q, exponents)  # again, as the two products round differently

    def matvec(
        self, directions: Float[Array, "U out"], v: Float[Array, "U in"] | Float[Array, " in"]
    ) -> Float[Array, "U in"]:
        """``Q_u v_u`` for every direction, without forming any ``Q_u``.

            Q_u v = 1/2 (left^T (g * (right v)) + right^T (g * (left v)))      8 hidden in flops

        Args:
            directions: the output directions, one a row.
            v: one vector for each direction, or one for all.

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
        """Inner products of what each hidden unit adds to an interaction matrix. Norms and cosines need only these.

            Q_u     = sum_m g[m] S_m                                  S_m = 1/2 (left_m right_m^T + right_m left_m^T)
            K[m, n] = <S_m, S_n> = sum_ij S_m[i, j] S_n[i, j]         <Q_u, Q_v> = g_u K g_v^T
            K       = 1/2 ((left left^T) * (right right^T) + (left right^T) * (left right^T)^T)

        ``out_basis`` does not change K; ``in_basis`` does.

        Cost: ``6 hidden^2 in`` flops. Memory: the result and at most three more of its size.

        Example:
            >>> tensor = BilinearTensor(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([[1.0]]))
            >>> tensor.gram().tolist()  # of [[0, 1/2], [1/2, 0]]
            [[0.5]]
        """
        (left, at_left), (right, at_right) = unit_scale(self.left), unit_scale(self.right)
        with jax.default_matmul_precision("highest"):
            cross = left @ right.T
            gram = ((left @ left.T) * (right @ right.T) + cross * cross.T) / 2
        return shift(gram, 2 * (at_left + at_right))

    def traces(self, directions: Float[Array, "U out"]) -> Float[Array, " U"]:
        """``trace Q_u = sum_m g[m] (left_m . right_m)``: the mean of u . y over inputs of unit covariance.

        Example:
            >>> tensor = BilinearTensor(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0]]), jnp.array([[1.0]]))
            >>> tensor.traces(jnp.array([[1.0], [-2.0]])).tolist()
            [5.0, -10.0]
        """
        with jax.default_matmul_precision("highest"):
            unit, at_inputs, at_down = self.unit()
            gates, at_gates = unit.scaled_gates(directions)
            return shift(gates @ jnp.sum(unit.left * unit.right, axis=-1), (at_inputs + at_down + at_gates)[:, 0])

    def unit(self) -> tuple["BilinearTensor", Int[Array, ""], Int[Array, ""]]:
        """The tensor with its factors divided by powers of two, and the exponents: of ``left right``, and of ``down``.

        The largest |entry| of each factor is between 1/2 and 1, so that squares and products stay in the range of
        floats. ``interaction`` of the result is that of this tensor divided by ``2^(inputs + outputs)``, exactly.

        Example:
            >>> tensor = BilinearTensor(jnp.array([[6.0, 0.0]]), jnp.array([[0.0, 8.0]]), jnp.array([[3.0]]))
            >>> unit, inputs, outputs = tensor.unit()
            >>> unit.left.tolist(), unit.down.tolist(), int(inputs), int(outputs)  # 6 = 0.75 * 2^3, 8 = 0.5 * 2^4
            ([[0.75, 0.0]], [[0.75]], 7, 2)
        """
        (left, at_left), (right, at_right), (down, at_down) = map(unit_scale, (self.left, self.right, self.down))
        return BilinearTensor(left, right, down), at_left + at_right, at_down

    def norms(
        self, directions: Float[Array, "U out"], gram: Float[Array, "hidden hidden"] | None = None
    ) -> Float[Array, " U"]:
        """Frobenius norms ``|Q_u| = sqrt(sum_ij Q_u[i, j]^2) = sqrt(g K g^T)``.

        Pass ``gram`` if you have already computed ``K = gram()``. Otherwise K is computed, or, for a few directions,
        the matrices Q_u are built, because that is cheaper. The gradient is 0 where the norm is 0.

        Raises:
            ValueError: outside ``jit``, if entries of ``gram`` left the range of its dtype.

        Accuracy: let eps be that of the dtype, and ``s = sqrt(sum_m g[m]^2 K[m, m])``, the norm if the hidden units did
        not interfere. If Q_u is built, the error is a few ``eps s``. With K it is a few ``eps s^2 / |Q_u|``, and at
        most about ``sqrt(eps) s``. So if the units cancel to a zero matrix, its norm can come out as large as that.
        Measured in float32: 1e-7 of the norm; 7e-7 with one unit 10,000 times the others; 2e-4 where the units cancel
        to a hundredth.

        Memory: that of ``gram``; or, where matrices are built, 64 MiB of matrices and scaled factors at a time, or
        those of one direction if they are larger.

        Example:
            >>> tensor = BilinearTensor(jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.0]]), jnp.array([[1.0]]))
            >>> tensor.norms(jnp.array([[-2.0], [0.0]])).tolist()
            [2.0, 0.0]
        """
        directions = self._rows(directions)
        (hidden, inputs), number = self.left.shape, len(directions)
        unit, at_inputs, at_down = self.unit()
        with jax.default_matmul_precision("highest"):
            few = gram is None and number * inputs**2 <= 3 * hidden * inputs + number * hidden
            if few or number <= self.n_out:
                rows, at_rows = unit.scaled_gates(directions)
            else:
                rows, at_rows = unit_scale(directions, axis=1)
            if few:
                batch = min(max(number, 1), max(2**24 // (inputs * max(hidden, inputs)), 1))
                squares = _squares_of_built(rows, unit.left, unit.right, batch)
            else:
                form = self._unit_gram(unit, at_inputs, gram)
                if number > self.n_out:  # then forms of the directions themselves are cheaper
                    form = unit.down @ form @ unit.down.T
                # In batches, because one product of 4096 x 4096 matrices took XLA 20 times as long on a CPU.
                batch = min(max(number, 1), 1024)
                squares = _squares_by_form(rows, form, batch)
        zero = squares <= 0
        return shift(jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares))), at_rows[:, 0] + at_inputs + at_down)

    def cosines(
        self, directions: Float[Array, "U out"], gram: Float[Array, "hidden hidden"] | None = None
    ) -> Float[Array, "U U"]:
        """Cosines ``<Q_u, Q_v> / (|Q_u| |Q_v|)`` between all interaction matrices.

        A cosine is 1 if two directions read the same function of the input, up to a positive factor. The result is
        exactly symmetric. It is 0 for a matrix that is zero or cannot be told from zero: ``|Q_u|^2 <= 16 eps s^2``,
        with eps and s as in ``norms``. Pass ``gram`` if you have already computed ``gram()``.

        Memory: that of ``gram``, ``U * hidden`` and three times the result.

        Example:
            >>> tensor = BilinearTensor(jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.0]]), jnp.array([[1.0]]))
            >>> tensor.cosines(jnp.array([[2.0], [4.0], [0.0]])).tolist()
            [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
        """
        with jax.default_matmul_precision("highest"):
            unit, at_inputs, _ = self.unit()
            gates, _ = unit.scaled_gates(directions)
            gram = self._unit_gram(unit, at_inputs, gram)
            inner = gates @ gram @ gates.T
            noise = 16 * jnp.finfo(inner.dtype).eps * (gates**2 @ jnp.diagonal(gram))
        inner = (inner + inner.T) / 2
        zero = jnp.diagonal(inner) <= noise
        inverse = jnp.where(zero, 0, 1 / jnp.sqrt(jnp.where(zero, 1, jnp.diagonal(inner))))
        return jnp.clip(inner * (inverse[:, None] * inverse[None, :]), -1, 1)

    def _gates(self, directions: Float[Array, "U out"]) -> Float[Array, "U hidden"]:
        """``g = directions down``: how much of each hidden unit every direction reads."""
        return self._rows(directions) @ self.down

    def _rows(self, directions: Shaped[Array, "U out"]) -> Float[Array, "U out"]:
        """The directions as floats. Raises ``ValueError`` unless they fit."""
        directions = as_floats("directions", directions)
        if directions.ndim != 2:
            raise ValueError(
                f"directions have shape {directions.shape}, but they must be rows [U, out]: write u[None] for one"
            )
        _check_width("directions", directions, "out", self.n_out)
        return directions

    def scaled_gates(self, directions: Float[Array, "U out"]) -> tuple[Float[Array, "U hidden"], Int[Array, "U 1"]]:
        """The gates of the directions divided by ``2^e``, the largest of each between 1/2 and 1, and the exponents e.

        Example:
            >>> tensor = BilinearTensor(jnp.ones((2, 1)), jnp.ones((2, 1)), jnp.array([[4.0, 1.0]]))
            >>> gates, exponents = tensor.scaled_gates(jnp.array([[2.0]]))  # (8, 2) = 2^4 (1/2, 1/8)
            >>> gates.tolist(), exponents.tolist()
            ([[0.5, 0.125]], [[4]])
        """
        rows, at_rows = unit_scale(self._rows(directions), axis=1)
        gates, at_gates = unit_scale(rows @ self.down, axis=1)
        return gates, at_rows + at_gates

    def _unit_gram(self, unit: "BilinearTensor", at_inputs, gram: Array | None) -> Float[Array, "hidden hidden"]:
        """``unit.gram()``; from the ``gram()`` of this tensor if it is given and fits."""
        hidden = self.left.shape[0]
        if gram is not None and gram.shape != (hidden, hidden):
            raise ValueError(f"gram has shape {gram.shape}, but it must be gram() of this tensor, {(hidden, hidden)}")
        if gram is None:
            return unit.gram()
        form, largest = shift(gram, -2 * at_inputs), jnp.max(jnp.abs(gram), initial=0)
        if not isinstance(largest, Tracer):
            sides = jnp.stack([jnp.max(jnp.abs(side)) for side in (unit.left, unit.right)])
            if jnp.all((sides > 0) & jnp.isfinite(sides)) and not 1e-24 <= largest < jnp.inf:
                raise ValueError(f"the entries of gram, up to {float(largest):.2g}, leave {gram.dtype}: leave gram out")
        return form


def with_constant(x: Float[Array, "*batch in"]) -> Float[Array, "*batch extended"]:
    """``[x, 1]``: the input of a tensor with biases (``BilinearTensor.from_mlp``)."""
    return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


@functools.partial(jax.jit, static_argnames="batch")
def _squares_of_built(gates, left, right, batch: int) -> Float[Array, " U"]:
    def square(gates):
        return jnp.sum(_quadratic_forms(gates[None], left, right, symmetric=True) ** 2)

    return jax.lax.map(square, gates, batch_size=batch)


@functools.partial(jax.jit, static_argnames="batch")
def _squares_by_form(rows, form, batch: int) -> Float[Array, " U"]:
    return jax.lax.map(lambda row: jnp.sum((row @ form) * row), rows, batch_size=batch)


@functools.partial(jax.jit, static_argnames="symmetric")
def _quadratic_forms(gates, left, right, symmetric: bool) -> Float[Array, "U in in"]:
    # One direction at a time: one product for all is slower on a CPU, because left scaled by every gate does not fit
    # the caches. A contraction planner would form a tensor [hidden, in, in].
    q = jax.lax.map(lambda gates: (left.T * gates[None]) @ right, gates)
    return _symmetrised(q) if symmetric else q  # after the loop: inside it, rounding could differ


def _symmetrised(q: Float[Array, "*U in in"]) -> Float[Array, "*U in in"]:
    return (q + jnp.swapaxes(q, -1, -2)) / 2


def _check_width(name: str, x: Array, axis: str, width: int) -> None:
    if x.shape[-1] != width:
        raise ValueError(f"{name} must have {width} coordinates ({axis}), got {x.shape[-1]}")
