"""The DPO loss and its gradients against transformers' model and the formula of the paper, in fp32."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from model import preference
from model.config import ModelConfig
from model.hf import to_hf_config, to_hf_state
from model.preference import Preference

BETA = 0.3
CFG = ModelConfig(vocab_size=97, seq_len=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, init_std=0.2)


def pairs(seed):
    """Three rows of a pair each, padded: (tokens, targets, documents), and the texts (ids, where the answer begins)."""
    draw = torch.Generator().manual_seed(seed)
    tokens, targets, documents = (
        torch.zeros(3, 40, dtype=torch.int64),
        torch.full((3, 40), -100),
        torch.full((3, 40), 2),
    )
    texts = []
    for row in range(3):
        at = 0
        for document in (0, 1):
            n, asked = 9 + 2 * row + 3 * document, 4 + row
            ids = torch.randint(0, 97, (n,), generator=draw)
            texts.append((ids, asked))
            tokens[row, at : at + n - 1] = ids[:-1]
            targets[row, at + asked - 1 : at + n - 1] = ids[asked:]
            documents[row, at : at + n - 1] = document
            at += n - 1
    return (tokens, targets, documents), texts


def their_log_probs(model, texts):
    found = []
    for ids, asked in texts:
        log_probs = model(ids.unsqueeze(0)).logits[0].log_softmax(-1)
        found.append(log_probs[asked - 1 : -1].gather(1, ids[asked:].unsqueeze(1)).sum())
    return torch.stack(found).view(-1, 2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_loss_and_gradients_are_those_of_the_formula(tied, chunk, monkeypatch):
    monkeypatch.setattr(preference, "chunk_tokens_for", lambda vocab_size, device: chunk)
    cfg = CFG.model_copy(update={"tie_embeddings": tied})
    ours = Preference(cfg, BETA).init_weights(1)
    theirs = LlamaForCausalLM(to_hf_config(cfg))
    theirs.load_state_dict(to_hf_state(cfg, dict(ours.named_parameters())), strict=not tied)
    batch, texts = pairs(0)
    reference = torch.randn(3, 2, generator=torch.Generator().manual_seed(2))

    chosen, rejected = (their_log_probs(theirs, texts) - reference).unbind(-1)
    expected = -F.logsigmoid(BETA * (chosen - rejected)).sum()
    expected.backward()
    with torch.no_grad():
        torch.testing.assert_close(ours(*batch), their_log_probs(theirs, texts), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(ours(batch[0][:, :8]), theirs(batch[0][:, :8]).logits, rtol=1e-4, atol=1e-5)
    loss = ours(*batch, reference)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    gradients = to_hf_state(cfg, {name: p.grad for name, p in ours.named_parameters()})
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(
            gradients[name], p.grad, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_model_that_is_its_own_reference_has_the_loss_of_a_coin():
    model = Preference(CFG, BETA).init_weights(3)
    batch, _ = pairs(1)
    with torch.no_grad():
        assert model(*batch, model(*batch)).item() == pytest.approx(3 * torch.tensor(2.0).log().item())
