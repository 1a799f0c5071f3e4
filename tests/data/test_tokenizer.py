"""The tokenizer: nothing is lost, training is bounded and repeatable, and a folder is whole or refused."""

import json
import random

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data import tokenizer as module
from data.tokenizer import MODEL_FILE, Tokenizer, TokenizerConfig, TokenizerError, load_tokenizer, open_tokenizer, train
from data.tokenizer_base import CONFIG_FILE, write_folder

SMALL = TokenizerConfig(vocab_size=400, train_bytes=2**16)
VOCAB_SIZES = {"bpe": 1000, "unigram": 1000, "char": 340}

# what SentencePiece treats apart, what it drops in other settings, and what real text is made of
AWKWARD = [
    "\u2581",
    "\u2585",
    "\u2047",
    "\0",
    "\r",
    "\r\n",
    "\t",
    "\n",
    "\n\n\n",
    " ",
    "    ",
    "\x85",
    "\u2028",
    "\ufeff",
]
AWKWARD += ["\u00a0", "\u3000", "\ufffd", "\uffff", "\U0010ffff", "<s>", "</s>", "<unk>", "<pad>", "<0x41>", "<0xE2>"]
AWKWARD += [
    "e\u0301",
    "é",
    "①",
    "ﬁ",
    "İ",
    "中文字符没有空格。",
    "한국어",
    "עברית",
    "🧑‍🚀",
    "def f(x):\n\treturn x\n",
    "007",
    "٣٤",
]
TEXTS = st.lists(st.sampled_from(AWKWARD) | st.text(max_size=8), max_size=12).map("".join)


@pytest.fixture(scope="module", params=VOCAB_SIZES)
def tokenizer(request, texts, tmp_path_factory):
    cfg = TokenizerConfig(model_type=request.param, vocab_size=VOCAB_SIZES[request.param], train_bytes=2**18)
    return train([(texts, 2**18)], tmp_path_factory.mktemp("tokenizers") / request.param, cfg)


def train_one(texts, folder, cfg):
    return train([(texts, cfg.train_bytes)], folder, cfg)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
@example("".join(AWKWARD))
@example(" ".join(reversed(AWKWARD)))
@example("  lead and trail  ")
@example("")
def test_decode_undoes_encode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text


CHINESE = "床前明月光、疑是地上霜。举头望明月、低头思故乡。"  # some of it has pieces of its own, some does not
ALPHABET = [*CHINESE, *"静夜思", "\t", "\n", " ", "  ", "    ", "\u2581", "\u3000", "def ", "7", "🧑"]


@pytest.fixture(scope="module", params={"bpe": 300, "unigram": 300, "char": 280}.items(), ids=lambda item: item[0])
def chinese(request, tmp_path_factory):
    """Trained on Chinese with tabs, newlines and runs of spaces, so that all these are pieces."""
    model_type, vocab_size = request.param
    generator = random.Random(1)
    line = [*CHINESE * 2, "\t", "\n", " ", "    ", "def f(x):\n\t"]
    text = "".join(generator.choice(line) for _ in range(20_000))
    cfg = SMALL.model_copy(update={"model_type": model_type, "vocab_size": vocab_size})
    return train_one([text], tmp_path_factory.mktemp("chinese") / model_type, cfg)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(st.sampled_from(ALPHABET), max_size=60).map("".join))
@example(f"\t{CHINESE}\n\n    {CHINESE}  \u2581 \n")
def test_decode_undoes_encode_where_the_pieces_are_chinese(chinese, text):
    assert chinese.decode(chinese.encode(text)) == text


def test_chinese_has_pieces(chinese):
    assert chinese.unknowns(chinese.encode("明月\t光\n  ")) == 0
    assert chinese.unknowns(chinese.encode("静")) == 3


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_control_ids_never_come_from_text(tokenizer, text):
    control = {tokenizer.bos_id, tokenizer.eos_id, 0}  # 0 is the unknown piece, which would be a loss
    assert not control & set(tokenizer.encode(text).tolist())


