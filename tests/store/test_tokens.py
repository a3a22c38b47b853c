"""A token file takes the place of nothing that came to be there while the text was tokenised."""

import errno
import json
import os

import pytest
from published import snapshot
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from bilinear_jax.store import tokens
from bilinear_jax.store.tokens import open_tokens, tokenize


@pytest.fixture
def tokenizer():
    made = Tokenizer(models.WordLevel({"?": 0, "a": 1, "cat": 2, "dog": 3}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a cat a dog")
    return path


def meanwhile(monkeypatch, action) -> None:
    """Call the action while the text is read."""
    read = tokens.read_documents

    def documents(*arguments, **options):
        yield from read(*arguments, **options)
        action()

    monkeypatch.setattr(tokens, "read_documents", documents)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("name", ["tokens", "tokens.json"])
def test_a_file_that_appeared_meanwhile_stays(text, tokenizer, tmp_path, monkeypatch, name, links):
    def without(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", without)
    meanwhile(monkeypatch, lambda: (tmp_path / name).write_text('{"mine": 1}'))
    with pytest.raises(FileExistsError, match=r"appeared while the text was tokenised, and stays as it is") as error:
        tokenize(text, tokenizer, tmp_path / "tokens")
    assert (tmp_path / name).read_text() == '{"mine": 1}'
    left = str(error.value).partition("complete in ")[2].partition(": ")[0]
    assert open_tokens(left, tokenizer).tokens.tolist() == [1, 2, 1, 3]
    assert len(snapshot(tmp_path)) == 4


def test_of_two_that_tokenise_at_once_the_first_to_end_stays(text, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "other.txt").write_text("dog dog")

    def another():
        monkeypatch.undo()
        tokenize(tmp_path / "other.txt", tokenizer, tmp_path / "tokens")

    meanwhile(monkeypatch, another)
    with pytest.raises(FileExistsError, match="tokenise again to use what is there"):
        tokenize(text, tokenizer, tmp_path / "tokens")
    assert open_tokens(tmp_path / "tokens", tokenizer).tokens.tolist() == [3, 3]


def test_the_name_of_the_sidecar_is_taken(text, tokenizer, tmp_path, monkeypatch):
    """Of ``stories`` it is ``stories.json``, which may well be the text itself."""

    def unread(*_, **__):
        raise AssertionError("the work has begun")

    (tmp_path / "stories.json").write_text('{"text": "a cat"}')
    with monkeypatch.context() as patch, pytest.raises(FileExistsError, match=r"stories\.json is another file, but"):
        patch.setattr(tokens, "read_documents", unread)
        tokenize(text, tokenizer, tmp_path / "stories")
    assert sorted(snapshot(tmp_path)) == ["stories.json", "text.txt"]
    tokenize(text, tokenizer, tmp_path / "tokens")
    (tmp_path / "tokens").unlink()  # a sidecar that is left over is no hindrance
    text.write_text("dog")
    assert tokenize(text, tokenizer, tmp_path / "tokens").tokens.tolist() == [3]
    assert json.loads((tmp_path / "tokens.json").read_text())["n_tokens"] == 1
    assert sorted(snapshot(tmp_path)) == ["stories.json", "text.txt", "tokens", "tokens.json"]


@pytest.mark.parametrize("number", [4, 70_000])
def test_a_token_id_outside_the_vocabulary(text, tokenizer, tmp_path, number):
    """As 16 bits, 70,000 would be another token, or a raw error; 4 would be one that the model does not have."""
    tokenizer.post_processor = processors.TemplateProcessing(single="[S] $A", special_tokens=[("[S]", number)])
    with pytest.raises(
        ValueError, match=rf"gives token id {number}, but its vocabulary has the ids 0 \.\.\. 3: correct"
    ):
        tokenize(text, tokenizer, tmp_path / "tokens")
    assert sorted(snapshot(tmp_path)) == ["text.txt"]


def test_a_limit_of_tokens_and_one_of_characters(tokenizer, tmp_path, monkeypatch):
    """What was encoded is read again to identify it, with the same limit."""
    read = tokens.read_documents

    def documents(sources, field, max_characters=10):
        return read(sources, field, max_characters=max_characters)

    monkeypatch.setattr(tokens, "read_documents", documents)
    (tmp_path / "text.txt").write_text("cat dog " * 5)
    for _ in range(2):
        made = tokenize(tmp_path / "text.txt", tokenizer, tmp_path / "tokens", max_tokens=4, max_characters=100)
        assert made.tokens.tolist() == [2, 3] * 5


@pytest.mark.parametrize(("content", "held_out"), [("--", 0), ("--<|endoftext|>a cat", 1), ("-<|endoftext|>-", 1)])
def test_a_text_without_a_token_leaves_nothing(text, tokenizer, tmp_path, content, held_out):
    tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("-")
    text.write_text(content)
    for _ in range(2):
        with pytest.raises(ValueError, match="the tokenizer gives no token for this text"):
            tokenize(text, tokenizer, tmp_path / "tokens", held_out=held_out)
        assert sorted(snapshot(tmp_path)) == ["text.txt"]


def test_a_link_to_nothing_is_refused_before_the_work(text, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "tokens").symlink_to(tmp_path / "nothing")
    monkeypatch.setattr(tokens, "read_documents", None)
    with pytest.raises(FileExistsError, match=r"tokens is a link to nothing: delete it, or name another file"):
        tokenize(text, tokenizer, tmp_path / "tokens")
    assert (tmp_path / "tokens").is_symlink()


def test_the_home_folder(text, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert tokenize(text, tokenizer, "~/tokens").path == tmp_path / "tokens"
    assert open_tokens("~/tokens", tokenizer).tokens.tolist() == [1, 2, 1, 3]
    with pytest.raises(FileNotFoundError, match=r"home folder in ~nobody-here/tokens is not known: write the whole"):
        tokenize(text, tokenizer, "~nobody-here/tokens")
    assert sorted(snapshot(tmp_path)) == ["text.txt", "tokens", "tokens.json"]
