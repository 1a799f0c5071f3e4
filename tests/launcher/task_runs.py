"""A Hugging Face folder to fine-tune from, and recipes for it: made in a second, without a run of our own."""

import json
from pathlib import Path

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from runs import PRETRAIN, torchrun

END = "<|endoftext|>"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(fast), max_position_embeddings=64, tie_word_embeddings=True, **sizes)
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
    return [word.replace(PRETRAIN, "launcher/finetune.py") for word in torchrun(ranks, *arguments)]
