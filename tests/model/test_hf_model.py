"""Models of family hf against transformers' own: logits, losses, gradients, documents, names and initial values."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from model.hf_config import TESTED, HfModelConfig, from_transformers, pick_model, to_transformers
from model.hf_model import HfModel, LossHead
from model.init import initial_values
from model.network import build_network

SMALL = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
             "type_vocab_size": 1},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
    "electra": {"embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                "intermediate_size": 48},
    "modernbert": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
                   "local_attention": 8, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
                   "mlp_dropout": 0.1},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4},
}  # fmt: skip
V, T = 71, 24
KINDS = [(objective, kind) for objective, kinds in TESTED.items() for kind in kinds]


def config_of(objective, kind, **changes):
    return HfModelConfig(
        family="hf", objective=objective, vocab_size=V, seq_len=T, config={"model_type": kind, **SMALL[kind], **changes}
    )


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(kind))
def cfg(request):
    return config_of(*request.param)


@pytest.fixture
def pair(cfg):
    """Ours and transformers' with the same weights, biases and norms away from 0 and 1 too; in eval mode."""
    ours = HfModel(cfg).init_weights(3).eval()
    with torch.no_grad():
        for n, p in enumerate(ours.parameters()):
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
    kind = AutoModelForMaskedLM if cfg.objective == "masked" else AutoModelForCausalLM
    theirs = kind.from_config(to_transformers(cfg, pad_token_id=None)).eval()
    missing, unexpected = theirs.load_state_dict(dict(ours.named_parameters()), strict=False)
    tied = set(theirs._tied_weights_keys)  # what is shared is in a state once
    assert (set(missing) - tied, unexpected) == (set(), [])
    theirs.tie_weights()
    return ours, theirs


def rows(seed=0, n=3):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (n, T), generator=g)
    targets = torch.where(torch.rand(n, T, generator=g) < 0.3, torch.randint(0, V, (n, T), generator=g), -100)
    return tokens, targets


def test_logits_loss_and_gradients_are_those_of_transformers(pair):
    """1e-5 of logits of about 5: both compute in fp32, three layers."""
    ours, theirs = pair
    tokens, targets = rows()
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    loss = ours(tokens, targets)
    expected = F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name].grad, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_document_gives_what_it_gives_alone(pair):
    """Documents of 9 and 8 tokens and padding of 7 in a row: each as in a row of its own, through transformers."""
    ours, theirs = pair
    tokens, targets = rows(1)
    documents = torch.tensor([0] * 9 + [1] * 8 + [2] * 7).expand(3, -1)
    logits = ours(tokens, documents=documents)
    loss = 0.0
    for part in (slice(0, 9), slice(9, 17), slice(17, 24)):
        alone = theirs(tokens[:, part]).logits
        torch.testing.assert_close(logits[:, part], alone, rtol=1e-5, atol=1e-5)
        loss += F.cross_entropy(alone.flatten(0, 1), targets[:, part].flatten(), reduction="sum")
    torch.testing.assert_close(ours(tokens, targets, documents), loss, rtol=1e-5, atol=1e-5)


def test_a_causal_model_does_not_see_what_follows_and_a_masked_one_does(cfg):
    model = HfModel(cfg).init_weights(0).eval()
    tokens, _ = rows(2)
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % V
    for documents in (None, torch.zeros_like(tokens)):
        same = torch.equal(model(tokens, documents=documents)[:, 0], model(other, documents=documents)[:, 0])
        assert same == (cfg.objective == "causal")


def test_no_row_of_the_embedding_is_left_without_gradient(cfg):
    """Which transformers does to id 0 by itself, as that of padding; here that may be a token like another."""
    model = HfModel(cfg).init_weights(0)
    assert all(m.padding_idx is None for m in model.modules() if isinstance(m, nn.Embedding))


