"""What a ``Tracer`` does with text: the metric of its input, and how much of a feature its explanations explain.

The other half of a tracer, in ``explain.tracer``, reads weights alone.
"""

from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer as JaxTracer
from jaxtyping import Array, Float, Int

from bilinear_jax.explain.directions import Directions, the_sae
from bilinear_jax.explain.explained import Explained, explained
from bilinear_jax.explain.feature_pairs import of_codes
from bilinear_jax.explain.mlp import mlp_tensor
from bilinear_jax.explain.parts import PAIRS
from bilinear_jax.explain.samples import Layer, second_moment
from bilinear_jax.explain.transcoders import is_transcoder, transcoder_tensor
from bilinear_jax.language import LanguageModel
from bilinear_jax.linalg.metric import Metric
from bilinear_jax.nn.sae import SAE
from bilinear_jax.tensor import BilinearTensor

Index = int | np.integer | slice | Sequence[int] | np.ndarray | Array


class OnText:
    """The base of ``Tracer``: what stands on either side of the MLP, and the methods that need text."""

    lm: LanguageModel
    layer: int
    tensor: BilinearTensor
    inputs: SAE | Directions
    outputs: SAE | Directions
    directions: Float[Array, "features out"]
    basis: Float[Array, "in n"]
    use_encoder: bool

    @property
    def inp(self) -> SAE:
        """The input SAE. ``ValueError`` if this tracer has plain directions in its place."""
        return the_sae("inp", "input", self.inputs)

    @property
    def out(self) -> SAE:
        """The output SAE. ``ValueError`` if this tracer has plain directions in its place."""
        return the_sae("out", "output", self.outputs)

    @property
    def reads_codes(self) -> bool:
        """Whether the tensor reads the codes of ``inputs``: that of a readable transcoder does."""
        return isinstance(self.outputs, SAE) and self.outputs.config.inputs is not None

    @property
    def n_features(self) -> int:
        """Number of output features."""
        return self.directions.shape[0]

    @property
    def site(self) -> str:
        """The site that the tensor reads: mlp_in, or resid_mid for ``r / rms(r)``."""
        return "resid_mid" if isinstance(self.inputs, Directions) else self.inputs.config.site

    def require_encoder(self, out: bool = True) -> None:
        """Raises ``ValueError`` unless there are two SAEs, and the directions are encoder rows.

        Only these give a feature's activation. With ``out=False``, the directions may also be plain.
        """
        _ = self.inp, out and self.out
        if is_transcoder(self.outputs):
            raise ValueError(
                f"this tracer has the transcoder {self.outputs.name} as out, but this needs an SAE of mlp_out or plain "
                "directions: the features of a transcoder are read from its own encoder, see tracer.q and top_eigh"
            )
        if not self.use_encoder and isinstance(self.outputs, SAE):
            raise ValueError(
                "this tracer has decoder columns as directions, but a feature's activations need encoder rows: make it "
                "with use_encoder=True"
            )

    def check_feature(self, feature) -> int:
        """The output feature as an int: see ``SAE.check_feature``."""
        return self.outputs.check_feature(feature)

    def metric(
        self,
        tokens,
        *,
        firing: int | None = None,
        rank: int | None = None,
        shrink: float = 0.0,
        token_mask=None,
        batch_size: int = 16,
    ) -> Metric:
        """The metric of the tensor's input on some text, for ``top_eigh(metric=...)``: see ``linalg.metric``.

        Args:
            tokens, token_mask, batch_size: the text, as for ``LanguageModel.batches``.
            firing: put half of the weight on the tokens at which this output feature fires, as
                ``explained(by="firing")`` does: its eigenvalues are then what its squares add where it fires.
            rank, shrink: as for ``Metric.of``.

        Raises:
            ValueError: if the tokens do not fit, or ``firing`` is given and the outputs are plain directions.
            UnknownNameError: if there is no such feature.

        Example:
            >>> import bilinear_jax as bj
            >>> tracer = bj.Tracer(bj.load("ts-nano"), layer=2)
            >>> metric = tracer.metric(bj.load_corpus("ts-nano")[:8])
            >>> by_data, by_weight = tracer.top_eigh(k=8, features=[3], metric=metric), tracer.top_eigh(8, [3])
            >>> bool(by_data.explained[0] > by_weight.explained[0])  # for Gaussian inputs, the share of the variance
            True
        """
        lm, site = self.lm.original, self.site
        inputs = self.inp if self.reads_codes else None
        fires = None if firing is None else (self.out, self.check_feature(firing))
        options = {"inputs": inputs, "firing": fires}
        moment = second_moment(lm, self.layer, site, self.tensor.n_in, tokens, token_mask, batch_size, **options)
        return Metric.of(moment, rank=rank, shrink=shrink)

    def explained(
        self,
        tokens,
        choose=None,
        *,
        features: Index | None = None,
        parts: Iterable[SupportsIndex] = (1, 2, 4, 8, 16, 32),
        by: str = "data",
        seed: int = 0,
        loss: bool = False,
        token_mask=None,
        batch_size: int = 16,
    ) -> Explained:
        """How much of each output feature its first few squares explain, on tokens that they were not chosen on.

            z  =  u . y  =  sum_i l_i (p_i . x)^2        z_n = sum_{i < n} l_i (p_i . x)^2 + constant

        The scores are defined in ``explain.scores``, the ways to choose the squares in ``explain.parts``, and what
        stands beside them in ``explain.explained``.

        Args:
            tokens: token ids ``[rows, seq]`` to score on. Without ``choose``, the parts are chosen on the first half of
                the rows, and scored on the second.
            choose: other token ids, to choose the parts, the constant and the threshold on.
            features: which output features (as for ``q``); None: all.
            parts: numbers of parts, the columns of the result.
            by: eigenpairs by "data", "firing" (which needs an output that fires) or "weight"; or pairs of features of
                the input SAE, which must be one of mlp_in: "pairs by weight", "pairs by data" or "pairs greedy"
                (``explain.feature_pairs``).
            seed: of the controls.
            loss: whether to measure the model's loss with the MLP replaced by the explanations of all features of the
                output SAE, whichever ``features`` are scored (``explain.replaced``).
            token_mask: of ``tokens``; by default the tokens that count (see ``LanguageModel.batches``).
            batch_size: rows that are run through the model at once.

        Raises:
            ValueError: if there is one row and no ``choose``, a number of parts is out of range, the tokens do not fit
                the model, or ``loss`` is asked for where there is none.
            UnknownNameError: if a feature or ``by`` does not exist.

        Memory: on the host ``tokens (in + out)`` numbers, and 64 MiB of predictions at a time.

        Example:
            >>> import bilinear_jax as bj
            >>> tracer = bj.Tracer(bj.load("ts-nano"), layer=2)
            >>> found = tracer.explained(bj.load_corpus("ts-nano")[:8], features=range(8), parts=(1, 8))
            >>> found.r2.shape, bool(np.median(found.r2[:, 1]) > np.median(found.controls["rotated"].r2[:, 1]))
            ((8, 2), True)
        """
        layer, some = self.scored(features)
        if by in PAIRS:
            layer = of_codes(layer, self.inputs, self.basis)
        is_sae = isinstance(self.outputs, SAE) and not is_transcoder(self.outputs)
        if loss and not (is_sae and self.use_encoder):
            raise ValueError(
                "loss=True replaces an MLP by the explanations of the features of an output SAE, read by its encoder "
                "rows, and this tracer has other outputs: leave loss out"
            )
        options = {"parts": parts, "by": by, "seed": seed, "token_mask": token_mask, "batch_size": batch_size}
        return explained(layer, some, tokens, choose, loss=loss, **options)

    def scored(self, features: Index | None = None) -> tuple[Layer, Int[np.ndarray, " U"]]:
        """The MLP as ``explained`` and ``scan`` score it, and output features (as for ``q``; None: all).

        Raises:
            ValueError: if no feature is named.
            UnknownNameError: if one does not exist.
        """
        through = self.outputs if is_transcoder(self.outputs) else None
        tensor = mlp_tensor(self.lm, self.layer) if through is None else transcoder_tensor(through)
        some = np.asarray(self._features(slice(None) if features is None else features)[0])
        if not len(some):
            raise ValueError("name at least one output feature, or None for all")
        inputs = self.inp if self.reads_codes else None
        return Layer(self.lm.original, self.layer, tensor, self.outputs, self.directions, inputs), some

    def _features(self, idx: Index) -> tuple[Any, bool]:
        """The output features that idx names, and whether idx is a single feature."""
        if isinstance(idx, slice):
            return np.arange(self.n_features)[idx], False
        features: Any = idx if isinstance(idx, JaxTracer) else np.asarray(idx)
        if features.ndim > 1 or not (features.size == 0 or np.issubdtype(features.dtype, np.integer)):
            raise ValueError(
                f"the features are {features.dtype} of shape {features.shape}: name output features by an int, a "
                "slice, or a list or 1-D array of ints"
            )
        if not isinstance(idx, JaxTracer):
            outside = features[(features < 0) | (features >= self.n_features)]
            if outside.size:
                self.check_feature(outside.flat[0])  # raises
            features = features.astype(np.int32)
        return jnp.atleast_1d(features), features.ndim == 0
