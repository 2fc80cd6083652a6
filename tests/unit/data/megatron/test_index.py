"""Texts become documents of a dataset, in order, whoever tokenises them; rows without a text are counted, and an error leaves no file."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemotune.data.megatron import index as index_module
from nemotune.data.megatron.encoders import DocumentEncoder, ModelEncoder, TiktokenEncoder
from nemotune.data.megatron.index import index_texts
from nemotune.data.megatron.indexed import IndexedDataset
from nemotune.data.readers import count_rows_of
from nemotune.errors import ConflictError, DataError, RecipeError, UnsupportedError
from nemotune.models import load_tokenizer

TEXTS = ["Once upon a time", "  there were\n\nthree kings </s>", "and <|im_end|> a horse"]


@pytest.fixture(scope="module")
def model_tokenizer():
    return load_tokenizer("nemotron-tiny")


@pytest.fixture
def encode(model_tokenizer):
    return DocumentEncoder(ModelEncoder(model_tokenizer), bos=False, eos=True)


def documents(prefix) -> list[list[int]]:
    return [tokens.tolist() for tokens in IndexedDataset(prefix)]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "txt", "parquet", "csv"])
def test_rows_of_every_kind_of_file_are_documents(tmp_path, encode, model_tokenizer, suffix):
    texts, path = ["One.", "Two of them."], tmp_path / f"rows.{suffix}"
    rows = [{"text": text} for text in texts]
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        spelled = {
            "jsonl": "\n".join(map(json.dumps, rows)),
            "json": json.dumps(rows),
            "txt": "\n\n".join(texts),
            "csv": "text\n" + "\n".join(texts),
        }
        path.write_text(spelled[suffix])
    assert count_rows_of(path) == 2
    found = index_texts([str(path), str(path)], tmp_path / "out", encode, text_key=None)
    assert [model_tokenizer.decode(tokens[:-1]) for tokens in documents(tmp_path / "out")] == texts * 2
    assert (found.documents, found.tokens) == (4, IndexedDataset(tmp_path / "out").num_tokens) and found.skipped == {}


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (True, False), (False, False)])
def test_a_document_is_the_text_as_it_stands_between_what_was_asked_for(tmp_path, write_rows, model_tokenizer, bos, eos):
    path = write_rows([{"body": text} for text in TEXTS])
    index_texts([path], tmp_path / "out", DocumentEncoder(ModelEncoder(model_tokenizer), bos=bos, eos=eos), text_key="body")
    for text, tokens in zip(TEXTS, documents(tmp_path / "out"), strict=True):
        inner = tokens[bos : len(tokens) - eos]
        assert model_tokenizer.decode(inner) == text
        assert not {model_tokenizer.eos_token_id, *model_tokenizer.all_special_ids} & set(inner)  # what it spells is letters
        assert tokens[:bos] == [model_tokenizer.bos_token_id] * bos and tokens[len(tokens) - eos :] == [model_tokenizer.eos_token_id] * eos


@pytest.mark.slow
def test_processes_write_what_one_writes(tmp_path, write_rows, encode, monkeypatch):
    monkeypatch.setattr(index_module, "CHUNK_ROWS", 8)
    path = write_rows([{"text": f"{number} {TEXTS[number % 3]}"} for number in range(100)])
    for workers in (1, 2):
        index_texts([path], tmp_path / str(workers), encode, text_key=None, workers=workers)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"1.{suffix}").read_bytes() == (tmp_path / f"2.{suffix}").read_bytes()


def test_rows_without_a_text_are_told_by_number(tmp_path, write_rows, encode):
    path = write_rows([{"text": "a"}, {"title": "b"}, {"text": "  "}, {"text": 3}, {"content": "c"}])
    found = index_texts([path], tmp_path / "out", encode, text_key=None)
    assert found.documents == 2
    assert found.told() == ["2 rows left out: no text: row 1, 3", "1 rows left out: empty text: row 2"]
    with pytest.raises(DataError, match=r"no row has a text; name its key with --text-key\n5 rows left out: no text: row 0, 1, 2, 3, 4"):
        index_texts([path], tmp_path / "none", encode, text_key="body")
    assert not list(tmp_path.glob("*none*"))


def test_an_error_in_the_middle_leaves_what_was_there(tmp_path, write_rows, encode):
    index_texts([write_rows([{"text": "a"}])], tmp_path / "out", encode, text_key=None)
    before = documents(tmp_path / "out")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "b"}\n{"text": \n')
    with pytest.raises(ConflictError, match="already exists"):
        index_texts([str(broken)], tmp_path / "out", encode, text_key=None)
    with pytest.raises(DataError, match=r"broken\.jsonl, line 2"):
        index_texts([str(broken)], tmp_path / "out", encode, text_key=None, overwrite=True)
    assert documents(tmp_path / "out") == before and not list(tmp_path.glob(".*"))


def test_a_token_that_the_tokenizer_lacks_cannot_be_asked_for(bare_tokenizer):
    encoder = ModelEncoder(bare_tokenizer)
    encoder.bos = None
    with pytest.raises(RecipeError, match="--bos: the tokenizer has no bos token; pass --no-bos"):
        DocumentEncoder(encoder, bos=True, eos=False)


def test_the_tokenizer_is_left_as_it_was(bare_tokenizer):
    before = bare_tokenizer("</s>a").input_ids
    ModelEncoder(bare_tokenizer).encode("</s>a")
    assert bare_tokenizer("</s>a").input_ids == before


def test_a_tokenizers_own_length_cuts_and_pads_nothing(bare_tokenizer):
    whole = ModelEncoder(bare_tokenizer).encode("A horse and a king")
    bare_tokenizer.backend_tokenizer.enable_truncation(2)
    bare_tokenizer.backend_tokenizer.enable_padding(length=64)
    try:
        assert ModelEncoder(bare_tokenizer).encode("A horse and a king") == whole
    finally:
        bare_tokenizer.backend_tokenizer.no_truncation()
        bare_tokenizer.backend_tokenizer.no_padding()


def test_tiktoken_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    with pytest.raises(
        UnsupportedError, match=r"--tokenizer: tiktoken:gpt2 needs the library tiktoken, .*pip install 'nemotune\[tiktoken\]'"
    ):
        TiktokenEncoder("gpt2")


TOY = """
def toy():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ki": 256, b"ng": 257, b"king": 258}
    return {"name": "toy", "pat_str": r"\\\\w+|\\\\W+", "mergeable_ranks": ranks, "special_tokens": {"<|endoftext|>": 259}}
ENCODING_CONSTRUCTORS = {"toy": toy}
"""


def test_tiktoken_tokenises_as_it_does_alone(tmp_path, write_rows, monkeypatch):
    """With an encoding of the test's, as tiktoken's plugins bring them: its own are downloaded."""
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    (tmp_path / "tiktoken_ext").mkdir()
    (tmp_path / "tiktoken_ext" / "toy.py").write_text(TOY.replace("\\\\", "\\"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", None)
    texts = ["three kings", "<|endoftext|> is text"]
    encode = DocumentEncoder(TiktokenEncoder("toy"), bos=False, eos=True)
    index_texts([write_rows([{"text": text} for text in texts])], tmp_path / "out", encode, text_key=None)
    expected = [[*tiktoken.get_encoding("toy").encode_ordinary(text), 259] for text in texts]
    assert documents(tmp_path / "out") == expected and expected[0].count(258) == 1 and expected[1].count(259) == 1
    with pytest.raises(RecipeError, match="tiktoken has no encoding 'toi', expected .*toy.*Did you mean 'toy'"):
        TiktokenEncoder("toi")