def test_every_character_of_unicode_comes_back(tokenizer):
    """All 1,112,064 scalar values, in stretches that are longer than one call to SentencePiece takes."""
    text = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    assert len(text) > module._ENCODE_CHARS
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_real_files_come_back_and_compress(tokenizer, texts):
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    n_bytes = sum(len(text.encode()) for text in texts)
    least = {"bpe": 2.5, "unigram": 2.5, "char": 0.99}[tokenizer.model_type]  # bytes give 1; 1000 pieces gave 2.7 here
    assert n_bytes / sum(map(len, encoded)) > least


def test_indentation_and_ends_of_lines_are_cheap(tokenizer):
    if tokenizer.model_type == "char":
        assert (
            len(tokenizer.encode("    中\n")) == 4 + 3 + 1
        )  # what it is for: a character is a token, or its bytes are
        return
    assert len(tokenizer.encode("        ")) <= 2
    pieces = tokenizer._processor
    assert any("\n" in pieces.id_to_piece(i) and len(pieces.id_to_piece(i)) > 1 for i in range(tokenizer.vocab_size))


def test_digits_are_tokens_of_their_own_when_asked(texts, tmp_path):
    numbers = [f"{text}\n{'2024 ' * 500}" for text in texts[:4]]
    split = train_one(numbers, tmp_path / "split", SMALL)
    whole = train_one(numbers, tmp_path / "whole", SMALL.model_copy(update={"split_digits": False}))
    assert len(split.encode("2024")) == 4
    assert len(whole.encode("2024")) < 4


