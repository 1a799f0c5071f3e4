"""Which tokens are hidden: how many, what becomes of them, whole words whole, and the same whoever reads them."""

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.corpus import Corpus, Reading
from data.dataset import Dataset
from data.loader import Loader, eval_batches
from data.masking import IGNORE, Masker, MaskingConfig, MaskingError, word_edges
from data.mixture import Era, EraStage
from data.tokenizer import TokenizerConfig, load_tokenizer, train

T = 128


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    """SentencePiece with a token for masks."""
    cfg = TokenizerConfig(vocab_size=700, train_bytes=2**18, mask_token="[MASK]")
    return train([(texts, cfg.train_bytes)], tmp_path_factory.mktemp("t") / "tokenizer", cfg)


@pytest.fixture(scope="module")
def word_piece(texts, tmp_path_factory):
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    some = [*texts[:5], "中文 中 文 字 符 没有空格"]
    backend.train_from_iterator(
        some, trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    names = {
        name: f"[{name[:-6].upper()}]" for name in ("unk_token", "cls_token", "sep_token", "pad_token", "mask_token")
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    folder = tmp_path_factory.mktemp("w") / "tokenizer"
    fast.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def byte_level(texts, tmp_path_factory):
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>", "<mask>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    backend.train_from_iterator(texts[:5], trainer)
    folder = tmp_path_factory.mktemp("b") / "tokenizer"
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", mask_token="<mask>")
    fast.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.fixture
def rows_of(texts):
    return lambda tokenizer, n=200: make_rows(texts, tokenizer, n)


def make_rows(texts, tokenizer, n):
    """(n, T + 1) of real text with the ends of documents."""
    ids = [part for text in texts for part in (tokenizer.encode(text[:3000]), [tokenizer.eos_id])]
    stream = np.concatenate(ids).astype(np.int64)
    stream = np.resize(stream, n * T + 1)
    return np.stack([stream[i * T : i * T + T + 1] for i in range(n)])


def hide(masker, rows, seed=0):
    tokens, targets, _ = masker.hide(rows, None, [masker.key(seed * len(rows) + i) for i in range(len(rows))])
    return tokens, targets


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_shares(tokenizer, rows_of, whole_words, seed):
    """15 % of 25,000 tokens: single tokens to within rounding of each row, words to 4 deviations of a mean; 80/10/10."""
    rows = rows_of(tokenizer)
    masker = Masker(MaskingConfig(whole_words=whole_words), tokenizer, seed)
    tokens, targets = hide(masker, rows, seed)
    hidden = targets != IGNORE
    plain = ~np.isin(np.where(hidden, targets, tokens), [tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id])
    per_row = hidden.sum(axis=1) - 0.15 * plain.sum(axis=1)
    assert abs(per_row.mean()) < 4 * per_row.std() / len(rows) ** 0.5 + 0.01
    assert whole_words or abs(per_row).max() < 1
    n = hidden.sum()
    as_mask, kept = (tokens[hidden] == tokenizer.mask_id).mean(), (tokens[hidden] == targets[hidden]).mean()
    for share, expected in ((as_mask, 0.8), (kept, 0.1), (1 - as_mask - kept, 0.1)):
        assert (
            abs(share - expected) < 4 * (expected * (1 - expected) / n) ** 0.5 + 0.001
        )  # one in 700 random ones is itself


def test_what_is_not_hidden_stays_and_targets_are_what_was_there(tokenizer, rows_of):
    rows = rows_of(tokenizer)
    tokens, targets = hide(Masker(MaskingConfig(), tokenizer, 0), rows)
    hidden = targets != IGNORE
    expected = np.concatenate([np.full((len(rows), 1), tokenizer.cls_id), rows[:, : T - 1]], axis=1)
    assert np.array_equal(np.where(hidden, targets, tokens), expected)
    assert not np.isin(targets[hidden], [tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]).any()
    changed = tokens[hidden & (tokens != expected) & (tokens != tokenizer.mask_id)]
    assert not np.isin(changed, [tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]).any()
    assert hidden.any(axis=1).all()


@pytest.mark.parametrize("name", ["tokenizer", "word_piece", "byte_level"])
def test_whole_words_are_hidden_whole(name, rows_of, request):
    tokenizer = request.getfixturevalue(name)
    rows = rows_of(tokenizer, 50)
    tokens, targets = hide(Masker(MaskingConfig(whole_words=True), tokenizer, 0), rows)
    hidden, there = targets != IGNORE, np.where(targets != IGNORE, targets, tokens)
    goes_on, is_open = word_edges(tokenizer)
    inside = (
        goes_on[there[:, 1:]] & is_open[there[:, :-1]] & ~np.isin(there[:, :-1], [tokenizer.cls_id, tokenizer.sep_id])
    )
    assert inside.sum() > 500
    assert np.array_equal(hidden[:, 1:][inside], hidden[:, :-1][inside])
    assert not np.array_equal(hidden[:, 1:][~inside], hidden[:, :-1][~inside])


def words(tokenizer, text):
    """The text's tokens, those of a word joined."""
    ids = tokenizer.encode(text)
    goes_on, is_open = word_edges(tokenizer)
    found = []
    for i, token in enumerate(ids):
        if i and goes_on[token] and is_open[ids[i - 1]]:
            found[-1].append(token)
        else:
            found.append([token])
    return [tokenizer.decode(word).strip() for word in found if tokenizer.decode(word).strip()]


@pytest.mark.parametrize("name", ["tokenizer", "word_piece", "byte_level"])
def test_words_of_every_kind_of_tokenizer(name, request):
    tokenizer = request.getfixturevalue(name)
    found = words(tokenizer, "unquestionably, parse_args x2")
    joined = [word.replace(" ##", "").replace("##", "") for word in found]
    assert joined == ["unquestionably", ",", "parse", "_", "args", "x2"]


def test_a_chinese_character_is_a_word(word_piece, tokenizer):
    assert words(word_piece, "中文字") == ["中", "文", "字"]
    goes_on, is_open = word_edges(tokenizer)  # which writes them as three bytes each
    ids = tokenizer.encode("中文")
    assert [bool(goes_on[b] & is_open[a]) for a, b in zip(ids, ids[1:], strict=False)] == [
        True,
        True,
        False,
        True,
        True,
    ]


def test_documents_move_with_their_tokens(tokenizer, rows_of):
    rows = rows_of(tokenizer, 40)
    documents = np.cumsum(rows[:, :-1] == tokenizer.eos_id, axis=1, dtype=np.int32)
    documents = np.concatenate([np.zeros((40, 1), np.int32), documents[:, :-1]], axis=1)  # an end is of its document
    masker = Masker(MaskingConfig(), tokenizer, 0)
    tokens, _, moved = masker.hide(rows, documents, [str(row) for row in range(40)])
    for row in range(40):
        ends = np.flatnonzero(tokens[row, :-1] == tokenizer.sep_id)
        assert np.array_equal(np.flatnonzero(np.diff(moved[row])), ends)
    assert documents.any()


def test_a_row_without_text_hides_nothing(tokenizer):
    rows = np.full((1, 9), tokenizer.eos_id)
    assert (hide(Masker(MaskingConfig(), tokenizer, 0), rows)[1] == IGNORE).all()


# -- through the loader --------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(make_corpus):
    """Token k of it is k, so 3 documents with ids that the tokenizer has."""
    return Corpus.open(make_corpus([[100, 150, 50], [200, 120]]), "train", Reading(16))


def loader_of(corpus, masker, rank=0, ranks=1, B=2, samples=0):
    era = Era(start=0, stages=(EraStage(start=0, weights={corpus.name: 1.0}),), most={})
    dataset = Dataset({corpus.name: corpus}, [era], 5, [], batch=1)
    return Loader(dataset, global_batch_size=8, micro_batch_size=B, dp_rank=rank, dp_size=ranks, samples=samples,
                  masker=masker)  # fmt: skip


def read(corpus, masker, ranks, steps, B=2, samples=0):
    """sample -> (tokens, targets), by all ranks; and what they say that a step counts."""
    found, counted = {}, [0] * steps
    for rank in range(ranks):
        with loader_of(corpus, masker, rank, ranks, B, samples) as loader:
            assert not loader.fixed_targets
            for step in range(steps):
                batch = next(loader)
                counted[step] += batch.n_targets
                parts = (part.flatten(0, 1).tolist() for part in (batch.tokens, batch.targets))
                found |= {s: row for s, *row in zip(batch.samples.ravel().tolist(), *parts, strict=True)}
    return found, counted


def test_the_same_is_hidden_at_any_world_size_and_after_a_stop(corpus, tokenizer):
    masker = Masker(MaskingConfig(whole_words=True), tokenizer, 5)
    found, counted = read(corpus, masker, 1, 12)
    assert read(corpus, masker, 2, 12) == (found, counted)
    assert read(corpus, masker, 4, 12, B=1) == (found, counted)
    later, _ = read(corpus, masker, 1, 6, samples=48)
    assert later == {sample: row for sample, row in found.items() if sample >= 48}
    assert sum(target != IGNORE for _, targets in found.values() for target in targets) == sum(counted)


def test_each_epoch_and_seed_hides_other_tokens(corpus, tokenizer):
    found, _ = read(corpus, Masker(MaskingConfig(), tokenizer, 5), 1, 12)
    other, _ = read(corpus, Masker(MaskingConfig(), tokenizer, 6), 1, 12)
    assert other != found
    epoch = corpus.n_windows
    rows = {}
    for sample, (tokens, targets) in found.items():
        there = tuple(token if target == IGNORE else target for token, target in zip(tokens, targets, strict=True))
        rows.setdefault(there, []).append((sample, targets))
    again = [pair for pair in rows.values() if len(pair) > 1]
    assert epoch < 96
    assert again
    assert all(first != second for (_, first), (_, second), *_ in again)


def test_held_out_windows_hide_the_same_each_time(corpus, tokenizer):
    def held_out(seed, ranks=1):
        masker = Masker(MaskingConfig(), tokenizer, seed)
        rows = [
            (tokens, targets)
            for rank in range(ranks)
            for both in eval_batches(corpus, 10, 2, rank, ranks, masker)
            for tokens, targets in zip(both[0].tolist(), both[1].tolist(), strict=True)
            if any(target != IGNORE for target in targets)
        ]
        return sorted(rows)

    assert len(held_out(0)) == 10
    assert held_out(0) == held_out(1) == held_out(0, ranks=2)


# -- refusals ------------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_token_for_masks_is_refused(texts, tmp_path, word_piece):
    cfg = TokenizerConfig(vocab_size=500, train_bytes=2**16)
    plain = train([(texts, cfg.train_bytes)], tmp_path / "t", cfg)
    assert plain.mask_id is None
    with pytest.raises(MaskingError, match=r"t lacks a token for masks, .* with data.tokenizer.mask_token=.\[MASK\]"):
        Masker(MaskingConfig(), plain, 0)
    word_piece.save(tmp_path / "w")
    config = tmp_path / "w/tokenizer_config.json"
    config.write_text(config.read_text().replace('"cls_token"', '"other"').replace('"fingerprint"', '"old"').replace(
        '"kind"', '"kinds"'))  # fmt: skip
    with pytest.raises(
        MaskingError, match=r"w lacks a token that begins a text \(.*w/tokenizer_config.json names no cls_token\)"
    ):
        Masker(MaskingConfig(), load_tokenizer(tmp_path / "w"), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": 0.0}, "greater than 0"),
        ({"share": 1.0}, "less than 1"),
        ({"as_mask": 0.9, "as_random": 0.2}, r"as_mask=0.9 and as_random=0.2 are more than 1 together"),
    ],
)
def test_shares_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        MaskingConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_token": "a b"}, "mask_token='a b'; expected three characters or more"),
        ({"mask_token": "[MASK]", "path": "x"}, "is to train a tokenizer with, and path=x has one already"),
    ],
)
def test_a_token_for_masks_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        TokenizerConfig(**change)


def test_a_token_for_masks_is_in_no_text(tokenizer):
    assert tokenizer.mask_id not in tokenizer.encode("a [MASK] b")
    assert tokenizer.decode(tokenizer.encode("a [MASK] b")) == "a [MASK] b"
    assert tokenizer.decode([tokenizer.mask_id]) == ""
    assert load_tokenizer(tokenizer.folder).mask_id == tokenizer.mask_id == 3
