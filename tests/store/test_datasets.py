"""Datasets of token ids, and published rankings of their rows."""

import pickle
import struct

import numpy as np
import published
import pyarrow as pa
import pyarrow.parquet
import pytest
from safetensors.numpy import save_file

import bilinear_jax as bj
from bilinear_jax.commands.main import main
from bilinear_jax.measure.activations import row_codes

ROWS = np.random.default_rng(2).integers(0, 9, (7, 12))


def write(path, column, name="input_ids"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table({name: column, "other": pa.array(range(len(column)))}), path)
    return path


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.list_(pa.int64(), 12), pa.large_list(pa.uint16())])
def test_parquet_files_in_the_order_of_their_names(tmp_path, kind):
    for number, part in enumerate((ROWS[:3], ROWS[3:])):
        write(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", pa.array(part.tolist(), kind))
    np.testing.assert_array_equal(bj.load_token_rows(tmp_path), ROWS)
    cut = bj.load_token_rows(tmp_path / "data" / "train-00000-of-00002.parquet", length=5)
    assert cut.dtype == np.int32 and cut.tolist() == ROWS[:3, :5].tolist()


def test_files_that_are_no_token_rows(tmp_path):
    for column, name, message in (
        (pa.array([[1, 2], [3]]), "input_ids", "rows of different lengths"),
        (pa.array([[1, 2], None]), "input_ids", "rows of different lengths"),
        (pa.array([[1, None]]), "input_ids", "rows of different lengths"),
        (pa.array([[1, -2]]), "input_ids", "values from -2"),
        (pa.array([[1, 2**40]]), "input_ids", "1099511627776"),
        (pa.array([[0.5]]), "input_ids", "not lists of integers"),
        (pa.array(["a"]), "input_ids", "not lists of integers"),
        (pa.array(["a"]), "text", "has no column input_ids, only text, other"),
        (pa.array([], pa.list_(pa.int32())), "input_ids", "has no rows"),
    ):
        with pytest.raises(ValueError, match=message):
            bj.load_token_rows(write(tmp_path / "rows.parquet", column, name))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="cannot be read"):
        bj.load_token_rows(tmp_path / "rows.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no Parquet files"):
        bj.load_token_rows(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="or a hub dataset owner"):
        bj.load_token_rows(tmp_path / "nowhere")
    write(tmp_path / "empty" / "a.parquet", pa.array([[1, 2]]))
    write(tmp_path / "empty" / "b.parquet", pa.array([[1, 2, 3]]))
    with pytest.raises(ValueError, match="rows of 2 and 3 tokens"):
        bj.load_token_rows(tmp_path / "empty")
    with pytest.raises(ValueError, match="length must be at least 1"):
        bj.load_token_rows(write(tmp_path / "rows.parquet", pa.array([[1, 2]])), length=0)


NPY = b"\x93NUMPY\x01\x00"


def header(shape: str, dtype: str = "'<i4'") -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return NPY + struct.pack("<H", len(text)) + text


ARRAYS = {
    "a negative axis": header("(-1, 4)") + bytes(64),
    "two negative axes": header("(-2, -2)") + bytes(64),
    "more than there is": header("(4, 5)") + bytes(64),
    "2^80 numbers": header("(2**40, 2**40)".replace("2**40", str(2**40))) + bytes(64),
    "10^30 numbers": header(f"({10**30}, 1)") + bytes(64),
    "one axis": header("(16,)") + bytes(64),
    "a shape of texts": header("('a', 'b')") + bytes(64),
    "a shape that is none": header("None") + bytes(64),
    "floats": header("(4, 4)", "'<f4'") + bytes(64),
    "truths": header("(8, 8)", "'|b1'") + bytes(64),
    "texts": header("(2, 2)", "'<U4'") + bytes(64),
    "fields": header("(4, 2)", "[('a', '<i4'), ('b', '<i4')]") + bytes(64),
    "a type that is none": header("(4, 4)", "'nonsense'") + bytes(64),
    "a type of brackets": header("(4, 4)", "[" * 99 + "]" * 99) + bytes(64),
    "objects": header("(4, 4)", "'|O'") + pickle.dumps(["a"]),
    "a pickle": pickle.dumps([[1, 2], [3, 4]]),
    "a zip": b"PK\x03\x04" + bytes(64),
    "another version": b"\x93NUMPY\x09\x00" + header("(4, 4)")[8:] + bytes(64),
    "a long header": NPY + struct.pack("<H", 60_000) + b"(" * 60_000,
    "a header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
    "no header": NPY,
    "nothing": b"",
}


