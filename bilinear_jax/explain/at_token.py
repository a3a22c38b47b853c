"""Which eigenpairs of a feature make its pre-activation at one token.

    u . y  =  x^T Q x  =  sum_i l_i (p_i . x)^2

in the metric of the data (``linalg.metric``). A positive term raises the pre-activation there, a negative one
suppresses it. The eigenpairs are those of the feature, from other tokens: which of them matter at this token, x says.
And what p_i finds in x is a sum over the active input features, with codes c_j and decoder columns d_j:

    p_i . x  =  sum_j c_j (p_i . d_j)  +  p_i . rest          rest: the decoder bias and the error of the input SAE
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.linalg.devices import one_blas_thread
from bilinear_jax.linalg.metric import Metric


class EigenpairAt(NamedTuple):
    """One eigenpair at a token."""

    rank: int  # its place among the feature's eigenpairs, from 1
    value: float  # l_i: what it adds on average
    contribution: float  # l_i (p_i . x)^2: what it adds here
    share: float  # |contribution| / the sum of all |contributions| here
    finds: list[tuple[int, float]]  # active input features j by |c_j (p_i . d_j)|, each with its share of p_i . x


class FormAt(NamedTuple):
    """A feature's form at a token."""

    total: float  # x^T Q x, all eigenpairs
    first: float  # of those that are listed
    eigenpairs: list[EigenpairAt]  # the largest |contribution| first


def form_at(
    tracer: Tracer,
    x: Float[Array, " in"],
    codes: Float[Array, " k"],
    indices: Int[Array, " k"],
    feature: int,
    metric: Metric,
    *,
    n: int = 6,
    finds: int = 3,
) -> FormAt:
    """The n eigenpairs that contribute most to a feature's form at one token.

    Args:
        x: what the tracer's tensor reads at the token: ``explain.samples.tensor_inputs``.
        codes, indices: of the active input features there, as the MLP sees them: those of an ``explain.account``.
        metric: of other tokens, ``tracer.metric``.
        n: how many eigenpairs.
        finds: how many input features to name for each.

    Example:
        >>> import bilinear_jax as bj
        >>> from bilinear_jax.explain.samples import tensor_inputs
        >>> lm = bj.load("ts-nano")
        >>> tracer, tokens = bj.Tracer(lm, layer=2), lm.encode("Tom had a dog.")
        >>> x, account = tensor_inputs(lm, ("mlp_in", 2), tracer.tensor.n_in, tokens), bj.account(tracer, tokens, 7)
        >>> metric = tracer.metric(bj.load_corpus("ts-nano")[:4])
        >>> found = form_at(tracer, x[0, 3], account.codes[0, 3], account.indices[0, 3], 7, metric, n=256)
        >>> bool(abs(found.first - found.total) < 1e-3), round(sum(one.share for one in found.eigenpairs), 3)
        (True, 1.0)
    """
    feature = tracer.check_feature(feature)
    top = tracer.top_eigh(metric.root.shape[1], [feature], metric=metric, exact=True)
    with jax.default_matmul_precision("highest"), one_blas_thread():
        along = np.asarray(top.vectors[0] @ x, np.float64)
        found_in = top.vectors[0] @ (tracer.basis[:, indices] * codes[None])  # [all, k]
        total = float(tracer.directions[feature] @ tracer.tensor.apply(x))
    values = np.asarray(top.values[0], np.float64)
    terms = values * along**2
    whole = float(np.abs(terms).sum()) or 1.0
    found = []
    for place in np.argsort(-np.abs(terms), kind="stable")[:n]:
        parts = np.asarray(found_in[place], np.float64)
        named = np.argsort(-np.abs(parts), kind="stable")[:finds]
        its = [(int(indices[one]), float(parts[one] / (along[place] or 1.0))) for one in named]
        share = float(abs(terms[place])) / whole
        found.append(EigenpairAt(int(place) + 1, float(values[place]), float(terms[place]), share, its))
    return FormAt(total, float(sum(one.contribution for one in found)), found)
