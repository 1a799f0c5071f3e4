"""Rows of several documents: packed equals each document alone, by either way of masking, and what each mask says."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as flex

import model.transformer as transformer
from model.attention import CausalAttention, document_mask, flex_serves, positions_in_documents
from model.config import ModelConfig
from model.transformer import Transformer

LLAMA = ModelConfig(vocab_size=67, seq_len=320, d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, init_std=0.2)
QWEN3 = LLAMA.model_copy(update={"qk_norm": True, "head_dim": 24, "tie_embeddings": True})
GPT2 = ModelConfig(
    vocab_size=67,
    seq_len=320,
    d_model=64,
    n_layers=2,
    n_heads=4,
    d_ff=48,
    norm="layernorm",
    positions="learned",
    mlp="gelu",
    attention_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
    init_std=0.2,
)
MODELS = pytest.mark.parametrize("cfg", [GPT2, LLAMA, QWEN3], ids=["gpt2", "llama", "qwen3"])
WAYS = pytest.mark.parametrize("way", ["dense", "flex"])


def random_documents(rows, seq_len, share, seed):
    """(B, T): a document begins with chance `share` at each position."""
    begins = torch.rand(rows, seq_len, generator=torch.Generator().manual_seed(seed)) < share
    return begins.cumsum(1) - begins[:, :1].long()


def runs_of(documents):
    """(row, first, end) of every document."""
    for row, numbers in enumerate(documents.tolist()):
        firsts = [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1]]
        yield from ((row, a, b) for a, b in zip(firsts, [*firsts[1:], len(numbers)], strict=True))


@pytest.fixture
def choose(monkeypatch):
    """Masks by one way, whatever the device. torch refuses gradients of FlexAttention on CPU, where it is no kernel of
    its own but the plain formula; that has gradients, and they are what the kernels' must be.
    """

    def chosen(way):
        monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
        monkeypatch.setattr(transformer, "flex_serves", lambda *_: way == "flex")

    return chosen


@WAYS
@MODELS
@pytest.mark.parametrize(("share", "seed"), [(0.01, 0), (0.1, 1), (0.5, 2)])
def test_packed_equals_unpacked(cfg, way, share, seed, choose):
    """Logits, and gradients of the summed loss: 1e-5 is some hundred roundings of fp32 at the values' size.

    At least at the size 1: a bias on keys changes no difference of scores, so its gradient is rounding noise alone.
    """
    choose(way)
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, cfg.vocab_size, (2, 150), generator=g)
    documents = random_documents(2, 150, share, seed)
    targets = tokens.roll(-1, dims=1)
    targets[:, :-1][documents[:, 1:] != documents[:, :-1]] = -100
    targets[:, -1] = -100
    packed, alone = (Transformer(cfg).init_weights(seed) for _ in range(2))
    logits = packed(tokens, documents=documents)
    loss = packed(tokens, targets, documents)
    loss.backward()
    alone_loss = 0.0
    for row, a, b in runs_of(documents):
        one = tokens[row : row + 1, a:b]
        torch.testing.assert_close(logits[row : row + 1, a:b], alone(one), rtol=1e-5, atol=1e-5)
        part = alone(one, targets[row : row + 1, a:b])
        part.backward()
        alone_loss += part.item()
    assert loss.item() == pytest.approx(alone_loss, rel=1e-5)
    for (name, p), q in zip(packed.named_parameters(), alone.parameters(), strict=True):
        scale = max(1.0, q.grad.abs().max().item())
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


@WAYS
@MODELS
def test_one_document_is_a_row_without_documents(cfg, way, choose):
    choose(way)
    tokens = torch.randint(0, cfg.vocab_size, (2, 130), generator=torch.Generator().manual_seed(0))
    network = Transformer(cfg).init_weights(0)
    documents = torch.full_like(tokens, 3)
    torch.testing.assert_close(network(tokens, documents=documents), network(tokens), rtol=1e-5, atol=1e-5)


def test_nothing_leaks_between_documents():
    """Not a bit: a changed token leaves all other documents as they were."""
    network = Transformer(LLAMA).init_weights(0)
    tokens = torch.randint(0, 67, (1, 60), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 20 + [1] * 25 + [4] * 15])
    before = network(tokens, documents=documents)
    for place, (first, end) in ((5, (0, 20)), (30, (20, 45)), (59, (45, 60))):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 67
        after = network(changed, documents=documents)
        same = (before == after).all(-1)[0]
        assert same[:first].all()
        assert same[first:place].all(), "a token sees the future"
        assert same[end:].all()
        assert not same[place:end].any()


@pytest.mark.parametrize("seed", range(5))
def test_positions_restart(seed):
    documents = random_documents(3, 70, 0.1, seed)
    expected = torch.empty_like(documents)
    for row, a, b in runs_of(documents):
        expected[row, a:b] = torch.arange(b - a)
    assert torch.equal(positions_in_documents(documents), expected)
    assert torch.equal(positions_in_documents(documents.int()), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.05, 0.6])
@pytest.mark.parametrize("seq_len", [1, 127, 128, 129, 384, 700])
def test_block_mask_is_the_one_torch_finds_by_looking_at_all_pairs(seq_len, share, dtype):
    documents = random_documents(3, seq_len, share, seed=seq_len).to(dtype)
    documents[0] *= 5  # numbers may be left out

    def may_attend(b, h, q, k):
        return (q >= k) & (documents[b, q] == documents[b, k])

    ours = document_mask(documents, flex=True)
    theirs = flex.create_block_mask(may_attend, 3, None, seq_len, seq_len, device="cpu")
    assert ours.shape == theirs.shape
    for a, b in zip(ours.as_tuple()[:-1], theirs.as_tuple()[:-1], strict=True):
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        else:
            assert a == b
    pairs = flex.create_mask(ours.mask_mod, 3, None, seq_len, seq_len, device="cpu")
    assert torch.equal(pairs, document_mask(documents, flex=False))


def test_one_compilation_serves_all_masks():
    """Documents differ in every batch; were they constants to the compiler, each step would compile anew."""
    counter = CompileCounter()
    compiled = torch.compile(flex.flex_attention, backend=counter)
    core = CausalAttention(LLAMA).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for seed in range(4):
            documents = random_documents(2, 256, 0.02, seed)
            q, k, v = (torch.randn(2, 256, heads, 16, generator=g) for heads in (4, 2, 2))
            mask = document_mask(documents, flex=True)
            out = compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=True).transpose(1, 2)
            expected = core(q, k, v, document_mask(documents, flex=False))
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_flex_serves_where_its_kernels_do():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert flex_serves(LLAMA, 320, gpu, training=True)
    assert not flex_serves(LLAMA, 320, cpu, training=True)
    assert not flex_serves(LLAMA, 127, gpu, training=True)
    assert not flex_serves(LLAMA.model_copy(update={"head_dim": 8}), 320, gpu, training=True)
    dropping = LLAMA.model_copy(update={"dropout": 0.1})
    assert not flex_serves(dropping, 320, gpu, training=True)
    assert flex_serves(dropping, 320, gpu, training=False)


def test_dropout_acts_within_documents_in_training_only():
    cfg = LLAMA.model_copy(update={"dropout": 0.3})
    network, plain = Transformer(cfg).init_weights(0), Transformer(LLAMA).init_weights(0)
    tokens = torch.randint(0, 67, (2, 64), generator=torch.Generator().manual_seed(0))
    documents = random_documents(2, 64, 0.1, 0)
    assert not torch.equal(network(tokens, documents=documents), network(tokens, documents=documents))
    assert torch.equal(network.eval()(tokens, documents=documents), plain(tokens, documents=documents))


def test_bf16_documents_are_near_fp32():
    network = Transformer(QWEN3).init_weights(0)
    tokens = torch.randint(0, 67, (2, 150), generator=torch.Generator().manual_seed(0))
    documents = random_documents(2, 150, 0.05, 0)
    wide = network(tokens, documents=documents)
    narrow = network.bfloat16()(tokens, documents=documents)
    assert narrow.dtype == torch.bfloat16
    assert (narrow - wide).abs().max() < 0.05 * wide.abs().max()  # as without documents: ten roundings of 4e-3


@pytest.mark.parametrize(
    ("documents", "match"),
    [
        (torch.zeros(2, 7, dtype=torch.int64), r"documents are \(2, 7\) of torch.int64; .* tokens \(2, 8\)"),
        (torch.zeros(8, dtype=torch.int32), r"documents are \(8,\) of torch.int32"),
        (torch.zeros(2, 8), r"documents are \(2, 8\) of torch.float32; expected one integer"),
        (torch.zeros(2, 8, dtype=torch.bool), r"documents are \(2, 8\) of torch.bool; expected one integer"),
    ],
)
def test_other_documents_are_refused(documents, match):
    with pytest.raises(ValueError, match=match):
        Transformer(LLAMA).init_weights(0)(torch.zeros(2, 8, dtype=torch.int64), documents=documents)
