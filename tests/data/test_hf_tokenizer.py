"""Hugging Face fast tokenizers: the ids are transformers' own, a folder is copied whole, and what cannot be is refused."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.hf_tokenizer import HuggingFaceTokenizer
from data.tokenizer import TokenizerConfig, TokenizerError, load_tokenizer, open_tokenizer
from data.tokenizer_base import CONFIG_FILE

END = "<|endoftext|>"
AWKWARD = [
    END,
    "<s>",
    "[SEP]",
    "[CLS]",
    "<mine>",
    "\u2581",
    "\0",
    "\r\n",
    "\t",
    " ",
    "    ",
    "\n\n",
    "中文字符",
    "🧑‍🚀",
    "é",
    "007",
]
TEXTS = st.lists(st.sampled_from(AWKWARD) | st.text(max_size=8), max_size=12).map("".join)


def save(backend, folder, **tokens):
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def byte_level(texts, tmp_path_factory):
    """As GPT-2 has one, with a token of a user's own that is not special."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([AddedToken("<mine>", normalized=False)])
    return save(backend, tmp_path_factory.mktemp("byte_level") / "t", eos_token=END)


@pytest.fixture(scope="module")
def word_piece(texts, tmp_path_factory):
    """As BERT has one: lower case, a template that adds [CLS] and [SEP], a length to cut at."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", backend.token_to_id("[CLS]")), ("[SEP]", backend.token_to_id("[SEP]"))],
    )
    backend.enable_truncation(16)
    backend.enable_padding(length=16, pad_id=0, pad_token="[PAD]")
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    return save(backend, tmp_path_factory.mktemp("word_piece") / "t", **names)


def copy(folder, to, **changes):
    """A copy of a tokenizer folder with other values in its config; None takes a key out."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / CONFIG_FILE).read_text()) | changes
    (to / CONFIG_FILE).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return to


# -- ids ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_byte_level_loses_nothing(byte_level, text):
    tokenizer = _cached(byte_level)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert tokenizer.unknowns(ids) == 0


def test_ids_are_those_of_transformers(byte_level, texts):
    theirs = AutoTokenizer.from_pretrained(byte_level, split_special_tokens=True)
    ours = load_tokenizer(byte_level)
    for text in texts[:20]:
        expected = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text).tolist() == expected
    assert [ids.tolist() for ids in ours.encode_batch(texts)] == [ours.encode(text).tolist() for text in texts]


def test_sizes_and_special_ids(byte_level):
    tokenizer = load_tokenizer(byte_level)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    theirs = AutoTokenizer.from_pretrained(byte_level)
    assert tokenizer.vocab_size == len(theirs) == 1001
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (theirs.eos_token_id, None, None)


def test_text_that_looks_like_a_special_token_stays_text(byte_level):
    tokenizer = load_tokenizer(byte_level)
    assert len(tokenizer.encode(END)) > 1
    assert tokenizer.decode([*tokenizer.encode(f"a{END}b"), tokenizer.eos_id]) == f"a{END}b"
    mine = tokenizer.encode("a<mine>b")  # an added token that is not special is a word of the vocabulary
    assert 1000 in mine
    assert tokenizer.decode(mine) == "a<mine>b"


def test_word_piece_is_neither_cut_nor_padded_nor_wrapped(word_piece, texts):
    tokenizer = load_tokenizer(word_piece, eos_token="[SEP]")
    assert len(tokenizer.encode("a")) == 1
    assert len(tokenizer.encode(texts[0])) > 100
    assert tokenizer.eos_id not in tokenizer.encode("a [SEP] b")
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (3, 0, 800)


def test_what_word_piece_loses(word_piece):
    tokenizer = load_tokenizer(word_piece, eos_token="[SEP]")
    encoded = [tokenizer.encode(text) for text in ("def", "Def", "🧑", "")]
    assert [tokenizer.decode(ids) for ids in encoded] == ["def", "def", "", ""]
    assert [tokenizer.unknowns(ids) for ids in encoded] == [0, 0, 1, 0]