@pytest.mark.parametrize("content", ARRAYS.values(), ids=ARRAYS.keys())
def test_npy_files_that_are_no_token_ids(tmp_path, content):
    """One line, whatever is wrong, for token ids that are given and for those beside a model."""
    path = tmp_path / "corpus.npy"
    path.write_bytes(content)
    for read in (bj.load_token_rows, lambda path: bj.load_corpus(path.parent)):
        with pytest.raises(ValueError, match=r"\A.*corpus\.npy (is not an array of numbers|holds) [^\n]*\Z") as raised:
            read(path)
        assert len(str(raised.value)) < 500


def test_only_the_first_rows(tmp_path):
    write(tmp_path / "a.parquet", pa.array(ROWS[:4].tolist()))
    write(tmp_path / "b.parquet", pa.array(["no rows"]), "text")
    np.testing.assert_array_equal(bj.load_token_rows(tmp_path, rows=3), ROWS[:3])
    np.testing.assert_array_equal(bj.load_token_rows(tmp_path, length=2, rows=4), ROWS[:4, :2])
    np.save(tmp_path / "rows.npy", ROWS)
    np.testing.assert_array_equal(bj.load_token_rows(tmp_path / "rows.npy", rows=3), ROWS[:3])
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        bj.load_token_rows(tmp_path, rows=0)


def test_published_rankings_become_what_is_shown(golden, tmp_path):
    """Rows without values or positions, position 0 counted, in Parquet: shown is what is computed from the tokens."""
    tokens = np.random.default_rng(3).integers(3, golden.lm.config.n_vocab, (20, 16))
    write(tmp_path / "dataset" / "rows.parquet", pa.array(tokens.tolist()))
    sae = bj.load_sae(published.SCOPE, "mlp-out", layer=1)
    codes = np.asarray(row_codes(golden.lm, sae, tokens, np.arange(20)).dense())
    best = np.argsort(-codes.max(axis=1), axis=0, kind="stable")  # [rows, features], all of them
    scope = tmp_path / "mine-scope"
    scope.mkdir()
    save_file({"1-mlp-out": np.ascontiguousarray(best)}, scope / "top-activations.safetensors")

    rows = bj.load_token_rows(tmp_path / "dataset", golden.lm.config.n_ctx)
    shown = bj.Visualizer(golden.lm, sae, rows, top=scope, tokenizer=plain_words())
    computed = bj.Visualizer(golden.lm, sae, tokens, tokenizer=plain_words())
    active = np.flatnonzero((codes[:, 1:] > 0).any(axis=(0, 1)))[:6]
    for feature in active.tolist():
        expected = sorted((value for value in codes[:, 1:, feature].max(axis=1) if value > 0), reverse=True)[:3]
        contexts = shown.contexts(feature, k=3)[feature]
        np.testing.assert_allclose([context.value for context in contexts], expected, rtol=1e-5)
        assert shown.text(feature, k=3, logits=0) == computed.text(feature, k=3, logits=0)


def plain_words():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({f"w{number}": number for number in range(4096)}, unk_token="w0"))


def test_the_command_line_reads_token_rows(tmp_path, capsys):
    rows = np.asarray(bj.load_corpus("ts-nano")[:3])
    write(tmp_path / "rows.parquet", pa.array(rows.tolist()))
    words = ["eval", "--saes", "none", "--rows", "2", "--data", str(tmp_path / "rows.parquet"), "--field", "input_ids"]
    assert main(words) == 0
    loss = float(bj.load("ts-nano").loss(rows[:2]))
    assert f"loss: {loss:.4f}" in capsys.readouterr().out
