"""``bilinear-jax certify``: its numbers are those of the library, what it saves loads, and what it refuses."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_llama

import bilinear_jax as bj
from bilinear_jax.commands import certify
from bilinear_jax.commands.main import main

SMALL = ["--seq", "12", "--rows", "12", "--loss-tokens", "30", "--batch-size", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama of two layers as Hugging Face stores it, with a tokenizer; and two texts beside it."""
    folder = tmp_path_factory.mktemp("certify")
    tiny_llama.write(folder / "llama")
    (folder / "a.txt").write_text(tiny_llama.TEXT)
    (folder / "b.txt").write_text(tiny_llama.TEXT[::-1])
    return folder


@pytest.fixture(scope="module")
def result(folder) -> dict:
    """What the command prints with --json. It also makes a form and a figure in the folder."""
    words = ["--json", "--sequential", "--held-out", folder / "b.txt"]
    words += ["--out", folder / "form", "--figure", folder / "figure.png"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(command(folder, *words)) == 0
    return json.loads(printed.getvalue())


@pytest.fixture(scope="module")
def form(folder):
    lm = bj.load(folder / "llama")
    tokens, held_out = rows_of(lm, folder / "a.txt", 12), rows_of(lm, folder / "b.txt", 3)
    return bj.bilinear_form(lm, tokens, held_out=held_out, sequential=True, batch_size=4, loss_tokens=30)


def command(folder: Path, *words) -> list[str]:
    return ["certify", str(folder / "llama"), "--data", str(folder / "a.txt"), *SMALL, *map(str, words)]


def rows_of(lm, path: Path, rows: int) -> np.ndarray:
    ids = np.asarray(lm.tokenizer(path.read_text())["input_ids"])
    return ids[: rows * 12].reshape(rows, 12)


def test_the_json_is_the_certificate(result, form):
    expected, found = form.certificate, result["certificate"]
    assert found == expected.as_json()
    scores = found["controls"]["shuffled"]
    np.testing.assert_array_equal(scores["loss_added"], expected.controls["shuffled"].loss_added)
    np.testing.assert_array_equal(found["form"]["r2"], expected.r2)
    assert found["tokens"] == 3 * 11
    about = ("format", "version", "family", "gate", "data", "held_out", "rows", "seq", "layers", "sequential")
    assert [result[name] for name in about] == [
        *("bilinear_jax.certificate", 1, "llama", "silu", "a.txt", "b.txt", 12, 12, [0, 1], True)
    ]


def test_the_table_says_what_was_measured_where(result, form):
    expected = form.certificate
    head, table, whole, *_ = certify.text(result).split("\n\n")
    assert "fitted on a.txt (12 rows of 12 tokens), layer after layer; measured on b.txt:\n33 tokens, and 22 f" in head
    lines = [line.split() for line in table.splitlines()]
    assert " ".join(lines[0]) == "layer R2 linear shuffled loss added +- removed kept"
    for layer, line in enumerate(lines[1:]):
        numbers = [expected.r2[layer], *(expected.controls[name].r2[layer] for name in ("linear", "shuffled"))]
        numbers += [expected.loss_added[layer], expected.loss_added_error[layer], expected.loss_removed[layer]]
        np.testing.assert_allclose([float(one) for one in line[1:7]], numbers, atol=6e-5)
        assert (int(line[0]), int(line[7])) == (layer, expected.kept[layer])
    assert len(lines) == 3
    assert f"loss added {expected.loss_added_all:+.4f} +- {expected.loss_added_all_error:.4f}" in whole
    assert f"nats a token; linear {expected.controls['linear'].loss_added_all:+.4f} +- " in whole
    assert whole.endswith(f"\nthe model's own loss: {expected.loss:.4f}")
    head = certify.text(result | {"held_out": None, "sequential": False}).split("\n\n")[0]
    assert "(12 rows of 12 tokens, the last quarter held out); measured on the last quarter of a.txt:" in head
    assert "its MLPs are bilinear, so the model is its own form" in certify.text(result | {"gate": None})


def test_the_saved_form_loads_with_its_tokenizer_and_its_certificate(folder, result, form, capsys):
    out = folder / "form"
    assert json.loads((out / "certificate.json").read_text()) == result
    lm, saved = bj.load(folder / "llama"), bj.load(out)
    tokens = rows_of(lm, folder / "a.txt", 12)
    np.testing.assert_array_equal(saved.logits(tokens), form.lm.logits(tokens))
    assert np.abs(np.asarray(saved.logits(tokens) - lm.logits(tokens))).max() > 1e-3
    assert saved.encode("The old dog").tolist() == lm.encode("The old dog").tolist()
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    [weights] = [line.strip() for line in lm.summary().splitlines() if "SHA-256" in line]
    assert weights in saved.summary()
    assert main(command(folder, "--out", out)) == 1  # before anything is loaded
    assert "already exists: name another folder, or replace it with force (--force)" in capsys.readouterr().err
    assert main(["certify", str(out), "--data", str(folder / "a.txt"), *SMALL]) == 1
    assert "this model is a bilinear form already: give the model that it was made from" in capsys.readouterr().err


def test_the_options_reach_the_fit(folder, monkeypatch, capsys):
    given = []

    def fit(lm, tokens, **options):
        given.append((tokens.shape, options))
        raise ValueError("enough")

    monkeypatch.setattr("bilinear_jax.measure.bilinear_form.bilinear_form", fit)
    words = ["--layers", "1,0-1", "--sequential", "--held-out", folder / "b.txt", "--rows", "8"]
    assert main(command(folder, *words)) == main(command(folder)) == 1
    (shape, options), (other_shape, others) = given
    assert shape == (8, 12) and options.pop("held_out").shape == (2, 12)
    assert options == {"layers": [1, 0, 1], "sequential": True, "batch_size": 4, "loss_tokens": 30}
    assert other_shape == (9, 12) and others.pop("held_out").shape == (3, 12)
    assert others == options | {"layers": None, "sequential": False}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "3"], "a.txt gives 3 rows of 12 tokens, but at least 4 are needed to hold one out: give more text"),
        (["--seq", "64", "--rows", "1"], "a.txt gives 1 row of 64 tokens"),
        (["--layers", "5"], "no layer 5"),
        (["--held-out", "none.txt"], "none.txt"),
    ],
)
def test_what_cannot_be_certified_is_one_line(folder, capsys, words, message):
    assert main(command(folder, *words)) == 1
    error = capsys.readouterr().err
    assert error.startswith("bilinear-jax: error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m"], "the following arguments are required: --data"),
        (["--data", "a.txt"], "the following arguments are required: MODEL"),
        (["m", "--data", "a.txt", "--layers", "4-2"], "the range 4-2 is empty: write 2-4"),
        (["m", "--data", "a.txt", "--layers", "first"], "cannot read 'first': name layers as '3,17,20-29' or 'all'"),
        (["m", "--data", "a.txt", "--seq", "1"], "a row needs at least 2 tokens"),
        (["m", "--data", "a.txt", "--figure", "a.pdf"], "'a.pdf' does not end in .png"),
    ],
)
def test_wrong_use_is_status_2(capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        main(["certify", *words])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_number_that_is_unknown_is_left_out():
    scores = {"r2": [None], "loss_added": [0.5], "loss_added_error": [0.1]}
    scores |= {"loss_added_all": 0.5, "loss_added_all_error": 0.1}
    measured = {"form": scores, "controls": {}, "loss_removed": [1.0], "kept": [2], "loss": 3.0}
    measured |= {"tokens": 10, "loss_tokens": 10}
    result = {"model": "m", "gate": "silu", "data": "a", "held_out": "b", "rows": 4, "seq": 8, "sequential": False}
    line = certify.text(result | {"certificate": measured}).split("\n\n")[1].splitlines()[1]
    assert line.split() == ["0", "+0.5000", "0.1000", "+1.0000", "2"]
    assert certify.figure_of(result | {"certificate": measured}).axes[0].get_ylim()[0] == 0


def test_distillation_trains_resumes_and_says_so(folder, tmp_path, capsys):
    (tmp_path / "long.txt").write_text(tiny_llama.TEXT * 40)
    words = ["certify", str(folder / "llama"), "--data", str(tmp_path / "long.txt"), *SMALL]
    words += ["--distil", "3", "--run", str(tmp_path / "run")]
    assert main([*words, "--json", "--out", str(tmp_path / "form")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["distilled"] == 3 and result["before"]["form"]["r2"] != result["certificate"]["form"]["r2"]
    assert main(words) == 0  # done already: it only measures
    printed = capsys.readouterr().out
    whole = result["certificate"]["form"]["loss_added_all"], result["before"]["form"]["loss_added_all"]
    assert f"loss added {whole[0]:+.4f}" in printed and f"before 3 updates of distillation {whole[1]:+.4f}" in printed
    lm = bj.load(tmp_path / "form")
    assert lm.config.original_gate == "silu"
    with pytest.raises(SystemExit, match="2"):
        main(words[:-2])
    assert "belong together" in capsys.readouterr().err
