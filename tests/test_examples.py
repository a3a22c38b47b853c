"""The chapters run as they are, offline, and leave their figures."""

import runpy
from pathlib import Path

import pytest

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
