"""The head for labels: transformers' models for sequence classification, in logits and gradients, with padding behind."""

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from model.classifier import Classifier
from model.hf import from_hf_config, from_hf_state
from model.loss import IGNORE_INDEX
from model.transformer import Transformer

L = 3
OFF = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
GPT2 = GPT2Config(vocab_size=71, n_positions=40, n_embd=32, n_layer=2, n_head=4, pad_token_id=70, num_labels=L, **OFF)
LLAMA = LlamaConfig(
    vocab_size=71, max_position_embeddings=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=52, pad_token_id=70, num_labels=L,
)  # fmt: skip
CASES = pytest.mark.parametrize(
    ("theirs", "config"), [(GPT2ForSequenceClassification, GPT2), (LlamaForSequenceClassification, LLAMA)]
)


def pair(theirs, config):
    torch.manual_seed(0)
    hf = theirs(config).eval()
    state = {name: tensor for name, tensor in hf.state_dict().items() if name != "score.weight"}
    cfg = from_hf_config(config)
    body = state | {
        "lm_head.weight": state[
            "transformer.wte.weight" if config.model_type == "gpt2" else "model.embed_tokens.weight"
        ]
    }
    ours = Classifier(cfg, L)
    values = {name: tensor for name, tensor in from_hf_state(cfg, body).items() if not name.startswith("head.")}
    ours.load_state_dict(values | {"score.weight": hf.state_dict()["score.weight"]})
    return hf, ours.eval()


@CASES
def test_the_last_token_of_a_text_is_pooled_as_by_transformers(theirs, config):
    hf, ours = pair(theirs, config)
    lengths, labels = [5, 12, 1], torch.tensor([2, 0, 1])
    tokens = torch.full((3, 12), 70)
    targets = torch.full((3, 12), IGNORE_INDEX)
    for row, n in enumerate(lengths):
        tokens[row, :n] = torch.randint(0, 70, (n,))
        targets[row, n - 1] = labels[row]
    expected = hf(tokens, attention_mask=(tokens != 70).long(), labels=labels)
    logits = ours(tokens)[torch.arange(3), torch.tensor(lengths) - 1]
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)
    loss = ours(tokens, targets) / 3
    torch.testing.assert_close(loss, expected.loss, rtol=1e-4, atol=1e-5)
    loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(ours.score.weight.grad, hf.score.weight.grad, rtol=1e-4, atol=1e-6)


@CASES
def test_its_names_are_the_decoders_but_for_the_head(theirs, config):
    cfg = from_hf_config(config)
    with torch.device("meta"):
        names = {name for name, _ in Transformer(cfg).named_parameters()} - {"head.weight"}
        ours = Classifier(cfg, L)
    assert {name for name, _ in ours.named_parameters()} == names | {"score.weight"}
    moved = ours.to_empty(device="cpu").init_weights(0)  # no tie of what is not there
    assert moved.score.weight.std().item() == pytest.approx(cfg.init_std, rel=0.3)
    assert moved.score.weight.data_ptr() != moved.embed.weight.data_ptr()