def test_unknowns_of_a_byte_fallback_are_its_bytes(tmp_path):
    vocab = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}, "a": 258}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.add_special_tokens(["<unk>", "</s>"])
    tokenizer = load_tokenizer(save(backend, tmp_path / "t", eos_token="</s>", unk_token="<unk>"))
    assert tokenizer.unknowns(tokenizer.encode("aéa")) == 2
    assert tokenizer.unknowns([0, 1, 258]) == 1


def test_lone_surrogate_is_refused(byte_level):
    tokenizer = load_tokenizer(byte_level)
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["fine", text])):
        with pytest.raises(TokenizerError, match=r"character 3 of the text is the lone surrogate U\+D800"):
            encode("abc\ud800")


def test_decode_refuses(byte_level):
    with pytest.raises(TokenizerError, match=r"ids from 1001 to 1001; expected ids in range\(1001\)"):
        load_tokenizer(byte_level).decode([1001])


# -- the folder --------------------------------------------------------------------------------------------------------


def test_a_copy_is_the_same_tokenizer_and_transformers_reads_it(word_piece, tmp_path, texts):
    tokenizer = load_tokenizer(word_piece, eos_token="[SEP]")
    tokenizer.save(tmp_path / "copy")
    copied = load_tokenizer(tmp_path / "copy")
    for name in ("fingerprint", "eos_id", "bos_id", "pad_id", "vocab_size"):
        assert getattr(copied, name) == getattr(tokenizer, name)
    assert copied.encode(texts[0]).tolist() == tokenizer.encode(texts[0]).tolist()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert theirs.eos_token == "[SEP]"
    assert theirs.encode(texts[0], add_special_tokens=False, truncation=False) == tokenizer.encode(texts[0]).tolist()
    copied.save(tmp_path / "again")
    for file in (tmp_path / "copy").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_folder_without_a_config(byte_level, tmp_path):
    folder = copy(byte_level, tmp_path / "t")
    (folder / CONFIG_FILE).unlink()
    tokenizer = load_tokenizer(folder, eos_token=END)
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").fingerprint == tokenizer.fingerprint


def test_fingerprint_is_of_the_file_and_of_the_ids_that_the_config_chooses(byte_level, tmp_path):
    before = load_tokenizer(byte_level).fingerprint
    assert load_tokenizer(copy(byte_level, tmp_path / "same", chat_template="x")).fingerprint == before
    assert load_tokenizer(copy(byte_level, tmp_path / "bos", bos_token=END)).fingerprint != before
    assert load_tokenizer(byte_level, eos_token="<mine>").fingerprint != before
    other = copy(byte_level, tmp_path / "file")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    assert load_tokenizer(other).fingerprint != before


@pytest.mark.fault(40)
def test_a_changed_copy_is_refused(byte_level, tmp_path):
    load_tokenizer(byte_level).save(tmp_path / "t")
    changed = (tmp_path / "t" / "tokenizer.json").read_text() + "\n"
    (tmp_path / "t" / "tokenizer.json").write_text(changed)
    with pytest.raises(
        TokenizerError, match=r"t has fingerprint \w{16}, its .* says \w{16}: it was changed or damaged"
    ):
        load_tokenizer(tmp_path / "t")


def test_no_end_of_document(word_piece, byte_level, tmp_path):
    with pytest.raises(
        TokenizerError, match=r"names no token that ends .*eos_token to one of its own, such as '\[PAD\]'"
    ):
        load_tokenizer(copy(word_piece, tmp_path / "t", sep_token=None))
    with pytest.raises(TokenizerError, match=r"eos_token='</s>' is no token of .*such as '<\|endoftext\|>'"):
        load_tokenizer(byte_level, eos_token="</s>")


def test_documents_of_a_bert_end_with_its_separator(word_piece, tmp_path):
    folder = copy(word_piece, tmp_path / "t", mask_token="[MASK]")
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]
    assert (tokenizer.eos_id, ids) == (3, [0, 2, 3, 4])
    assert load_tokenizer(word_piece).mask_id is None


