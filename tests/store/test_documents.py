"""Documents: what is text, and how long it may be."""

import json
import os

import pyarrow as pa
import pyarrow.parquet
import pytest

import bilinear_jax as bj
from bilinear_jax.commands.main import main
from bilinear_jax.store.documents import read_documents, up_to
from bilinear_jax.store.tokens import tokenize
from bilinear_jax.training.recipes import read_recipe


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_the_limit_on_a_document_can_be_raised(tmp_path, ending, monkeypatch):
    """It counts characters, not bytes, and of a text file none of the white space that is removed."""
    documents, path = ["ü" * 100, "b", "c" * 50], tmp_path / f"a.{ending}"
    if ending == "txt":
        monkeypatch.setattr("bilinear_jax.store.documents._CHARACTERS", 7)
        path.write_text(f"\n{' ' * 500}" + "<|endoftext|>".join(documents) + " \n", encoding="utf-8")
    elif ending == "jsonl":
        path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents), "utf-8")
    else:
        pyarrow.parquet.write_table(pa.table({"text": documents}), path)
    longest = 100 + (len('{"text": ""}') if ending == "jsonl" else 0)  # of JSONL, it is the line that counts
    assert list(read_documents(path, max_characters=longest)) == documents
    with pytest.raises(ValueError, match=rf"of {path} has more than {longest - 1} characters.*raise max_characters"):
        list(read_documents(path, max_characters=longest - 1))


def test_the_limit_reaches_every_caller(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one long story")
    tokenizer = bj.load("ts-nano").tokenizer
    with pytest.raises(ValueError, match="more than 13 characters"):
        tokenize(tmp_path / "a.txt", tokenizer, tmp_path / "tokens", max_characters=13)
    assert tokenize(tmp_path / "a.txt", tokenizer, tmp_path / "tokens", max_characters=14).n_documents == 1
    words = ["eval", "--saes", "none", "--data", str(tmp_path / "a.txt"), "--max-characters"]
    assert main([*words, "13"]) == 1
    assert "more than 13 characters" in capsys.readouterr().err
    assert main([*words, "14"]) == 0
    assert read_recipe("lm", "ts", {"data.max_characters": "13"}).data.max_characters == 13
    with pytest.raises(ValueError, match="max_characters must be at least 1"):
        read_recipe("lm", "ts", {"data.max_characters": "0"})


def test_documents_up_to_a_number_of_characters():
    endless = iter(lambda: "four", None)
    assert list(up_to(endless, 9)) == ["four"] * 3
    assert list(up_to(["a", "b"], 9)) == ["a", "b"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1]), r"the field 'text' of .*a\.parquet holds int64, not text: name one of other"),
        (pa.array([["a"]]), r"holds list<\w+: string>, not text"),
        (pa.array([b"a"]), "holds binary, not text"),
        (pa.array([{"text": "a"}]), "holds struct<text: string>, not text"),
        (pa.array([None]), "holds null, not text"),
        (pa.array(["a", None]), r"the field 'text' of row 2 of .*a\.parquet is not text, but NoneType"),
    ],
)
def test_a_parquet_column_that_is_not_text(tmp_path, column, message):
    table = pa.table({"text": column, "other": pa.array(["a"] * len(column)), "number": range(len(column))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        list(read_documents(tmp_path / "a.parquet"))
    pyarrow.parquet.write_table(table.drop(["other"]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message.replace("name one of other", "store text as a column of strings")):
        list(read_documents(tmp_path / "a.parquet"))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_columns_of_text(tmp_path, kind):
    documents = [f"story {number % 300}" for number in range(2500)]
    table = pa.table({"text": pa.array(documents).cast(kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    assert list(read_documents(tmp_path / "a.parquet")) == documents


def test_text_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    for name in ("pipe.txt", "folder.txt"):
        with pytest.raises(ValueError, match=rf"{name} is not a regular file .*: name a \.txt"):
            read_documents(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.txt"):
        read_documents(tmp_path / "none.txt")
