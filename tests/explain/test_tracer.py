"""Tracer against what the original computed, and against the model that it explains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from safetensors.numpy import load_file

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.explain import spectra
from bilinear_jax.explain.mlp import mlp_tensor
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.language import LanguageModel, load
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import MLP, TransformerConfig
from bilinear_jax.tensor import with_constant

GOLDEN = load_file(published.TS_MICRO / "expected.safetensors")
CASES = [(layer, use_encoder) for layer in (1, 2) for use_encoder in (True, False)]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load(published.MODEL, attn_scale=published.SCALE)


@pytest.fixture(scope="module")
def tracer(lm) -> Tracer:
    return Tracer(lm, 1, scope=published.SCOPE)


def close(actual, expected, atol=5e-5):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.all(np.abs(actual - expected) <= atol * (1 + np.abs(expected)))


def random_model(bias=False, d_model=8, **kwargs) -> LanguageModel:
    config = TransformerConfig(2, 2, d_model, 12, 16, 11, bias=bias, **kwargs)
    rng = np.random.default_rng(0)
    shapes = {"w_l": (2, 12, d_model), "w_r": (2, 12, d_model), "w_p": (2, d_model, 12)}
    shapes |= {"b_l": (2, 12), "b_r": (2, 12), "b_p": (2, d_model)} if bias else {}
    mlp = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    return LanguageModel({"layers": {"mlp": mlp}}, config)


def random_sae(site, layer=1, d_model=8, expansion=3, seed=0, **kwargs) -> SAE:
    return SAE.init(SAEConfig(site, layer, d_model, expansion, 2, **kwargs), jax.random.key(seed))


@pytest.mark.parametrize(("layer", "use_encoder"), CASES)
def test_golden(lm, layer, use_encoder):
    tracer = Tracer(lm, layer, use_encoder=use_encoder, scope=published.SCOPE)
    prefix = f"tracer.{layer}.{'enc' if use_encoder else 'dec'}."
    golden = {key.removeprefix(prefix): value for key, value in GOLDEN.items() if key.startswith(prefix)}

    close(tracer.q(slice(4)), golden["q_sym"])
    close(tracer.tensor.interaction(tracer.directions[:2], symmetric=False), golden["q_raw"])
    close(tracer.q(3, project=True), golden["q_project"])
    close(tracer.tensor.in_basis(tracer.basis).interaction(tracer.directions[3:4])[0], golden["q_project"])

    q = tracer.q(slice(16))
    close(spectra.eigh(tracer.tensor, tracer.directions[:16]).values, golden["eigenvalues"])
    close(spectra.truncated_eigenvalues(q, k=2), golden["truncated_eigenvalues_k2"])
    close(spectra.effective_rank(q), golden["effective_rank"])
    close(spectra.outliers(tracer.q(slice(4))), golden["outliers"])  # all 0: these matrices have none

    # The original's kurtosis standardises each entry over the 16 matrices of the batch. The library's does not; what
    # can be compared is the original's formula on the library's matrices.
    entries = np.asarray(q).reshape(16, -1)
    scores = (entries - entries.mean(axis=0)) / entries.std(axis=0)
    close((scores**4).mean(axis=1) - 3, golden["kurtosis"])

    strength = tracer.compute(spectra.truncated_eigenvalues, k=2)
    close(strength, golden["all_truncated_k2"])
    top = jax.lax.top_k(strength, 10)[1]
    assert np.array_equal(top, golden["top10"])
    close(tracer.cosines(top), golden["top10_cosine"])

    part = tracer.interaction_submatrix(3, n=50)
    assert np.array_equal(part.features, golden["top50_rows"])
    close(part.matrix, golden["q_project"][np.ix_(part.features, part.features)])
    assert set(golden) == {  # nothing that the original computed is left out above
        *("q_sym", "q_raw", "q_project", "eigenvalues", "truncated_eigenvalues_k2", "effective_rank", "kurtosis"),
        *("all_truncated_k2", "top10", "top10_cosine", "top50_rows", "outliers"),
    }


def test_the_account_of_a_real_activation(lm):
    # The MLP's output along a feature's direction, from its codes: f^T D^T Q D f + 2 b^T Q D f + b^T Q b + ... e
    tracer = Tracer(lm, 2, scope=published.SCOPE)
    tokens = GOLDEN["input_ids"][:1]
    got = lm.capture(tokens, [("mlp_in", 2), ("mlp_out", 2)])
    x, y = got["mlp_in", 2][0], got["mlp_out", 2][0]
    reconstruction, f = tracer.inp(x)
    e, b = x - reconstruction, tracer.inp.b_dec
    q, u = tracer.q(5), tracer.directions[5]
    rest = jnp.broadcast_to(b, x.shape) + e
    terms = jnp.einsum("si,ij,sj->s", f, tracer.q(5, project=True), f)
    terms += 2 * jnp.einsum("si,ij,sj->s", rest, q @ tracer.basis, f) + jnp.einsum("si,ij,sj->s", rest, q, rest)
    close(terms, y @ u)


def test_resid_mid_is_an_input_site(lm):
    tracer = Tracer(lm, 1, inp={"site": "resid-mid"}, scope=published.SCOPE)
    assert tracer.inp.config.site == "resid_mid"
    close(tracer.q(3, project=True), tracer.inp.w_dec.T @ tracer.q(3) @ tracer.inp.w_dec)


def test_each_sae_has_its_own_k():
    inp, out = random_sae("mlp_in"), random_sae("mlp_out", expansion=4)
    out = SAE(out.params, dataclasses.replace(out.config, k=5))
    tracer = Tracer(random_model(), 1, inp=inp, out=out)
    assert (tracer.inp.config.k, tracer.out.config.k) == (2, 5)
    assert tracer.q(31, project=True).shape == (24, 24)
    assert "x4-k5" in repr(tracer)


def test_biases_are_a_constant_input():
    lm = random_model(bias=True)
    tracer = Tracer(lm, 1, inp=random_sae("mlp_in"), out=random_sae("mlp_out", seed=1))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 8)), jnp.float32)
    params = {name: weight[1] for name, weight in lm.params["layers"]["mlp"].items()}
    y = MLP(lm.config).apply({"params": params}, x)
    close(tracer.tensor.apply(with_constant(x)), y)
    close(jnp.einsum("bi,ij,bj->b", with_constant(x), tracer.q(7), with_constant(x)), y @ tracer.directions[7], 1e-4)

    # x = D f: the codes and the constant together give the whole output, and the constant is the last feature.
    f = jnp.asarray(np.random.default_rng(2).normal(size=(5, 24)), jnp.float32)
    y = MLP(lm.config).apply({"params": params}, f @ tracer.inp.w_dec.T)
    projected = tracer.q(7, project=True)
    assert projected.shape == (25, 25)
    close(jnp.einsum("bi,ij,bj->b", with_constant(f), projected, with_constant(f)), y @ tracer.directions[7], 1e-4)


def test_an_applied_normalisation_scales_directions_and_basis():
    inp = random_sae("mlp_in", normalize=4.0, apply_normalize=True)
    out = random_sae("mlp_out", normalize=2.0, apply_normalize=True)
    tracer = Tracer(random_model(), 1, inp=inp, out=out)
    close(tracer.basis, jax.jacobian(inp.decode)(jnp.zeros(24)))
    close(tracer.directions, out.w_enc / 2)
    ignored = dataclasses.replace(inp.config, apply_normalize=False)
    close(Tracer(random_model(), 1, inp=SAE(inp.params, ignored), out=out).basis, inp.w_dec)


def test_index_is_an_int_a_slice_or_an_array(tracer):
    whole = tracer.q(slice(None))
    assert whole.shape == (128, 32, 32)
    close(tracer.q(5), whole[5])
    close(tracer.q(np.int64(5)), whole[5])
    close(tracer.q(slice(3, 9, 2)), whole[3:9:2])
    close(tracer.q([7, 7, 0]), whole[jnp.array([7, 7, 0])])
    close(tracer.q(jnp.array([127])), whole[127:])
    close(tracer.q([3, 4], project=True)[1], tracer.q(4, project=True))
    assert tracer.q([]).shape == (0, 32, 32)


@pytest.mark.parametrize("idx", [128, -1, [0, 500], np.array([-3])])
def test_index_out_of_range(tracer, idx):
    with pytest.raises(
        UnknownNameError, match=r"no feature (128|-1|500|-3) in SAE 1-mlp-out-x4-k6: choose one of 0 \.\.\. 127"
    ):
        tracer.q(idx)


@pytest.mark.parametrize("idx", [np.array([0.5]), np.zeros((2, 2), int), np.array([True, False])])
def test_index_of_a_wrong_kind(tracer, idx):
    with pytest.raises(ValueError, match="name output features by an int"):
        tracer.q(idx)


def test_q_inside_jit_and_vmap(tracer):
    expected = tracer.q([4, 9])
    close(jax.jit(tracer.q)(jnp.array([4, 9])), expected)
    close(jax.vmap(tracer.q)(jnp.array([4, 9])), expected)


def test_grad_reaches_the_models_weights(tracer, lm):
    def strength(lm):
        q = mlp_tensor(lm, 1).interaction(tracer.directions[:1])
        return spectra.truncated_eigenvalues(q, k=2)[0]

    value, gradient = jax.value_and_grad(strength)(lm)
    mlp = gradient.params["layers"]["mlp"]
    # The eigenvalues are linear in each of the three weights.
    for name in ("w_l", "w_r", "w_p"):
        close(jnp.sum(mlp[name] * lm.params["layers"]["mlp"][name]), value, 1e-4)
        assert not mlp[name][0].any() and mlp[name][1].any()


def test_compute_does_not_depend_on_the_batch_size():
    tracer = Tracer(random_model(), 1, inp=random_sae("mlp_in"), out=random_sae("mlp_out", seed=1))

    def fn(q, power):
        return {"kurtosis": spectra.kurtosis(q), "pair": (q[:, 0], jnp.trace(q, axis1=1, axis2=2) ** power)}

    expected = fn(tracer.q(slice(None)), 2)
    for batch_size in (1, 7, 1000):
        result = tracer.compute(fn, batch_size=batch_size, power=2)
        jax.tree.map(lambda a, b: close(a, b, 1e-4), result, expected)


def test_compute_projects(tracer):
    result = tracer.compute(lambda q: q[:, 3, :5], batch_size=50, project=True)
    close(result, tracer.q(slice(None), project=True)[:, 3, :5])


def test_compute_traces_the_function_once(tracer):
    batches = []
    tracer.compute(lambda q: batches.append(q.shape) or q[:, 0, 0], batch_size=50)
    assert batches == [(50, 32, 32)]


@pytest.mark.parametrize("fn", [jnp.sum, lambda q: (q[:, 0, 0], q[0])])
def test_compute_wants_one_result_a_matrix(tracer, fn):
    said = r"fn returned an array of shape .* for 30 matrices: the first axis must be the batch"
    with pytest.raises(ValueError, match=said):
        tracer.compute(fn, batch_size=30)


def test_compute_wants_a_batch(tracer):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        tracer.compute(spectra.kurtosis, batch_size=0)


def test_submatrix_holds_the_largest_entries(tracer):
    q = np.array(tracer.q(9, project=True))
    for n in (1, 2, 9):
        part = tracer.interaction_submatrix(9, n=n)
        left_over = np.abs(q)
        largest = np.sort(left_over.ravel())[-n:]
        left_over[np.ix_(part.features, part.features)] = 0
        assert left_over.max() <= largest[0]
        assert len(part.features) <= 2 * n and np.all(np.diff(part.features) > 0)
        close(np.abs(part.matrix).max(), largest[-1])
    for n in (0, 128 * 128 + 1):
        with pytest.raises(ValueError, match=f"n is {n}, but it must be between 1 and 16384"):
            tracer.interaction_submatrix(9, n=n)


@pytest.mark.parametrize("bias", [False, True])
def test_submatrix_explains_its_share_of_the_whole(bias):
    tracer = Tracer(random_model(bias=bias), 1, inp=random_sae("mlp_in"), out=random_sae("mlp_out", seed=1))
    q = np.asarray(tracer.q(4, project=True))
    for n in (1, 20, q.size):
        part = tracer.interaction_submatrix(4, n=n)
        close(part.matrix, q[np.ix_(part.features, part.features)])
        close(part.explained, (np.asarray(part.matrix) ** 2).sum() / (q**2).sum())
    close(part.explained, 1)


def test_submatrix_of_nothing():
    tracer = Tracer(random_model(), 1, inp=random_sae("mlp_in"), out=random_sae("mlp_out", seed=1))
    tracer.directions = tracer.directions.at[2].set(0)
    part = tracer.interaction_submatrix(2, n=3)
    assert part.features.tolist() == [0, 1]  # (0, 0), (0, 1) and (1, 0), the first of equals
    assert not part.matrix.any() and float(part.explained) == 0


def largest(tracer, features, n):
    """(feature, i, j) of the n largest |entries| with i <= j, from the whole matrices."""
    q = np.triu(np.asarray(tracer.q(features, project=True)))
    places = np.argsort(-np.abs(q), axis=None)[:n]
    out, i, j = np.unravel_index(places, q.shape)
    return list(zip(np.asarray(features)[out].tolist(), i.tolist(), j.tolist(), strict=True)), q[out, i, j]


ASKED = [None, 5, [9, 3, 9], slice(2, 100, 7), np.arange(40)]


@pytest.mark.parametrize(("feature", "sharded"), [*((asked, False) for asked in ASKED), (5, True), (ASKED[3], True)])
def test_top_interactions_are_those_of_the_whole_matrices(tracer, feature, sharded):
    mesh = jax.make_mesh((4,), ("features",), devices=jax.devices()[:4]) if sharded else None
    found = tracer.top_interactions(20, feature, mesh=mesh)
    asked = np.arange(128) if feature is None else np.unique(np.arange(128)[feature])
    names, values = largest(tracer, asked.tolist(), 20)
    assert list(zip(found.out.tolist(), found.i.tolist(), found.j.tolist(), strict=True)) == names
    close(found.value, values)


def test_top_interactions_count_a_constant_input_as_the_last_feature():
    tracer = Tracer(random_model(bias=True), 1, inp=random_sae("mlp_in"), out=random_sae("mlp_out", seed=1))
    names, _ = largest(tracer, [7], 30)
    found = tracer.top_interactions(30, 7)
    assert list(zip(found.out.tolist(), found.i.tolist(), found.j.tolist(), strict=True)) == names
    assert int(found.j.max()) == 24


def test_top_interactions_of_nothing_or_too_much(tracer):
    with pytest.raises(UnknownNameError, match=r"no feature 128 in SAE 1-mlp-out-x4-k6: choose one of 0 \.\.\. 127"):
        tracer.top_interactions(5, 128)
    with pytest.raises(
        ValueError, match="but it must be between 1 and 8256, the pairs i <= j of 128 features for 1 dir"
    ):
        tracer.top_interactions(8257, 0)
    with pytest.raises(ValueError, match=r"name at least one output feature"):
        tracer.top_interactions(1, [])


def test_cosine_of_an_empty_decoder_column_is_zero():
    out = random_sae("mlp_out", seed=1)
    out = SAE({**out.params, "w_dec": out.w_dec.at[:, 3].set(0)}, out.config)
    tracer = Tracer(random_model(), 1, inp=random_sae("mlp_in"), out=out)
    close(tracer.cosines([2, 3])[1], [0, 0])
    close(tracer.cosines([2, 3])[0], [1, 0])


def test_precision_is_the_highest_whatever_the_default(tracer):
    with jax.default_matmul_precision("bfloat16"):
        for function in (tracer.q, lambda idx: spectra.eigh(tracer.tensor, tracer.directions[idx]).values):
            text = jax.jit(function).lower(jnp.array([1, 2])).as_text()
            products = [line for line in text.splitlines() if "dot_general" in line]
            assert products and all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_layer_out_of_range(lm):
    for layer in (3, -1):
        with pytest.raises(UnknownNameError, match=rf"no layer {layer} in this model: choose one of 0 \.\.\. 2"):
            Tracer(lm, layer, scope=published.SCOPE)


@pytest.mark.parametrize(("kwargs", "kind"), [({"gate": "silu"}, "gated by silu"), ({"bilinear": False}, "plain")])
def test_an_mlp_that_is_no_tensor(kwargs, kind):
    with pytest.raises(ValueError, match=f"this model is {kind}"):
        Tracer(random_model(**kwargs), 0)


@pytest.mark.parametrize(
    ("inp", "out", "message"),
    [
        ({"site": "resid-post"}, {}, "inp is an SAE of resid_post, but it must be an SAE of mlp_in or resid_mid"),
        ({}, {"site": "mlp-in"}, "out is an SAE of mlp_in, but it must be an SAE of mlp_out"),
        ({"expansions": 4}, {}, "inp has unknown keys expansions: use site, expansion, k and tag"),
        ({}, random_sae("mlp_in"), "out is an SAE of mlp_in, but it must be an SAE of mlp_out"),
        (random_sae("mlp_in", layer=0, d_model=32), {}, "of layer 0, but layer 1 is traced"),
        (random_sae("mlp_in"), {}, "with d_model 8, but the model has 32"),
    ],
)
def test_an_sae_that_does_not_fit(lm, inp, out, message):
    with pytest.raises(ValueError, match=message):
        Tracer(lm, 1, inp=inp, out=out, scope=published.SCOPE)


def test_an_unknown_sae_or_site_lists_those_that_exist(lm):
    with pytest.raises(UnknownNameError, match=r"no SAE 1-mlp-in-x16-k\* in .*: choose one of .*1-mlp-in-x4-k6"):
        Tracer(lm, 1, inp={"expansion": 16}, scope=published.SCOPE)
    with pytest.raises(UnknownNameError, match=r"no site 'mlp-inn' in what an SAE can read: choose one of .*mlp_in"):
        Tracer(lm, 1, inp={"site": "mlp-inn"}, scope=published.SCOPE)


def test_a_model_without_a_source_needs_a_scope():
    with pytest.raises(ValueError, match="pass scope=, or an SAE as inp"):
        Tracer(random_model(), 1)


def test_a_bilinear_encoder_has_no_rows():
    out, inp = random_sae("mlp_out", bilinear_encoder=True), random_sae("mlp_in", bilinear_encoder=True)
    with pytest.raises(ValueError, match="use_encoder=False"):
        Tracer(random_model(), 1, inp=inp, out=out)
    assert Tracer(random_model(), 1, inp=inp, out=out, use_encoder=False).q(0).shape == (8, 8)