def test_no_end_of_document_and_no_special_tokens(tmp_path):
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    with pytest.raises(TokenizerError, match="set data.tokenizer.eos_token to one of its vocabulary"):
        load_tokenizer(save(backend, tmp_path / "t"))
    assert load_tokenizer(tmp_path / "t", eos_token="b").eos_id == 1


@pytest.mark.fault(52)
def test_remote_code_is_refused(byte_level, tmp_path):
    folder = copy(byte_level, tmp_path / "t", auto_map={"AutoTokenizer": ["theirs.Slow", "theirs.Fast"]})
    with pytest.raises(
        TokenizerError, match=r"demands code of its own for the tokenizer \(auto_map\), which is never run"
    ):
        load_tokenizer(folder)
    folder = copy(byte_level, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": "theirs.Fast"}}))
    with pytest.raises(TokenizerError, match=r"config.json demands code of its own"):
        load_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "theirs.Model"}}))
    assert load_tokenizer(folder).vocab_size == 1001


def test_broken_folders(byte_level, tmp_path):
    folder = copy(byte_level, tmp_path / "t", kind="huggingface")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read as a Hugging Face tokenizer: "):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="tokenizer.json does not exist; only fast tokenizers can be used"):
        load_tokenizer(folder)
    for content in ("{", "[]"):
        (folder / CONFIG_FILE).write_text(content)
        with pytest.raises(TokenizerError, match="tokenizer_config.json is damaged"):
            load_tokenizer(folder)


def test_config_opens_it(byte_level):
    cfg = TokenizerConfig(kind="huggingface", path=str(byte_level), vocab_size=1001)
    assert open_tokenizer(cfg).eos_id == 0
    with pytest.raises(TokenizerError, match="kind=sentencepiece, but .* holds a huggingface tokenizer"):
        open_tokenizer(TokenizerConfig(path=str(byte_level)))


# -- in bulk -----------------------------------------------------------------------------------------------------------


def test_byte_level_is_encoded_by_gigatoken(byte_level, texts):
    pytest.importorskip("gigatoken", reason="the extra 'fast' is not installed")
    tokenizer = load_tokenizer(byte_level)
    awkward = [*AWKWARD, "".join(AWKWARD), "", "x" * 3000, *(f"{' ' * n}x" for n in range(80))]
    unicode = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    for batch in (awkward, texts, [unicode[start : start + 4096] for start in range(0, len(unicode), 4096)]):
        for text, found in zip(batch, tokenizer.encode_batch(batch), strict=True):
            assert found.dtype == np.int32
            assert found.tolist() == tokenizer.encode(text).tolist()
    assert tokenizer.bulk.startswith("gigatoken ")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=st.lists(TEXTS, max_size=6))
def test_bulk_ids_are_the_same_for_any_text(byte_level, batch):
    tokenizer = _cached(byte_level)
    assert [ids.tolist() for ids in tokenizer.encode_batch(batch)] == [tokenizer.encode(t).tolist() for t in batch]


def test_other_tokenizers_are_encoded_by_the_reference(word_piece, byte_level, tmp_path, caplog):
    tokenizer = load_tokenizer(word_piece, eos_token="[SEP]")
    with caplog.at_level("INFO"):
        assert [ids.tolist() for ids in tokenizer.encode_batch(["def x"])] == [tokenizer.encode("def x").tolist()]
        tokenizer.encode_batch(["again"])
    assert len(caplog.records) == 1
    assert 'does not support this tokenizer (Unsupported model type "WordPiece"' in caplog.text
    backend = Backend.from_file(str(byte_level / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[aeiou]+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    odd = load_tokenizer(save(backend, tmp_path / "odd", eos_token=END))
    assert odd.encode_batch(["audio file"])[0].tolist() == odd.encode("audio file").tolist()


_LOADED: dict = {}


def _cached(folder):
    """hypothesis calls a test many times; the folder is loaded once."""
    if folder not in _LOADED:
        _LOADED[folder] = load_tokenizer(folder)
    return _LOADED[folder]
