"""``Tracer``: the MLP of one layer between an SAE of its input and an SAE of its output, or plain directions.

An output feature with encoder row (or decoder column) u reads ``u . y = x^T Q_u x`` from the MLP's output y. In SAE
features, the input is ``x = D f + b + e`` (D decoder, f codes, b decoder bias, e error), and pairs of them contribute

    sum_ij  f_i f_j (D^T Q_u D)[i, j]

So the entries of ``D^T Q_u D`` say which pairs of input features raise or lower the output feature.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", section 5.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from bilinear_jax.explain.batches import interaction, of_every_matrix
from bilinear_jax.explain.directions import CertifiedForm, Directions, resolve, rows_read
from bilinear_jax.explain.interactions import Interactions, Submatrix, submatrix, top_interactions
from bilinear_jax.explain.mlp import mlp_tensor
from bilinear_jax.explain.on_text import Index, OnText
from bilinear_jax.explain.spectra import TopSpectrum, top_eigh
from bilinear_jax.explain.transcoders import check_reads, check_transcoder, is_transcoder, transcoder_tensor
from bilinear_jax.language import LanguageModel
from bilinear_jax.linalg.devices import one_blas_thread
from bilinear_jax.linalg.scale import unit_columns
from bilinear_jax.nn.sae import SAE


class Tracer(OnText):
    """Interaction matrices between the features of two SAEs around the MLP of one layer.

    Plain directions may stand on either side in place of an SAE: see ``explain.directions``.

    Args:
        lm: a model with bilinear MLPs; or a bilinear form of a gated model, as ``bj.bilinear_form`` returns it, whose
            certificate is then kept for ``r2``.
        layer: the layer of the MLP, from 0.
        inp: the input SAE: an ``SAE``, or a dict that says which to load, with any of the keys ``site``, ``expansion``,
            ``k`` and ``tag``. The site is mlp-in (the default) or resid-mid; the other keys are needed only if several
            SAEs fit. With resid-mid, the MLP sees ``x = r / rms(r)`` of the residual stream r, so every quadratic term
            in the codes of r has the factor ``1 / rms(r)^2`` of its token. Or plain directions of the residual stream,
            ``Directions`` or an array ``[n, d_model]``, which are the columns of ``basis``, as with resid-mid. None:
            the default SAE; or, if out is plain directions, the coordinates of the residual stream.
        out: the output SAE, given in the same way. Its site is mlp-out. Or plain directions, which are read from the
            MLP's output. Or a bilinear transcoder of this layer: then the tensor is its own, ``transcoder_tensor``, the
            model's MLP may be of any kind, and the matrix of each feature has two eigenvalues. The tensor of a readable
            transcoder reads the codes of ``inp``, so its matrices are between input features, few of which count.
        use_encoder: True: the output directions are the encoder rows of the output SAE, which make the feature fire
            (before its bias and the top-k). False: they are its decoder columns: what the feature represents.
        scope: the folder or hub name to load the SAEs from; None: the source of the model.

    Attributes:
        inp, out: the two ``SAE`` objects, each with its own k. An error if plain directions were given.
        inputs, outputs: what stands on either side: an ``SAE``, or ``Directions``.
        tensor: the MLP as a ``BilinearTensor``, see ``explain.mlp``.
        directions: the output directions ``[features, d_model]``.
        basis: the decoder of the input SAE ``[in, features]``, without coordinates passed through. If the model has
            biases or a linear map, the constant input is the last feature: its row gives the effects of single
            features.
        certificate: that of the bilinear form, if one was given; else None.

    Raises:
        ValueError: if the MLP is not a tensor, an SAE reads another site, layer or width, or the output SAE has a
            bilinear encoder and ``use_encoder`` is set.
        UnknownNameError: if the layer or the SAE does not exist. The message lists those that do.

    Example:
        >>> import bilinear_jax as bj
        >>> tracer = bj.Tracer(bj.load("ts-nano"), layer=2)
        >>> q = tracer.q(3, project=True)
        >>> q.shape == (tracer.inp.config.n_features,) * 2
        True
    """

    def __init__(
        self,
        lm: LanguageModel | CertifiedForm,
        layer: int,
        inp: SAE | Directions | Array | np.ndarray | Mapping[str, Any] | None = None,
        out: SAE | Directions | Array | np.ndarray | Mapping[str, Any] | None = None,
        use_encoder: bool = True,
        scope: str | Path | None = None,
    ):
        self.certificate: Any = None
        if not isinstance(lm, LanguageModel):
            lm, self.certificate = lm.lm, lm.certificate
        self.lm = lm
        self.layer = layer
        self.use_encoder = use_encoder
        through = check_transcoder(out, lm, layer) if is_transcoder(out) else None
        if through is None:
            mlp_tensor(lm, layer)  # its errors come before those of the SAEs
        source = lm.source if scope is None else scope
        plain = isinstance(out, Directions) or hasattr(out, "ndim")
        if inp is None and plain:
            inp = Directions.coordinates(lm.config.d_model)
        self.inputs = resolve("inp", inp, lm, layer, source)
        site = self.site
        if through is None:
            self.tensor = mlp_tensor(lm, layer, site)
            self.outputs = resolve("out", out, lm, layer, source)
            self.directions = rows_read(self.outputs, use_encoder)
        else:
            gains = site == "resid_mid" and lm.config.gains and lm.config.norms[1]
            self.tensor = transcoder_tensor(through, lm.params["layers"]["mlp_gain"][layer] if gains else None)
            self.outputs, self.directions = through, jnp.eye(through.config.n_features)
            if self.reads_codes:
                check_reads(through, self.inputs)
                self.basis = jnp.eye(self.tensor.n_in)
                return
        self.basis = self.inputs.vectors.T if isinstance(self.inputs, Directions) else self.inputs.decoder
        if self.tensor.n_in > lm.config.d_model:
            self.basis = jnp.pad(self.basis, ((0, 1), (0, 1))).at[-1, -1].set(1)

    def __repr__(self) -> str:
        names = f"inp={self.inputs.name}, out={self.outputs.name}"
        return f"Tracer(layer={self.layer}, {names}, use_encoder={self.use_encoder})"

    def r2(self, features: Index | None = None) -> Float[Array, " U"]:
        """How well the tensor gives the model's own output along output features: R2, from 0 or below to 1.

        1 for a model that is bilinear itself, and for a transcoder, whose own pre-activations the tensor gives.
        For a bilinear form it is that of the certificate, so it holds for tokens
        such as the certificate was measured on. It says how far to trust all else that this tracer says of a feature.

        Args:
            features: which output features (as for ``q``); None: all.

        Raises:
            ValueError: if this is a form without its certificate.
            UnknownNameError: if a feature does not exist.

        Example:
            >>> import bilinear_jax as bj
            >>> bj.Tracer(bj.load("ts-nano"), layer=2).r2([3, 797]).tolist()
            [1.0, 1.0]
        """
        directions = self.directions[self._features(slice(None) if features is None else features)[0]]
        if is_transcoder(self.outputs):
            return jnp.ones(len(directions), directions.dtype)
        if self.certificate is not None:
            return jnp.asarray(self.certificate.of(directions))[self.layer]
        if self.lm.config.original_gate is not None:
            raise ValueError(
                "this tracer has the model of a bilinear form without its certificate: make it from the form itself, "
                "Tracer(form, layer), not from form.lm"
            )
        return jnp.ones(len(directions), directions.dtype)

    def q(self, idx: Index, project: bool = False) -> Float[Array, "*U in in"]:
        """Interaction matrices of output features, always symmetrised, with the highest matmul precision.

        Args:
            idx: an output feature gives ``[in, in]``; a slice, a list or an array of them gives ``[U, in, in]``.
            project: use the basis of the input SAE: ``D^T Q D``, with the input SAE's ``features`` in place of ``in``.

        Raises:
            UnknownNameError: if a feature does not exist.

        Memory: the result, ``U * features^2`` numbers with ``project``, twice, and ``hidden * in`` numbers.
        """
        features, single = self._features(idx)
        q = interaction(self.tensor, self.directions[features], self.basis if project else None)
        return q[0] if single else q

    def top_eigh(
        self,
        k: int = 2,
        features: Index | None = None,
        *,
        project: bool = False,
        exact: bool = False,
        mesh: Mesh | None = None,
        **options,
    ) -> TopSpectrum:
        """The k extreme eigenpairs of the interaction matrices of output features, with bounds on their errors.

        This is ``spectra.top_eigh`` of ``tensor`` and ``directions``: from the factors alone, a thousand features in a
        second.

        Args:
            features: which output features (as for ``q``); None: all. The first axis of the result, also for an int.
            project: eigenpairs of ``D^T Q D``, vectors in features of the input SAE. No such matrix is formed.
            exact: decompose every matrix densely. This is slower, but misses nothing.
            mesh: the output features are sharded over its devices.
            options: ``which``, ``rtol`` and the other options of ``spectra.top_eigh``.

        Example:
            >>> import bilinear_jax as bj
            >>> tracer = bj.Tracer(bj.load("ts-nano"), layer=2)
            >>> top = tracer.top_eigh(k=2, features=[3, 797])
            >>> top.values.shape, top.converged.tolist(), bool((top.explained < 1).all())
            ((2, 2), [True, True], True)
        """
        features = slice(None) if features is None else features
        basis = self.basis if project else None
        directions = self.directions[self._features(features)[0]]
        with one_blas_thread():
            return jax.block_until_ready(
                top_eigh(self.tensor, directions, k, basis=basis, exact=exact, mesh=mesh, **options)
            )

    def compute(
        self,
        fn: Callable[..., PyTree],
        batch_size: int = 32,
        project: bool = False,
        *,
        mesh: Mesh | None = None,
        **kwargs,
    ) -> PyTree:
        """``fn(q, **kwargs)`` of the interaction matrices of all output features, with a progress bar.

        Args:
            fn: a function of a batch of matrices ``[batch, in, in]`` that JAX can trace, such as those in ``spectra``.
                It returns a pytree of arrays with the batch as first axis. Matrices must not affect each other's
                results.
            batch_size: matrices that are built and given to fn together. It does not change the result.
            project: give fn the matrices in the basis of the input SAE, ``[batch, features, features]``.
            mesh: each batch is sharded over its devices, for example ``jax.make_mesh((8,), ("features",))``.
            kwargs: passed on to fn, as constants of the compilation.

        Returns:
            The pytree of fn, with all output features along the first axis.

        Memory: twice the result, what fn needs, and ``hidden * in + 2 batch_size * in^2`` numbers. With ``project``,
        another ``2 batch_size * features^2``: choose a small batch_size.

        Example:
            >>> import bilinear_jax as bj
            >>> lm = bj.load("ts-nano")
            >>> tracer = bj.Tracer(lm, layer=2, out=bj.Directions.tokens(lm, [" dog", " cat"]))
            >>> tracer.compute(bj.spectra.truncated_eigenvalues, k=2).shape
            (2,)
        """
        basis = self.basis if project else None
        name = f"features of {self.outputs.name}"
        return of_every_matrix(fn, self.tensor, self.directions, basis, batch_size, name, mesh=mesh, **kwargs)

    def top_interactions(self, n: int = 50, feature: Index | None = None, *, mesh: Mesh | None = None) -> Interactions:
        """The n largest |entries| of the projected matrices ``D^T Q D``, of one output feature or of all together.

        The result is exact, and no such matrix is formed. Method and memory: see ``interactions.top_interactions``.

        Args:
            n: how many pairs of input features; (i, j) and (j, i) are one pair.
            feature: an output feature, or a slice or list of them; None: all.
            mesh: the output features are sharded over its devices.

        Raises:
            ValueError: if n is below 1, or there are fewer pairs than n.
            UnknownNameError: if a feature does not exist.

        Example:
            >>> import bilinear_jax as bj
            >>> tracer = bj.Tracer(bj.load("ts-nano"), layer=2)
            >>> found = tracer.top_interactions(n=3, feature=7)
            >>> q = tracer.q(7, project=True)
            >>> bool(jnp.allclose(found.value, q[found.i, found.j], atol=1e-6))
            True
        """
        features = np.unique(self._features(slice(None) if feature is None else feature)[0])
        if not len(features):
            raise ValueError("name at least one output feature, or None for all")
        found = top_interactions(self.tensor, self.directions[features], self.basis, n, mesh=mesh)
        return dataclasses.replace(found, out=jnp.asarray(features)[found.out])

    def interaction_submatrix(self, feature: Index, n: int = 50) -> Submatrix:
        """The smallest part of an output feature's projected matrix that holds its n largest |entries|.

        (i, j) and (j, i) count as two entries. In a model with biases, feature ``n_features`` of the input SAE is the
        constant input. The whole matrix is not formed.

        Raises:
            ValueError: if the matrix has fewer than n entries, or n is below 1.
            UnknownNameError: if the feature does not exist.
        """
        _, single = self._features(feature)
        if not single:
            raise ValueError(f"feature is {feature!r}, but it must be one output feature, an int")
        size = self.basis.shape[1]
        if not 1 <= n <= size**2:
            raise ValueError(f"n is {n}, but it must be between 1 and {size**2} (the number of entries)")
        found = self.top_interactions(min(n, size * (size + 1) // 2), feature)
        i, j = np.asarray(found.i), np.asarray(found.j)
        entries = np.cumsum(np.where(i == j, 1, 2))  # up to and with each pair
        pairs = 1 + np.searchsorted(entries, n)
        involved = np.unique([i[:pairs], j[:pairs]])
        return submatrix(self.q(feature), self.basis, involved)

    def cosines(self, features: Index) -> Float[Array, "n n"]:
        """Cosine similarities between the decoder columns of some output features, or between plain directions."""
        columns = unit_columns(rows_read(self.outputs, use_encoder=False)[self._features(features)[0]].T)
        with jax.default_matmul_precision("highest"):
            return columns.T @ columns
