"""Bulk encoding: the reference's ids whatever the faster library does, and one line that says when it is not used."""

import random
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import bulk_encode as module
from data.bulk_encode import BulkEncodeError, BulkEncoder, Gigatoken, Unsupported
from data.tokenizer import TokenizerConfig, TokenizerError, _partings, load_tokenizer, train

AWKWARD = [
    "\u2581",
    "a\u2581b",
    " \u2581 ",
    "\u2585",
    "\0",
    "a\0b",
    "\r\n",
    "",
    " ",
    "      ",
    "<s>",
    "x</s>y",
    "<unk>",
]
AWKWARD += [
    "<0x41>",
    "\uffff",
    "\U0010ffff",
    "e\u0301",
    "🧑‍🚀",
    "中文字符。",
    "\t\n\n  x",
    "007",
    "a\u00a0b\u3000c\u2028d\x85",
]
TEXTS = st.lists(st.sampled_from(AWKWARD) | st.text(max_size=8) | st.text("ab \n", max_size=20), max_size=12).map(
    "".join
)

gigatoken = pytest.importorskip("gigatoken", reason="the extra 'fast' is not installed")


@pytest.fixture(scope="module")
def bpe(texts, tmp_path_factory):
    cfg = TokenizerConfig(vocab_size=1000, train_bytes=2**18)
    return train([(texts, 2**18)], tmp_path_factory.mktemp("bpe") / "t", cfg)


def same(tokenizer, batch):
    for text, found in zip(batch, tokenizer.encode_batch(batch), strict=True):
        assert found.dtype == np.int32
        assert found.tolist() == tokenizer.encode(text).tolist(), text[:100]


# -- SentencePiece by gigatoken ----------------------------------------------------------------------------------------


def test_real_files(bpe, texts):
    same(bpe, texts)
    assert bpe.bulk.startswith("gigatoken ")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(TEXTS, max_size=6))
def test_any_text(bpe, batch):
    same(bpe, batch)


def test_awkward_and_long_texts(bpe):
    same(bpe, [*AWKWARD, "".join(AWKWARD)])
    long = "x = 1  # \u2581 one\n" * 100_000
    assert len(long) > 2**20
    same(bpe, ["", long, "\u2581" * 1000, "short"])
    same(bpe, ["".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)])


@pytest.mark.slow
def test_very_long_text(bpe):
    same(bpe, ["def f(x):\n    return x\n" * 450_000])


@pytest.mark.parametrize("alphabet", ["ab", "a ", "aab\n", "aa中"])
def test_texts_that_repeat_themselves(alphabet, tmp_path):
    """Here pieces overlap themselves ("aba" in "ababa"), where the two libraries' ranks mean different things."""
    generator = random.Random(alphabet)
    texts = [
        "".join(generator.choices(alphabet, k=300)) + generator.choice(["ab", "aba", "aab"]) * 9 for _ in range(300)
    ]
    tokenizer = train([(texts, 2**20)], tmp_path / "t", TokenizerConfig(vocab_size=330, train_bytes=2**20))
    runs = [word * n for word in ("a", "ab", "aba", "aab") for n in range(60)]
    same(tokenizer, texts + runs + ["".join(generator.choices(alphabet, k=40)) for _ in range(1000)])
    assert tokenizer.bulk.startswith("gigatoken ")


def test_partings_put_the_leftmost_of_two_rivals_first():
    normal = {"a", "b", "ab", "ba", "aba", "bab", "abab", "baba", "ababa"}
    cuts = [len(left) for left, _ in _partings("ababa", normal)]
    assert sorted(cuts) == [1, 2, 3, 4]
    assert cuts.index(2) < cuts.index(3)  # "ab|aba" and "aba|ba" rival for "aba" in "ab aba ba"
    assert cuts.index(4) < cuts.index(1)  # "abab|a" and "a|baba" for "a" in "abab a baba"
    assert _partings("ab", {"a"}) == []


def test_control_pieces_are_never_merged(tmp_path):
    """ "</" and "s>" are pieces here, and what they make together is the name of the end of a document."""
    cfg = TokenizerConfig(vocab_size=280, train_bytes=2**16)
    tokenizer = train([(["</ s> </ s> <s <unk > <0x 41>\n" * 300], 2**16)], tmp_path / "t", cfg)
    same(tokenizer, ["</s>", "a</s>b", "<s><unk>", "<0x41>"])
    assert tokenizer.bulk.startswith("gigatoken ")


def test_lone_surrogate_is_the_references_error(bpe):
    with pytest.raises(TokenizerError, match=r"character 1 of the text is the lone surrogate U\+D800"):
        bpe.encode_batch(["fine", "a\ud800"])
    same(bpe, ["and on it goes"])


