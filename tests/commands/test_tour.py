"""The tour, on the model that ships: its figures, what it says at the end, and its exit status when it fails."""

import re

import numpy as np
import pytest

import bilinear_jax as bj
from bilinear_jax.commands.main import main
from bilinear_jax.commands.tour import _largest_pairs


@pytest.fixture(scope="module")
def toured(tmp_path_factory):
    out = tmp_path_factory.mktemp("tour") / "figures"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *parts, **options: printed.append(" ".join(map(str, parts))))
        status = main(["tour", "--out", str(out)])
    return status, "\n".join(printed), out


def test_it_ends_well_and_leaves_its_figures(toured):
    status, _, out = toured
    assert status == 0
    assert sorted(path.name for path in out.iterdir()) == ["cosines.png", "interactions.png", "spectrum.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in out.iterdir())


def test_its_numbers_are_those_of_the_library(toured):
    _, text, out = toured
    tracer = bj.Tracer(bj.load("ts-nano"), layer=2)
    best, score = re.search(
        r"Output feature (\d+) of .* has the largest top-two eigenvalues, (\d+\.\d+)", text
    ).groups()
    q = np.asarray(tracer.q(int(best)))
    values = np.sort(np.abs(np.linalg.eigvalsh(q)))[::-1]
    np.testing.assert_allclose(float(score), values[:2].sum(), atol=6e-4)
    share = float(re.search(r"These two explain ([\d.]+)%", text).group(1))
    np.testing.assert_allclose(share, 100 * (values[:2] ** 2).sum() / (values**2).sum(), atol=0.06)
    assert str(out / "interactions.png") in text.splitlines()[-1]


def test_pairs_count_both_orders_once():
    matrix = np.array([[5.0, -3.0, 0.0], [-3.0, 1.0, 2.0], [0.0, 2.0, 4.5]])
    pairs = _largest_pairs(matrix, np.array([7, 8, 9]), 3)
    assert pairs == [(8, 7, -6.0), (7, 7, 5.0), (9, 9, 4.5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tour", "--model", "no-such-model"], "ts-nano"),
        (["tour", "--layer", "9"], "9"),
    ],
)
def test_errors_are_one_line_and_status_1(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("bilinear-jax: ") and message in error and "Traceback" not in error


def test_wrong_use_is_status_2():
    with pytest.raises(SystemExit) as stopped:
        main(["tuor"])
    assert stopped.value.code == 2