def test_initial_values_are_distributed_as_those_of_transformers(cfg):
    torch.manual_seed(0)
    big = cfg.model_copy(update={"vocab_size": 3001})
    kind = AutoModelForMaskedLM if cfg.objective == "masked" else AutoModelForCausalLM
    theirs = dict(kind.from_config(to_transformers(big, pad_token_id=None)).named_parameters())
    ours = HfModel(big).init_weights(1)
    for name, p in ours.named_parameters():
        other = theirs[name]
        if p.numel() >= 500 and p.ndim > 1:  # spread of a sample of n: 1 / sqrt(2 n) of itself, 4 times that
            assert abs(p.std() / other.std() - 1) < 8 / (2 * p.numel()) ** 0.5, name
            assert abs(p.mean()) < 5 * cfg.init_std / p.numel() ** 0.5, name
        elif p.ndim == 1:
            assert torch.equal(p, other), name
        part = initial_values(name, p.shape, big, 1, 3, 9)
        assert torch.equal(part, p.detach().flatten()[3:9])


def test_what_has_no_initial_values_is_refused():
    with pytest.raises(ValueError, match=r"no initial values are defined for the parameter 'a.scale' of a bert"):
        initial_values("a.scale", (3,), config_of("masked", "bert"), 0)


def test_its_head_gives_the_loss_of_counted_tokens_alone(cfg):
    model = HfModel(cfg).init_weights(0)
    tokens, targets = rows()
    assert isinstance(model.token_head, LossHead)
    assert model(tokens, torch.full_like(targets, -100)).item() == 0
    assert model(tokens, targets).dtype == torch.float32
    assert model(tokens).shape == (3, T, V)  # the targets of the call before are gone


def test_facts(cfg):
    model = HfModel(cfg)
    assert cfg.n_params == sum(p.numel() for p in model.parameters())
    assert (cfg.n_layers, cfg.d_model, len(model.blocks)) == (3, 32, 3)
    assert (cfg.init_std, cfg.dropout, cfg.tie_embeddings) == (0.02, 0.1, True)
    per_block = sum(p.numel() for p in model.blocks[0].parameters() if p.ndim == 2)
    assert 3 * per_block <= cfg.n_matrix_params <= 3 * per_block + 32 * max(V, 32)
    assert cfg.flops_per_token(8) == 6 * cfg.n_matrix_params + 12 * 3 * 32 * 8


def test_bert_base_has_its_published_size():
    """110M of the paper (arXiv:1810.04805, section 3), which count the pooler, and not the head's own 30522 + 592k."""
    cfg = HfModelConfig(
        family="hf", objective="masked", vocab_size=30522, seq_len=512, config={"model_type": "bert"}
    )  # fmt: skip
    assert cfg.n_params == 109_514_298
    assert cfg.n_matrix_params == 12 * (4 * 768**2 + 2 * 768 * 3072) + 768**2


def test_it_is_tied_again_after_memory_is_given_to_it(cfg):
    with torch.device("meta"):
        model = HfModel(cfg)
    model.to_empty(device="cpu")
    assert model.token_head.weight is model.embed.weight
    assert len(dict(model.named_parameters())) == len(dict(HfModel(cfg).named_parameters()))


@pytest.mark.parametrize("how", [lambda m: m.bfloat16(), lambda m: m.to("meta").to_empty(device="cpu")])
def test_rotary_positions_are_those_of_transformers_whatever_is_done_to_the_model(how):
    """A cast to bf16 would round their frequencies, in fp32 here as from_pretrained has them."""
    cfg = config_of("masked", "modernbert")
    model = how(HfModel(cfg))
    wanted = AutoModelForMaskedLM.from_config(to_transformers(cfg, pad_token_id=None)).model.rotary_emb
    found = model.theirs.model.rotary_emb
    buffers = dict(found.named_buffers())
    assert buffers.keys() == dict(wanted.named_buffers()).keys()
    assert all(torch.equal(buffers[name], buffer) for name, buffer in wanted.named_buffers())
    assert all(buffer.dtype == torch.float32 for buffer in buffers.values())


