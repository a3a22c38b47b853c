"""The chapters run as they are, offline, and leave their figures."""

import runpy
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import bilinear_jax as bj

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_language_chapter(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(EXAMPLES / "language.py"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cosines.png", "interactions.png"]
    assert names["lm"].config.n_layer == 4
    printed = capsys.readouterr().out
    for feature in names["best"][:2].tolist():
        assert f"feature {feature} " in printed
    assert f"feature {int(names['row'])} " in printed


def test_the_readme_is_the_same_chapter(tmp_path, monkeypatch, capsys):
    """The 20 lines of the README run, and find what the example finds."""
    monkeypatch.chdir(tmp_path)
    code = (EXAMPLES.parent / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cosines.png", "interactions.png"]
    assert f"feature {int(names['best'][0])} " in capsys.readouterr().out


def test_the_training_example_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["training.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / "training.py"))
    assert stopped.value.code == 0
    assert "--corpus-rows" in capsys.readouterr().out


def run(name, out, monkeypatch, *options):
    monkeypatch.setattr("sys.argv", [name, "--out", str(out), *options])
    names = runpy.run_path(str(EXAMPLES / name))
    return names, sorted(path.name for path in out.iterdir())


def test_the_toy_chapter(tmp_path, monkeypatch, capsys):
    _, figures = run("toy.py", tmp_path, monkeypatch, "--steps", "1000")
    assert figures == [f"toy-{name}.png" for name in ("and-xor", "and", "nor", "or", "xor")]
    assert "xor of x0 and x1: 1.00 x0^2 + 1.00 x1^2 + -2.00 x0 x1" in capsys.readouterr().out


def test_the_image_chapter(tmp_path, monkeypatch, capsys):
    names, figures = run("images.py", tmp_path, monkeypatch, "--epochs", "8", "--hidden", "32", "--batch-size", "128")
    kinds = ("classes", "explanation", "gallery-without-noise", "gallery", "masks", "spectrum")
    assert figures == [f"images-{kind}.png" for kind in kinds]
    printed = capsys.readouterr().out
    assert "  32 eigenvectors a class: accuracy" in printed and "permuted: " in printed
    assert names["clean"] > 0.5  # it has learned


def test_the_chapter_on_shared_structure(tmp_path, monkeypatch, capsys):
    options = ("--features", "4", "--ranks", "2", "8", "--steps", "4")
    names, figures = run("decomposition.py", tmp_path, monkeypatch, *options)
    assert figures == ["decomposition.png"]
    assert names["shared"] == sorted(names["shared"])  # more components explain more
    values, turned = names["spectrum"].values, names["control"]  # the control keeps every eigenvalue
    kept = bj.spectra.eigh(turned, jnp.eye(4)).values
    np.testing.assert_allclose(kept, values, atol=1e-5)
    printed = capsys.readouterr().out
    assert "8 shared components explain" in printed and "8 components of the control explain" in printed
