"""Reading tokens a few at a time with their keys and values kept is reading them at once."""

import pytest
import torch
from test_hf import CASES, EVERY_CASE, assert_same, build_hf, gpt2, llama, ours_from, qwen3

from model.cache import KVCache, next_logits
from model.hf import from_hf_config


def model_of(case):
    return ours_from(build_hf(CASES[case]())).eval()


def tokens_of(model, rows=2, length=40):
    return torch.randint(0, model.cfg.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


@EVERY_CASE
@pytest.mark.parametrize("parts", [[40], [1] * 40, [13, 1, 1, 20, 5], [1, 39]], ids=str)
def test_the_same_hidden_states_in_any_parts(case, parts):
    """Equal but for the order of sums: a product with one row takes another kernel than one with forty."""
    model = model_of(case)
    tokens, cache, found = tokens_of(model), KVCache(model.cfg, 2, 40, model.head.weight), []
    with torch.inference_mode():
        for part in torch.split(tokens, parts, dim=1):
            found.append(model.hidden(part, cache=cache))
        assert cache.length == 40
        assert_same(torch.cat(found, dim=1), model.hidden(tokens), "hidden states")


@EVERY_CASE
def test_all_at_once_is_equal_to_the_bit(case):
    model = model_of(case)
    tokens = tokens_of(model)
    with torch.inference_mode():
        assert torch.equal(
            model.hidden(tokens, cache=KVCache(model.cfg, 2, 40, model.head.weight)), model.hidden(tokens)
        )
        assert_same(next_logits(model, tokens), model(tokens)[:, -1], "logits of one row, which take another kernel")


@pytest.mark.parametrize("make", [gpt2, llama, qwen3])
def test_rows_that_stay_are_not_disturbed(make):
    model = ours_from(build_hf(make())).eval()
    tokens, cache = tokens_of(model, rows=4, length=20), KVCache(model.cfg, 4, 20, model.head.weight)
    with torch.inference_mode():
        model.hidden(tokens[:, :10], cache=cache)
        cache.keep([3, 1])
        model.hidden(tokens[[3, 1], 10:15], cache=cache)
        cache.keep([1])
        found = model.hidden(tokens[[1], 15:], cache=cache)
        assert_same(found, model.hidden(tokens[[1]])[:, 15:], "hidden states of the row that stayed")


def test_a_cache_takes_the_dtype_of_its_model():
    model = ours_from(build_hf(llama())).to(torch.bfloat16)
    cache = KVCache(model.cfg, 1, 8, model.head.weight)
    assert {layer.keys.dtype for layer in cache.layers} == {torch.bfloat16}
    assert cache.layers[0].keys.shape == (1, 8, 2, 8)


def test_what_is_longer_than_the_model_takes_is_refused():
    model = ours_from(build_hf(llama()))
    cache = KVCache(model.cfg, 1, 41, model.head.weight)
    model.hidden(tokens_of(model, 1, 40), cache=cache)
    with pytest.raises(ValueError, match=r"got sequences of 41 tokens, but model.seq_len=40 is the longest"):
        model.hidden(tokens_of(model, 1, 1), cache=cache)


def test_queries_after_others_need_a_mask():
    model = ours_from(build_hf(llama()))
    q, k = torch.zeros(1, 3, 4, 8), torch.zeros(1, 5, 2, 8)
    with pytest.raises(AssertionError, match="several queries after others need a mask"):
        model.blocks[0].attn.core(q, k, k)
    assert from_hf_config(llama()).kv_heads == 2
