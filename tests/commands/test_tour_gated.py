"""The tour of a gated model: what it lists is what the form's MLP does, and what it refuses."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny_llama

import bilinear_jax as bj
from bilinear_jax.commands import tour_gated
from bilinear_jax.commands.main import main
from bilinear_jax.measure.certificate import Certificate

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tour")
    (folder / "a.txt").write_text(tiny_llama.TEXT)
    tiny_llama.write(folder / "llama")
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    return bj.load(folder / "llama")


@pytest.fixture(scope="module")
def toured(folder) -> str:
    """What the tour prints."""
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *parts, **options: printed.append(" ".join(map(str, parts))))
        patch.setattr(tour_gated, "SEQ", 24)
        words = ["--model", folder / "llama", "--data", folder / "a.txt", "--out", folder / "out"]
        assert main(["tour", *map(str, words)]) == 0
    return "\n".join(printed)


def test_it_tells_of_the_token_and_of_the_layer_that_moves_it_most(toured, folder, lm):
    assert "== Which layers move the logit of ␣things, against the mean of all tokens" in toured
    lines = toured.split("R2 of the form\n")[1].splitlines()[:2]
    layer = max(lines, key=lambda line: float(line.split()[1]) ** 2 * float(line.split()[2])).split()[0]
    assert f"== What the MLP of layer {layer} looks for" in toured and f"In layer {layer} the form" in toured
    assert toured.count("eigenvalue ") == 3 and "[" in toured.split("eigenvalue ")[1]
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["certificate.png", "spectrum.png"]


def test_contributions_add_up_to_what_the_form_gives(toured, lm):
    """Over all eigenvectors, at every position but 0: u . y of the bilinear MLP on the inputs of the gated model."""
    tokens = RNG.integers(3, lm.config.n_vocab, (11, 24))  # 0 is padding
    form, layer = bj.bilinear_form(lm, tokens, layers=[1]), 1
    u = bj.Directions(RNG.normal(size=(1, lm.config.d_model)))
    tracer = bj.Tracer(form, layer, out=u)
    every = bj.spectra.eigh(tracer.tensor, u.vectors)
    found = tour_gated.contributions(form, layer, every.values[0], every.vectors[0].T, tokens)
    # Up to this layer the form is the model, so its MLP reads the same.
    expected = np.asarray(form.lm.capture(tokens, [("mlp_out", layer)])["mlp_out", layer]) @ np.asarray(u.vectors[0])
    np.testing.assert_allclose(found.sum(axis=0)[:, 1:], expected[:, 1:], atol=2e-4 * np.abs(expected).max())
    assert (found[:, :, 0] == 0).all()


def test_the_largest_are_one_a_row():
    given = np.array([[0.0, 3.0, -1.0], [0.0, -5.0, 4.9], [2.0, 0.0, 0.0]])
    largest = tour_gated.largest_of(given, 2)
    assert [part.tolist() for part in largest] == [[-5.0, 3.0], [1, 0], [1, 1]]


def test_moved_is_the_spread_along_the_direction():
    y = RNG.normal(size=(2, 500, 3)) * [1.0, 2.0, 3.0]
    covariance = np.stack([np.cov(one.T, bias=True) for one in y])
    u = bj.Directions(np.array([[1.0, -1.0, 0.5]]))
    error = np.stack([np.zeros((3, 3)), covariance[1] / 4])
    certificate = SimpleNamespace(output_covariance=covariance, error_square=error)
    certificate.of = lambda directions: Certificate.of(certificate, directions)
    spread, r2 = tour_gated.moved(certificate, u)
    np.testing.assert_allclose(spread, (y @ np.asarray(u.vectors[0])).std(axis=1), rtol=1e-5)
    np.testing.assert_allclose(r2, [1, 0.75], rtol=1e-6)


def test_a_frequent_word_is_a_word(lm):
    words = lm.tokenizer(" saw saw saw saw things things things cat", add_special_tokens=False)["input_ids"]
    found = tour_gated.frequent_word(lm, np.array([words]))
    assert lm.tokenizer.decode([found]) == " things"
    no_words = np.array([[words[0], words[0], words[-1]]])
    assert lm.tokenizer.decode([tour_gated.frequent_word(lm, no_words)]) == " saw"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "llama has gated MLPs, which are no tensors: give --data TEXT"),
        (["--data", "{}/short.txt"], "short.txt has 4 tokens, but the tour needs at least 512: give more text"),
        (["--data", "{}/a.txt", "--token", " thingsaw"], "' thingsaw' is "),
        (["--data", "{}/a.txt", "--model", "ts-nano"], "ts-nano has bilinear MLPs, so it needs no form: leave out"),
    ],
)
def test_what_it_refuses_is_one_line(folder, words, message, capsys):
    (folder / "short.txt").write_text("The dog saw")
    words = [word.format(folder) for word in words]
    given = ["tour", "--model", str(folder / "llama"), "--out", str(folder / "none"), *words]
    assert main(given) == 1
    error = capsys.readouterr().err
    assert error.startswith("bilinear-jax: error: ") and message in error and error.count("\n") == 1
    assert not (folder / "none").exists()


def test_a_token_needs_a_text(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["tour", "--token", " dog"])
    assert stopped.value.code == 2 and "--token is for a gated model" in capsys.readouterr().err
