"""transformers' heads for labels on its masked models: their logits and gradients, with padding that nothing attends to."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from model.hf_config import HfModelConfig, to_transformers
from model.hf_model import HfClassifier, HfModel
from model.init import initial_values
from model.loss import IGNORE_INDEX

L = 3
SIZES = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "electra": {"hidden_size": 32, "embedding_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                "intermediate_size": 48},
    "modernbert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
                   "layer_types": ["full_attention", "sliding_attention"], "local_attention": 6},
}  # fmt: skip
CONFIGS = {
    kind: HfModelConfig(
        family="hf",
        objective="masked",
        vocab_size=71,
        seq_len=40,
        config={"model_type": kind, **sizes, "initializer_range": 0.3},
    )
    for kind, sizes in SIZES.items()
}
KINDS = pytest.mark.parametrize("kind", CONFIGS)
PER_TOKEN = pytest.mark.parametrize("per_token", [False, True])
LENGTHS = [5, 12, 1]


def build(kind, per_token):
    return HfClassifier(CONFIGS[kind], L, per_token).init_weights(0)


def theirs(kind, per_token, ours):
    auto = AutoModelForTokenClassification if per_token else AutoModelForSequenceClassification
    model = auto.from_config(
        to_transformers(CONFIGS[kind], num_labels=L, pad_token_id=None), attn_implementation="eager"
    )
    model.load_state_dict(ours.state_dict(), strict=True)  # the names are theirs, one for one
    return model.eval()


def batch():
    """Padded rows: tokens, documents that set the padding apart, and transformers' mask."""
    torch.manual_seed(0)
    tokens, documents = torch.randint(1, 71, (3, 16)), torch.zeros(3, 16, dtype=torch.int32)
    for row, n in enumerate(LENGTHS):
        documents[row, n:] = 1
    return tokens, documents, (documents == 0).long()


@KINDS
@PER_TOKEN
def test_logits_and_gradients_are_those_of_transformers(kind, per_token):
    ours = build(kind, per_token).eval()
    hf, (tokens, documents, mask) = theirs(kind, per_token, ours), batch()
    targets = torch.full((3, 16), IGNORE_INDEX)
    labels = torch.randint(0, L, (3, 16))
    for row, n in enumerate(LENGTHS):
        at = slice(0, n) if per_token else 0
        targets[row, at] = labels[row, at]
    expected, found = hf(tokens, attention_mask=mask).logits, ours(tokens, None, documents)
    kept = mask.bool() if per_token else torch.ones(3, 16, dtype=torch.bool)
    if not per_token:
        expected = expected.unsqueeze(1).expand(-1, 16, -1)
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-4, atol=1e-5)
    of_theirs = F.cross_entropy(expected[targets != IGNORE_INDEX], targets[targets != IGNORE_INDEX], reduction="sum")
    loss = ours(tokens, targets, documents)
    torch.testing.assert_close(loss, of_theirs, rtol=1e-5, atol=1e-5)
    loss.backward()
    of_theirs.backward()
    gradients = {name: p.grad for name, p in hf.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@KINDS
@PER_TOKEN
def test_a_padded_row_gives_what_it_gives_alone(kind, per_token):
    ours, (tokens, documents, _) = build(kind, per_token).eval(), batch()
    together = ours(tokens, None, documents)
    for row, n in enumerate(LENGTHS):
        alone = ours(tokens[row : row + 1, :n])[0]
        torch.testing.assert_close(together[row, :n], alone, rtol=1e-4, atol=1e-5)
    other = ours(tokens.where(documents == 0, 7), None, documents)
    torch.testing.assert_close(together[documents == 0], other[documents == 0], rtol=0, atol=0)


@KINDS
@PER_TOKEN
def test_what_is_not_in_the_masked_model_is_the_head_and_has_initial_values(kind, per_token):
    with torch.device("meta"):
        ours, masked = HfClassifier(CONFIGS[kind], L, per_token), HfModel(CONFIGS[kind])
    names, before = ({name: p.shape for name, p in m.named_parameters()} for m in (ours, masked))
    for name in names.keys() ^ before.keys():
        assert ours.is_head(name), name
        assert masked.is_head(name), name
    both = {name for name in names.keys() & before.keys() if ours.is_head(name)}
    assert both == ({"head.dense.weight", "head.norm.weight"} if kind == "modernbert" else set())
    for name in names.keys() - before.keys():
        values = initial_values(name, names[name], CONFIGS[kind], 0)
        std = 0.88 * 32**-0.5 if kind == "modernbert" else 0.3  # its classifier's, cut off at two deviations
        assert values.std().item() == pytest.approx(0.0 if name.endswith("bias") else std, rel=0.3)


@pytest.mark.parametrize(("per_token", "key"), [(False, "classifier_dropout"), (True, "hidden_dropout_prob")])
def test_dropout_is_that_of_the_config(per_token, key):
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    tokens, documents, _ = batch()
    for rate in (0.0, 0.5):
        config = CONFIGS["bert"].config | off | {key: rate}
        model = (
            HfClassifier(CONFIGS["bert"].model_copy(update={"config": config}), L, per_token).init_weights(0).train()
        )
        first, second = model(tokens, None, documents), model(tokens, None, documents)
        assert torch.equal(first, second) == (rate == 0.0)
        model.eval()
        assert torch.equal(model(tokens, None, documents), model(tokens, None, documents))


def test_a_text_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="got sequences of 41 tokens, but model.seq_len=40 is the longest"):
        build("bert", True)(torch.zeros(1, 41, dtype=torch.int64))
