"""A tiny BERT for tests: its recipe, and a corpus whose tokenizer has a token for masks."""

import shutil
import sysconfig
from pathlib import Path

from data.config import DataConfig
from data.prepare import prepare

RECIPE = """
run: {{name: bert, folder: {folder}, seed: 3}}
model:
  family: hf
  objective: masked
  vocab_size: 512
  seq_len: 32
  config: {{model_type: bert, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 64}}
data:
  corpus: {corpus}
  sources: [{{kind: text, paths: [-]}}]
  tokenizer: {{vocab_size: 512, mask_token: "[MASK]"}}
  masking: {{whole_words: true}}
  document_mask: true
optim: {{lr: 1e-3, warmup_steps: 3}}
parallel: {{zero_stage: 2, precision: fp32, activation_checkpointing: full, timeout_s: 60}}
train: {{steps: 10, global_batch_size: 8, micro_batch_size: 2}}
checkpoint: {{every: 5, keep: 0}}
log: {{every: 1}}
eval: {{every: 5, windows: 10}}
"""


def write_recipe(folder: Path, corpus: Path) -> Path:
    path = folder / "bert.yaml"
    path.write_text(RECIPE.format(folder=folder / "runs", corpus=corpus))
    return path


def make_corpus(folder: Path) -> Path:
    texts = folder / "texts"
    texts.mkdir()
    for path in sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py")):
        shutil.copy(path, texts)
    prepare(
        DataConfig.model_validate(
            {
                "corpus": str(folder / "prepared"),
                "sources": [{"kind": "text", "paths": [str(texts / "*.py")]}],
                "tokenizer": {"vocab_size": 512, "train_bytes": 2**18, "mask_token": "[MASK]"},
                "valid_fraction": 0.3,
                "workers": 1,
            }
        )
    )
    return folder / "prepared"