def test_library_made_anew_gives_the_same(bpe, texts, monkeypatch):
    monkeypatch.setattr(module, "_RENEW_BYTES", 1000)
    for text in texts[:20]:
        same(bpe, [text])


def test_other_model_types_say_why(texts, tmp_path, caplog):
    cfg = TokenizerConfig(model_type="char", vocab_size=300, train_bytes=2**16)
    tokenizer = train([(texts, 2**16)], tmp_path / "t", cfg)
    with caplog.at_level("INFO"):
        same(tokenizer, AWKWARD)
        same(tokenizer, AWKWARD)
    assert [record.getMessage() for record in caplog.records] == [
        "bulk encoding by the reference tokenizer, not by gigatoken: it has no SentencePiece char models"
    ]
    assert tokenizer.bulk == "the reference: it has no SentencePiece char models"


@pytest.mark.parametrize("model_type", ["unigram", "char"])
def test_reference_encodes_many_texts_as_it_encodes_each(texts, tmp_path, model_type):
    n_pieces = {"unigram": 400, "char": 300}[model_type]
    cfg = TokenizerConfig(model_type=model_type, vocab_size=n_pieces, train_bytes=2**16)
    tokenizer = train([(texts, 2**16)], tmp_path / "t", cfg)
    same(tokenizer, [*AWKWARD, "".join(AWKWARD), *texts[:5], "x y\u2581\n" * 300_000])
    same(tokenizer, [])
    with pytest.raises(TokenizerError, match=r"character 1 of the text is the lone surrogate U\+D800"):
        tokenizer.encode_batch(["fine", "a\ud800"])


def test_library_that_is_not_there(bpe, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    tokenizer = load_tokenizer(bpe.folder)
    with caplog.at_level("INFO"):
        same(tokenizer, AWKWARD)
    assert len(caplog.records) == 1
    assert "cannot be imported" in caplog.text
    assert "pip install 'longhaul[fast]'" in caplog.text


def test_reference_on_request(bpe, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    tokenizer = load_tokenizer(bpe.folder, bulk="reference")
    with caplog.at_level("INFO"):
        same(tokenizer, AWKWARD)
    assert not caplog.records


def test_what_the_library_does_not_know():
    with pytest.raises(Unsupported, match="it does not support this tokenizer"):
        Gigatoken("{}")


# -- the proof, with libraries that fail in a known place ---------------------------------------------------------------


def reference(text):
    return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32)


def references(texts):
    return [reference(text) for text in texts]


def wrong_on(word):
    def encode(texts):
        return [reference(text.replace(word, "?")) for text in texts]

    return BulkEncoder(references, lambda: encode, "auto")


def test_difference_in_the_first_documents_is_a_fall_back_with_one_line(caplog):
    encoder = wrong_on("bad")
    batches = [["good", "also good"], ["fine", "a bad one", "bad"], ["bad"]]
    found = [ids.tolist() for batch in batches for ids in encoder.encode(batch)]
    assert found == [reference(text).tolist() for batch in batches for text in batch]
    assert len(caplog.records) == 1
    assert (
        "ids differ from token 2 on, [63, 32, 111, 110] instead of [98, 97, 100, 32], in a text that begins 'a bad"
        in caplog.text
    )
    assert encoder.describe().startswith("the reference: ids differ")


def test_one_more_token_is_a_difference(caplog):
    encoder = BulkEncoder(references, lambda: lambda texts: [np.append(reference(text), 7) for text in texts], "auto")
    assert encoder.encode(["ab"])[0].tolist() == [97, 98]
    assert "ids differ from token 2 on, [7] instead of []" in caplog.text


def test_difference_after_the_proof_is_an_error(caplog):
    """Ids that were given out before may be wrong by then, so the reference cannot simply take over."""
    encoder = wrong_on("bad")
    encoder.encode(["x" * module._PROOF_CHARS])
    encoder.encode(["good"] * 5)
    with pytest.raises(
        BulkEncodeError, match="after 131072 equal characters: ids differ from token 0 .*bulk=reference"
    ):
        encoder.encode(["bad"])
    assert not caplog.records


def test_every_document_and_every_place_has_its_turn():
    """A single wrong word in 8 documents of 16 kB is found within some hundreds of batches."""
    encoder = wrong_on("bad")
    encoder.encode(["x" * module._PROOF_CHARS])
    documents = ["x" * 16_000 for _ in range(8)]
    documents[5] = "x" * 9_000 + "bad" + "x" * 7_000

    def many():
        for _ in range(500):
            encoder.encode(documents)

    with pytest.raises(BulkEncodeError):
        many()


def test_library_is_asked_for_nothing_before_it_is_needed():
    made = []
    encoder = BulkEncoder(references, lambda: made.append(1) or references, "auto")
    assert encoder.encode([]) == []
    encoder.encode(["a"])
    encoder.encode(["b"])
    assert made == [1]
