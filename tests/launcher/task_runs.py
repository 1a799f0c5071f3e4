"""A Hugging Face folder to fine-tune from, and recipes for it: made in a second; and tuned runs."""

import json
import shutil
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from exports import FAMILIES
from launcher.config import validate
from launcher.trained import build_model
from model.hf_config import HfModelConfig
from model.init import initial_values
from parallel.checkpoint import Manifest
from parallel.checkpoint_writer import CheckpointWriter
from parallel.config import CheckpointConfig
from parallel.state import KINDS, Fragment
from ranks import Alone
from runs import FINETUNE, PRETRAIN, torchrun

END = "<|endoftext|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


MODELS = {family: model for family, (model, _, _) in FAMILIES.items()}
SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = HfModelConfig(
    family="hf", objective="masked", vocab_size=544, seq_len=32, config={"model_type": "bert", **SIZES}
)
MODERN = BERT.model_copy(update={"config": {"model_type": "modernbert", "local_attention": 8,
                                            "layer_types": ["full_attention", "sliding_attention"], **SIZES}})  # fmt: skip


def make_origin(folder: Path, texts: list[str], chat_template: str | None = None) -> Path:
    """A Llama of 2 blocks with drawn weights, and a byte-level tokenizer of some 400 pieces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [END, "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, additional_special_tokens=special[1:])
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    config = LlamaConfig(vocab_size=len(fast), max_position_embeddings=64, tie_word_embeddings=True, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_recipe(folder: Path, origin: Path, task: dict, **train: object) -> Path:
    path = folder / "task.yaml"
    recipe = {
        "run": {"name": "tuned", "folder": str(folder / "runs")},
        "init": str(origin),
        "task": task,
        "optim": {"lr": 5e-3, "warmup_steps": 2, "weight_decay": 0.0},
        "parallel": {"zero_stage": 1, "precision": "fp32", "timeout_s": 60},
        "train": {"steps": 12, "global_batch_size": 6, "micro_batch_size": 3, **train},
        "checkpoint": {"every": 100},
        "log": {"every": 1},
        "eval": {"every": 6},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_lines(path: Path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def tune(ranks: int, *arguments: object) -> list[str]:
    return [word.replace(PRETRAIN, FINETUNE) for word in torchrun(ranks, *arguments)]


class Lone:
    """What a save needs of an engine, of one process."""

    mesh, zero_stage, adam_steps = Alone(), 0, 1

    def __init__(self, weights):
        self.shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        self._weights = weights

    def owned_fragments(self):
        return [Fragment(name, kind, 0, weight.reshape(-1)) for name, weight in self._weights.items() for kind in KINDS]


def make_tuned_run(folder, corpus, family, task):
    """A run's folder as a fine-tuning leaves it."""
    model = {**MODELS, "bert": BERT, "modernbert": MODERN}[family].model_dump(mode="json")
    raw = {
        "run": {"name": family, "folder": str(folder)},
        "init": "runs/secret/place@7",
        "origin": {"step": 7, "digest": "0123", "tokenizer": "4567", "model": model},
        "task": {"train": ["private/*.tsv"], **task},
        "model": model,
        "optim": {"warmup_steps": 0},
        "train": {"steps": 2, "global_batch_size": 12},
    }
    cfg = validate(raw, "a test")
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in build_model(cfg).named_parameters()}
    weights = {name: initial_values(name, shape, cfg.model, 3).view(shape) for name, shape in shapes.items()}
    for head in {"classifier.weight", "score.weight"} & weights.keys():
        weights[head] *= 50  # as if it had learned something
    writer = CheckpointWriter(cfg.run_dir / "checkpoints", Alone(), CheckpointConfig(keep=0))
    engine = Lone(weights)
    listed = {name: list(shape) for name, shape in engine.shapes.items()}
    writer.save(engine, Manifest(2, 1, 1, 0, listed, {}, {}, cfg.model_dump(mode="json"), totals={"tokens": 24}))
    assert writer.wait().error is None
    shutil.copytree(corpus / "tokenizer", cfg.run_dir / "tokenizer")
    return cfg.run_dir


def make_bert(folder: Path, texts: list[str], model: type = BertForMaskedLM, **config: object) -> Path:
    """A BERT of 2 layers with drawn weights, and a WordPiece tokenizer of some 400 pieces with BERT's template."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    others = [chr(0x4E00 + i) for i in range(250)]  # as a vocabulary has at least 260 pieces
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, initial_alphabet=others)
    backend.train_from_iterator(texts, trainer)
    frame = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", frame)
    names = zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **dict(names))
    fast.save_pretrained(folder)
    sizes = {**SIZES, "vocab_size": len(fast), "max_position_embeddings": 64, "initializer_range": 0.1}
    torch.manual_seed(0)
    model(BertConfig(**sizes, **config)).save_pretrained(folder)
    return folder