def test_control_tokens(tokenizer):
    assert tokenizer.vocab_size == VOCAB_SIZES[tokenizer.model_type]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, None)
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("a b"), tokenizer.eos_id]) == "a b"


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(TokenizerError, match=r"character 3 of the text is the lone surrogate U\+D800"):
        tokenizer.encode("abc\ud800")
    with pytest.raises(TokenizerError, match=r"character 2 of the text is the lone surrogate U\+DFFF"):
        tokenizer.encode("a\u2581\udfff")  # counted over the whole text, not within the part after U+2581


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ([5000], r"ids from 5000 to 5000; expected ids in range\((1000|340)\)"),
        (np.array([-1, 5]), "ids from -1 to 5"),
        ([0.5], "ids are float64"),
        ([[1, 2]], r"shape \(1, 2\)"),
    ],
)
def test_decode_refuses(tokenizer, ids, match):
    with pytest.raises(TokenizerError, match=match):
        tokenizer.decode(ids)


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", VOCAB_SIZES)
def test_training_gives_the_same_bytes_twice(texts, tmp_path, model_type):
    cfg = SMALL.model_copy(update={"model_type": model_type, "vocab_size": 340 if model_type == "char" else 400})
    for name in ("a", "b"):
        train_one(iter(texts), tmp_path / name, cfg)
    for file in (MODEL_FILE, CONFIG_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_sample_is_bounded_and_even():
    """500 documents, from each of which about one part in five is drawn: Python's own random would do no better."""
    documents = [f"{number:03d} " * 5000 for number in range(500)]  # 20 kB each
    limit = 2_000_000
    sample = module._draw(documents, limit)
    assert limit - 8192 * 4 < sum(len(stretch.encode()) for stretch in sample) <= limit
    drawn = [sum(len(stretch) for stretch in sample if stretch[:4] == f"{number:03d} ") for number in range(500)]
    halves = sum(drawn[:250]), sum(drawn[250:])
    assert abs(halves[0] - halves[1]) < 0.2 * limit / 2
    order = [stretch[:3] for stretch in sample]
    assert order == sorted(order)


def test_sample_takes_everything_where_it_fits():
    documents = ["a\n" * 9000, "", "b" * 20000, "中" * 3]
    assert "".join(module._draw(documents, 2**20)) == "".join(documents)


def test_stretches_end_at_newlines_and_lose_nothing():
    generator = random.Random(1)
    text = "".join(generator.choice(["word ", "x", "\n"]) for _ in range(20_000)) + "y" * 30_000
    stretches = list(module._stretches(text))
    assert "".join(stretches) == text
    assert max(map(len, stretches)) <= 8192
    assert stretches[0].endswith("\n")


def test_text_with_reserved_characters_is_learned_from(tmp_path):
    """SentencePiece drops a whole training sentence with U+2585; the words beside it must be learned all the same."""
    tokenizer = train_one(["zyxwv \u2585 zyxwv\n" * 400], tmp_path / "t", SMALL.model_copy(update={"vocab_size": 270}))
    assert len(tokenizer.encode("zyxwv")) <= 2


@pytest.mark.parametrize(
    ("texts", "change", "match"),
    [
        ([], {}, "no text to train a tokenizer on"),
        (["", ""], {}, "no text to train a tokenizer on"),
        (["abc abd"], {"vocab_size": 5000}, "vocab_size=5000 is more than this text allows; use at most 2[67]"),
        (["".join(map(chr, range(0x4E00, 0x5E00)))], {}, "vocab_size=400 is too small .*use more than 43"),
    ],
)
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_refuses(tmp_path, texts, change, match, model_type):
    with pytest.raises(TokenizerError, match=match):
        train_one(texts, tmp_path / "t", SMALL.model_copy(update={"model_type": model_type, **change}))
    assert list(tmp_path.iterdir()) == []


def test_training_never_overwrites(tmp_path):
    (tmp_path / "t").mkdir()
    with pytest.raises(TokenizerError, match="t exists; a tokenizer is never overwritten"):
        train_one(["abc"], tmp_path / "t", SMALL)


def test_char_refuses_more_pieces_than_there_are_characters(tmp_path):
    """And the number it says is one that it takes."""
    cfg = SMALL.model_copy(update={"model_type": "char"})
    with pytest.raises(TokenizerError, match="vocab_size=400 is more than this text allows; use at most 263, or more"):
        train_one(["abc\n" * 20], tmp_path / "t", cfg)
    tokenizer = train_one(["abc\n" * 20], tmp_path / "t", cfg.model_copy(update={"vocab_size": 263}))
    assert len(tokenizer.encode("abcabc\nd")) == 8


def test_char_takes_the_most_frequent_characters(tmp_path):
    cfg = SMALL.model_copy(update={"model_type": "char", "vocab_size": 261})
    tokenizer = train_one(["aaab" * 20 + "c"], tmp_path / "t", cfg)
    assert [tokenizer.unknowns(tokenizer.encode(text)) for text in "abc"] == [0, 0, 1]


def test_streams_have_shares_of_their_own(tmp_path):
    """A hundredth of the text and half of the sample: its words are learned as if there were as much of it."""
    cfg = SMALL.model_copy(update={"train_bytes": 2**17, "vocab_size": 300})
    large, little = ["lorem ipsum\n" * 100_000], ["中文文本\n" * 5_000]
    even = train([(large, 2**16), (little, 2**16)], tmp_path / "even", cfg)
    assert json.loads((tmp_path / "even" / CONFIG_FILE).read_text())["training"]["sampled_bytes"] > 2**17 - 2 * 32768
    assert len(even.encode("中文文本\n")) <= 2
    starved = train([(large, 2**17 - 1), (["中"], 1)], tmp_path / "starved", cfg.model_copy(update={"vocab_size": 270}))
    assert len(starved.encode("中文文本\n")) == 13


def test_shares_add_up(tmp_path):
    with pytest.raises(TokenizerError, match="shares add up to 10 bytes, train_bytes is 65536; make them equal"):
        train([(["abc"], 4), (["abc"], 6)], tmp_path / "t", SMALL)


# -- unknowns ----------------------------------------------------------------------------------------------------------


def test_unknowns_are_the_bytes_of_what_the_vocabulary_lacks(tokenizer):
    assert tokenizer.unknowns(tokenizer.encode("def f(x):")) == 0
    assert tokenizer.unknowns(tokenizer.encode("x🧑y")) == 4
    assert tokenizer.unknowns(tokenizer.encode("\u2581")) == 3
    assert tokenizer.unknowns([0, tokenizer.eos_id]) == 1
    assert tokenizer.unknowns([]) == 0


@pytest.mark.parametrize(
    "values",
    [
        {"vocab_size": 259},
        {"vocab_size": True},
        {"vocab_size": 1000.0},
        {"train_bytes": 1000},
        {"character_coverage": float("nan")},
        {"character_coverage": 0},
        {"model_type": "word"},
        {"kind": "other"},
        {"unknown": 1},
        {"bulk": "fast"},
    ],
)
def test_config_refuses(values):
    with pytest.raises(ValidationError):
        TokenizerConfig(**values)


def test_config_says_what_a_kind_needs():
    with pytest.raises(ValidationError, match="kind huggingface needs path"):
        TokenizerConfig(kind="huggingface")
    with pytest.raises(ValidationError, match="eos_token='</s>' is for kind huggingface"):
        TokenizerConfig(eos_token="</s>")


# -- the folder --------------------------------------------------------------------------------------------------------


def test_load_and_save(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "copy")
    copy = Tokenizer.load(tmp_path / "copy")
    assert (
        copy.fingerprint
        == tokenizer.fingerprint
        == xxhash.xxh3_64_hexdigest((tmp_path / "copy" / MODEL_FILE).read_bytes())
    )
    assert copy.encode("def f(x):").tolist() == tokenizer.encode("def f(x):").tolist()
    config = json.loads((tmp_path / "copy" / CONFIG_FILE).read_text())
    assert (config["kind"], config["vocab_size"]) == ("sentencepiece", tokenizer.vocab_size)
    assert config["training"]["sampled_bytes"] <= config["training"]["train_bytes"] == 2**18


@pytest.mark.parametrize("file", [MODEL_FILE, CONFIG_FILE])
def test_load_refuses_a_missing_file(tokenizer, tmp_path, file):
    tokenizer.save(tmp_path / "t")
    (tmp_path / "t" / file).unlink()
    with pytest.raises(TokenizerError, match=f"{file} does not exist; a tokenizer folder holds"):
        Tokenizer.load(tmp_path / "t")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"kind": "sentencepiece"}', r"is damaged \(KeyError\('fingerprint'\)\)"),
        ('{"kind": "sentencepiece", "fingerprint": "", "vocab_size": 1}', r"is damaged \(KeyError\('training'\)\)"),
        ('{"kind": "hf"}', "kind 'hf'; 'sentencepiece' and 'huggingface' can be loaded"),
        (
            '{"kind": "sentencepiece", "fingerprint": "00", "vocab_size": 1, "training": {"model_type": "bpe"}}',
            "says 00: it was changed or damaged",
        ),
    ],
)
def test_load_refuses_a_broken_config(tokenizer, tmp_path, content, match):
    tokenizer.save(tmp_path / "t")
    (tmp_path / "t" / CONFIG_FILE).write_text(content)
    with pytest.raises(TokenizerError, match=match):
        Tokenizer.load(tmp_path / "t")


