"""A tokenizer that is given more tokens: old text keeps its ids but where it has one of them."""

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from data.fast_tokenizer import write_tokenizer
from data.tokenizer import TokenizerConfig, TokenizerError, load_tokenizer, open_tokenizer, train

TEXTS = [f"def name_{i}(self, x):\n    return self.name + {i}\n" for i in range(300)]
ADDED = ["<tool>", "</tool>", "two words", "东京"]


@pytest.fixture(scope="module", params=["bpe", "unigram", "huggingface"])
def plain(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "t"
    if request.param == "huggingface":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(TEXTS, trainer)
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)
        return load_tokenizer(folder)
    cfg = TokenizerConfig(vocab_size=290, model_type=request.param, train_bytes=2**16)
    return train([(TEXTS, 2**16)], folder, cfg)


def test_new_tokens_are_the_last_ids_and_found_in_any_text(plain):
    grown, n = plain.grown(ADDED), plain.vocab_size
    assert (grown.vocab_size, grown.eos_id, grown.added_tokens) == (n + 4, plain.eos_id, tuple(ADDED))
    assert grown.fingerprint != plain.fingerprint
    for text in TEXTS[:20]:
        assert grown.encode(text).tolist() == plain.encode(text).tolist()
    text = "say <tool>name</tool> in two words: 东京"
    ids = grown.encode(text).tolist()
    assert [i for i in ids if i >= n] == [n, n + 1, n + 2, n + 3]
    assert grown.decode(ids) == text
    assert [found.tolist() for found in grown.encode_batch([text, "x"])] == [ids, grown.encode("x").tolist()]
    assert grown.bulk.startswith("the reference: ")


def test_a_saved_one_is_the_same_and_grows_again(plain, tmp_path):
    plain.grown(ADDED).save(tmp_path / "grown")
    loaded = load_tokenizer(tmp_path / "grown")
    assert loaded.fingerprint == plain.grown(ADDED).fingerprint
    assert loaded.encode("a <tool>").tolist()[-1] == plain.vocab_size
    again = loaded.grown(["<end>"])
    assert again.added_tokens == (*ADDED, "<end>")
    assert again.encode("<tool><end>").tolist() == [plain.vocab_size, plain.vocab_size + 4]
    with pytest.raises(TokenizerError, match=f"'<tool>' is a token of .* already, id {plain.vocab_size}; leave it out"):
        loaded.grown(["<tool>"])


def test_transformers_gives_the_same_ids(plain, tmp_path):
    grown = plain.grown(ADDED)
    LlamaConfig(vocab_size=grown.vocab_size).save_pretrained(tmp_path)
    exported = write_tokenizer(grown, tmp_path, 64, TEXTS[:5])
    if getattr(plain, "model_type", "") == "unigram":
        assert not exported.fast  # it has no equal there, grown or not
        return
    assert exported.fast, exported.notes
    text = "say <tool>name</tool> in two words: 东京"
    assert AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == grown.encode(text).tolist()
    assert torch.is_tensor(AutoTokenizer.from_pretrained(tmp_path)("<tool>", return_tensors="pt").input_ids)


def test_the_config_opens_it_grown(plain):
    kind = "huggingface" if type(plain).__name__.startswith("Hugging") else "sentencepiece"
    cfg = TokenizerConfig(kind=kind, path=str(plain.folder), add_tokens=["<tool>"])
    assert open_tokenizer(cfg).fingerprint == plain.grown(["<tool>"]).fingerprint


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        ([" a"], "add_tokens has ' a'; expected each token once, without spaces around it"),
        (["a\u2581b"], "add_tokens has 'a\u2581b'"),
        (["<x>", "<x>"], "add_tokens has '<x>'; expected each token once"),
        ([""], "at least 1 character"),
    ],
)
def test_what_is_no_token_is_refused(tokens, match):
    with pytest.raises(ValidationError, match=match):
        TokenizerConfig(path="x", add_tokens=tokens)


def test_a_tokenizer_that_is_trained_learns_its_tokens_itself():
    with pytest.raises(ValidationError, match=r"add_tokens=\['<x>'\] is for an existing tokenizer, path"):
        TokenizerConfig(add_tokens=["<x>"])