@pytest.mark.parametrize("window", [2, 8, 100])
def test_layers_that_see_a_window_see_it_within_documents(window):
    cfg = config_of("masked", "modernbert", local_attention=window)
    model = HfModel(cfg).init_weights(0).eval()
    tokens, _ = rows(2)
    one = torch.zeros_like(tokens)
    torch.testing.assert_close(model(tokens, documents=one), model(tokens), rtol=1e-5, atol=1e-5)


def test_train_and_eval_reach_all_of_it(cfg):
    model = HfModel(cfg).eval()
    assert not any(m.training for m in (model.theirs, *model.modules()))
    model.train()
    assert all(m.training for m in (model.theirs, *model.modules()))


def test_too_long_and_wrong_documents_are_refused(cfg):
    model = HfModel(cfg)
    with pytest.raises(ValueError, match=f"got sequences of {T + 1} tokens, but model.seq_len={T} is the longest"):
        model(torch.zeros(1, T + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected one integer for each of the tokens"):
        model(torch.zeros(1, 4, dtype=torch.int64), documents=torch.zeros(1, 3, dtype=torch.int64))


# -- the config ---------------------------------------------------------------------------------------------------------


def test_a_folders_config_comes_back(cfg):
    raw = to_transformers(cfg, pad_token_id=3, eos_token_id=2, architectures=["X"]).to_dict()
    back = from_transformers(raw, cfg.objective)
    assert to_transformers(back).to_dict() == to_transformers(cfg).to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 3}, "model.config.hiden_size: transformers' bert has no such key; did you mean hidden_size"),
        ({"type_vocab_size": 0}, "model.config leaves bert.embeddings.token_type_embeddings.weight without an element"),
        ({"num_hidden_layers": 0}, "model.config has no layers; give num_hidden_layers"),
        ({"zzz": 3}, "model.config.zzz: transformers' bert has no such key; known are .*hidden_size"),
        ({"vocab_size": 3}, "model.config.vocab_size: got 3; it is said by model.vocab_size"),
        ({"max_position_embeddings": 9}, "model.config.max_position_embeddings: got 9; it is said by model.seq_len"),
        ({"pad_token_id": 0}, "model.config.pad_token_id: got 0; it is said by the tokenizer"),
        ({"is_decoder": True}, "model.config.is_decoder: got True; it would make another kind of model"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "model.config.auto_map: got .* another kind of model"),
        ({"trust_remote_code": True}, "model.config.trust_remote_code: got True"),
        ({"num_attention_heads": 5}, r"cannot build .*hidden size \(32\) is not a multiple of .* heads \(5\)"),
        ({"hidden_size": "wide"}, "cannot build .*'hidden_size' expected int, got str"),
        ({"model_type": "modernbert", "classifier_pooling": "mean"}, "classifier_pooling: got 'mean'; a label of a text"),
        ({"model_type": "llama"}, "model_type='llama' is none that can be trained as a masked model here; expected bert or"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        config_of("masked", "bert", **change)


def test_a_family_that_is_not_there_is_refused():
    with pytest.raises(
        ValueError, match="model.family='bert'; expected hf, with config: {model_type: bert}, or no family"
    ):
        pick_model({"family": "bert"})


def test_a_folder_of_another_kind_is_refused():
    raw = to_transformers(config_of("masked", "bert")).to_dict()
    with pytest.raises(ValueError, match="model_type 'roberta' is none of bert, distilbert, electra, modernbert"):
        from_transformers({**raw, "model_type": "roberta"}, "masked")
    with pytest.raises(ValueError, match="is_decoder=True makes another kind of model"):
        from_transformers({**raw, "is_decoder": True}, "masked")


def test_what_a_section_describes_is_built(cfg):
    assert type(build_network(pick_model(cfg.model_dump()))) is HfModel