def test_load_refuses_another_vocabulary(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    config = json.loads((tmp_path / "t" / CONFIG_FILE).read_text())
    (tmp_path / "t" / CONFIG_FILE).write_text(json.dumps(config | {"vocab_size": 999}))
    with pytest.raises(TokenizerError, match=r"has \d+ pieces, tokenizer_config.json says 999"):
        Tokenizer.load(tmp_path / "t")


def test_load_refuses_a_changed_model(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    payload = bytearray((tmp_path / "t" / MODEL_FILE).read_bytes())
    payload[len(payload) // 2] ^= 1
    (tmp_path / "t" / MODEL_FILE).write_bytes(payload)
    with pytest.raises(TokenizerError, match="it was changed or damaged; restore the folder or train again"):
        Tokenizer.load(tmp_path / "t")


def test_load_of_nothing(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer.model does not exist; .*or a Hugging Face tokenizer's"):
        load_tokenizer(tmp_path / "absent")


def test_eos_token_is_not_for_this_kind(tokenizer):
    with pytest.raises(TokenizerError, match="eos_token='x', but .* holds no Hugging Face tokenizer; leave it out"):
        load_tokenizer(tokenizer.folder, eos_token="x")


def test_open_takes_the_kind_that_was_said(tokenizer):
    cfg = TokenizerConfig(path=str(tokenizer.folder), bulk="reference")
    opened = open_tokenizer(cfg)
    assert opened.fingerprint == tokenizer.fingerprint
    assert opened.bulk == "the reference: data.tokenizer.bulk=reference asks for it"
    with pytest.raises(
        TokenizerError, match="kind=huggingface, but .* holds a sentencepiece tokenizer; say kind: sent"
    ):
        open_tokenizer(cfg.model_copy(update={"kind": "huggingface"}))


def test_folder_left_half_written_is_no_obstacle(tmp_path):
    (tmp_path / "t.tmp").mkdir()
    (tmp_path / "t.tmp" / "rest").write_text("x")
    write_folder(tmp_path / "t", {"a": b"1"})
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["a"]
