"""The activation buffer: every token that counts once, shuffled alike at all sites, restored without being saved."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.transformer import Transformer, TransformerConfig
from bilinear_jax.training.batches import batches
from bilinear_jax.training.fit import BatchIterator, ByStep
from bilinear_jax.training.harvest import TOKENS, Harvest
from bilinear_jax.training.mesh import make_mesh, place

SEQ, ROWS, PAD, N_VOCAB = 8, 3, 0, 2000
SITES = [("resid_pre", 0), ("mlp_out", 0)]


def filled(config: TransformerConfig, array) -> dict:
    """Parameters made by ``array(shape)``."""
    init = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return jax.tree.map(lambda leaf: jnp.asarray(array(leaf.shape), leaf.dtype), init["params"])


@pytest.fixture(scope="module")
def planted() -> LanguageModel:
    """No attention, no norm: resid_pre is (token, 1), and mlp_out (0, token^2), exactly."""
    config = TransformerConfig(
        n_layer=2, n_head=1, d_model=2, d_hidden=1, n_ctx=SEQ, n_vocab=N_VOCAB, normalization=False, pad_id=PAD
    )
    params = filled(config, np.zeros)
    ids = jnp.arange(N_VOCAB, dtype=jnp.float32)
    mlp = params["layers"]["mlp"]
    side, down = mlp["w_l"].at[:, 0, 0].set(1), mlp["w_p"].at[:, 1, 0].set(1)
    params["layers"]["mlp"] = mlp | {"w_l": side, "w_r": side, "w_p": down}
    return LanguageModel(params | {"w_e": jnp.stack([ids, jnp.ones(N_VOCAB)], axis=1)}, config)


def numbered(step: int) -> np.ndarray:
    """Rows of which every token is another number, but for the padding that ends some of them."""
    rows = 1 + step * ROWS * SEQ + np.arange(ROWS * SEQ).reshape(ROWS, SEQ)
    for row in range(ROWS):
        rows[row, SEQ - (step + row) % 4 :] = rows[row, SEQ - (step + row) % 4 :] if (step + row) % 4 == 0 else PAD
    return rows


def counted(steps: int) -> np.ndarray:
    rows = np.concatenate([numbered(step) for step in range(steps)])[:, 1:]
    return rows[rows != PAD]


def take(harvest, n: int) -> list[dict]:
    return [jax.tree.map(np.asarray, next(harvest)) for _ in range(n)]


def tokens_of(some: list[dict]) -> np.ndarray:
    return np.concatenate([batch["resid_pre", 0][:, 0] for batch in some])


@pytest.mark.parametrize("buffer_tokens", [7, 40, 97])  # less than one batch of rows, and several of them
def test_each_chunk_holds_the_next_tokens_that_count_once_each(planted, buffer_tokens):
    harvest = Harvest(planted, SITES, ByStep(numbered), 7, buffer_tokens)
    assert harvest.size == buffer_tokens // 7 * 7
    expected = counted(80)
    for chunk in range(4):
        served = tokens_of(take(harvest, harvest.size // 7))
        np.testing.assert_array_equal(np.sort(served), expected[chunk * harvest.size : (chunk + 1) * harvest.size])


def test_a_row_is_of_the_same_token_at_every_site(planted):
    for batch in take(Harvest(planted, SITES, ByStep(numbered), 10, 60), 8):
        np.testing.assert_array_equal(batch["mlp_out", 0][:, 1], batch["resid_pre", 0][:, 0] ** 2)
        assert {value.shape for value in batch.values()} == {(10, 2)}


def test_the_ids_are_those_of_the_rows(planted):
    """And nothing else changes with them."""
    harvests = [Harvest(planted, SITES, ByStep(numbered), 10, 60, tokens=tokens) for tokens in (True, False)]
    for batch, other in zip(*(take(harvest, 14) for harvest in harvests), strict=True):  # more than two chunks
        ids = batch.pop(TOKENS)
        assert ids.dtype == np.int32 and ids.shape == (10,)
        np.testing.assert_array_equal(ids, batch["resid_pre", 0][:, 0])
        jax.tree.map(np.testing.assert_array_equal, batch, other)


def test_shuffled_over_the_whole_chunk_and_otherwise_in_the_next(planted):
    def places(seed):
        served = tokens_of(take(Harvest(planted, SITES, ByStep(numbered), 20, 200, seed), 20)).reshape(2, 200)
        return np.argsort(np.argsort(served, axis=1), axis=1)  # of each token, in its chunk

    (first, second), (other, _) = places(0), places(1)
    for chunk in (first, second, other):
        assert abs(np.corrcoef(chunk, np.arange(200))[0, 1]) < 0.3
        assert all(np.ptp(batch) > 120 for batch in chunk.reshape(10, 20))  # every batch is from all over it
    assert (first == second).mean() < 0.1 and (first == other).mean() < 0.1


def test_a_mask_of_your_own(planted):
    harvest = Harvest(planted, SITES, ByStep(numbered), 8, 40, mask=lambda tokens: tokens % 5 == 0)
    every = np.concatenate([numbered(step) for step in range(40)]).reshape(-1)
    np.testing.assert_array_equal(np.sort(tokens_of(take(harvest, 5))), np.sort(every[every % 5 == 0][:40]))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    config = TransformerConfig(n_layer=3, n_head=2, d_model=8, d_hidden=16, n_ctx=6, n_vocab=50)
    random = np.random.default_rng(1)
    return LanguageModel(filled(config, lambda shape: random.normal(scale=0.4, size=shape)), config)


REAL = [("mlp_in", 0), ("mlp_out", 1), ("mlp_in", 1)]


def harvest_of(lm, seed=0, **options) -> Harvest:
    """Chunks of 4 batches that end within a batch of rows."""
    stream = np.random.default_rng(5).integers(50, size=900)
    return Harvest(lm, REAL, batches(stream, 6, 4, seed=2), 16, 70, seed, **options)


@pytest.mark.parametrize("tokens", [False, True])
def test_restored_bit_identically_without_being_saved(model, tokens):
    harvest = harvest_of(model, tokens=tokens)
    assert isinstance(harvest, BatchIterator)
    states, served = [], []
    for _ in range(12):
        states.append(json.dumps(harvest.get_state()))
        served += take(harvest, 1)
    assert len(set(states)) == 12 and max(map(len, states)) < 1000
    for begin in (0, 2, 3, 4, 7, 8):
        fresh = harvest_of(model, tokens=tokens)
        take(fresh, begin % 3)  # wherever it was
        fresh.set_state(json.loads(states[begin]))
        assert json.dumps(fresh.get_state()) == states[begin]
        jax.tree.map(np.testing.assert_array_equal, take(fresh, 12 - begin), served[begin:])


def test_the_values_are_those_of_the_model_and_compute_dtype_is_its(model):
    import dataclasses

    rows = np.arange(24).reshape(4, 6)
    for dtype in (jnp.float32, jnp.bfloat16):
        lm = dataclasses.replace(model, compute_dtype=dtype)
        harvest = Harvest(lm, REAL, ByStep(lambda _: rows), 20, 20)  # one batch of rows is one chunk
        batch, captured = take(harvest, 1)[0], lm.capture(rows, REAL)
        for site in REAL:
            expected = np.asarray(captured[site][:, 1:].reshape(20, 8).astype(jnp.float32))
            assert batch[site].dtype == np.float32
            order = [np.abs(batch[site] - row).sum(axis=1).argmin() for row in expected]
            assert sorted(order) == list(range(20))
            np.testing.assert_allclose(batch[site][order], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [True, False])
def test_memory_is_the_buffer_and_within_the_bound(model, tokens):
    harvest = harvest_of(model, tokens=tokens)
    take(harvest, 9)
    held = sum(buffer.nbytes for buffer in harvest._buffers.values())
    assert held == harvest.nbytes == 64 * (8 + 8 + 8 + tokens) * 4
    # one site twice is one site
    assert Harvest(model, [*REAL, ("mlp-in", 1)], ByStep(numbered), 16, 70, tokens=tokens).nbytes == held


def test_on_a_mesh_it_is_the_same_and_shared_out(model):
    mesh = make_mesh()
    lm = LanguageModel(place(model.params, mesh), model.config)
    ours, theirs = harvest_of(lm, mesh=mesh, tokens=True), harvest_of(model, tokens=True)
    for _ in range(6):
        batch = next(ours)
        assert {len(value.sharding.device_set) for value in batch.values()} == {8}
        assert {value.addressable_shards[0].data.shape for value in batch.values()} == {(2, 8), (2,)}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), batch, next(theirs))


def test_wrong_use_is_told(model):
    rows = ByStep(lambda _: np.arange(24).reshape(4, 6))
    for sites, batch_size, buffer_tokens, message in [
        (REAL, 16, 15, r"15 tokens cannot hold one batch of 16.*\(a token takes 96 bytes\)"),
        (REAL, 0, 15, "batch_size must be at least 1"),
        ([], 4, 16, "there is no site to capture: name at least one of resid_pre"),
        (["mlp_in"], 4, 16, "pairs of a name and a layer"),
    ]:
        with pytest.raises(ValueError, match=message):
            Harvest(model, sites, rows, batch_size, buffer_tokens)
    for site, message in [
        (("mlp_in", 3), r"no layer 3 in this model's mlp_in: choose one of 0 \.\.\. 2"),
        (("pattern", 0), "no site 'pattern' in what an SAE can read: choose one of resid_pre"),
    ]:
        with pytest.raises(UnknownNameError, match=message):
            Harvest(model, [site], rows, 4, 16)
    with pytest.raises(ValueError, match="multiple of 8"):
        Harvest(model, REAL, rows, 12, 24, mesh=make_mesh())
    with pytest.raises(ValueError, match="leaves none of"):
        next(Harvest(model, REAL, rows, 4, 100, mask=lambda tokens: tokens < 0))
    with pytest.raises(ValueError, match=r"token_mask has shape .* the tokens"):
        next(Harvest(model, REAL, rows, 4, 16, mask=lambda tokens: tokens[:, 1:] > 0))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        next(Harvest(model, REAL, ByStep(lambda _: np.full((4, 6), 50)), 4, 16))
