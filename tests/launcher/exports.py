"""Runs of each family for tests of what is done with trained models: checkpoints of real ranks at several topologies."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from launcher.config import validate
from model.config import ModelConfig
from parallel.checkpoint import body_hash, committed_steps, folder_name
from parallel.checkpoint_writer import CheckpointWriter
from parallel.config import CheckpointConfig, ParallelConfig
from ranks import build, manifest_of, run_ranks, run_steps

SIZES = {"seq_len": 32, "d_model": 48, "n_layers": 2, "n_heads": 4, "d_ff": 96}
GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "attention_bias": True, "attention_output_bias": True,
        "mlp_bias": True, "tie_embeddings": True, "dropout": 0.1}  # fmt: skip
LLAMA = {"n_kv_heads": 2, "rope_theta": 500.0, "dropout": 0.1, "init_std": 0.1,
         "rope_scaling": {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_seq_len": 16}}  # fmt: skip
QWEN3 = {"qk_norm": True, "n_kv_heads": 1, "head_dim": 16, "tie_embeddings": True, "norm_eps": 1e-6}

# family -> (model, ranks, ZeRO stage); 512 ids are the tokenizer's
FAMILIES = {
    "gpt2": (ModelConfig(vocab_size=576, **SIZES, **GPT2), 2, 3),
    "llama": (ModelConfig(vocab_size=640, **SIZES, **LLAMA), 2, 1),
    "qwen3": (ModelConfig(vocab_size=512, **SIZES, **QWEN3), 3, 2),
}
ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def train(mesh, folder: Path, model: ModelConfig, stage: int, config: dict) -> None:
    """Two steps and a checkpoint after each, of one rank of several."""
    engine = build(mesh, ParallelConfig(zero_stage=stage, precision="fp32"), model)
    writer = CheckpointWriter(folder, mesh, CheckpointConfig(keep=0))
    for step in (1, 2):
        # the windows of ranks.py have ids below 512: those that stand for padding are never seen
        run_steps(engine, range(step - 1, step), vocab_size=512)
        writer.save(engine, replace(manifest_of(engine, step), config=config, totals={"tokens": 192 * step}))
        assert writer.wait().error is None


def make_run(folder: Path, corpus: Path, family: str) -> Path:
    """A run's folder as the train loop leaves it, as far as what reads trained models looks at it."""
    model, ranks, stage = FAMILIES[family]
    raw = {
        "run": {"name": family, "folder": str(folder)},
        "model": model.model_dump(mode="json"),
        "data": {"corpus": str(corpus), "sources": [{"kind": "text", "paths": ["-"]}]},
        "parallel": {"zero_stage": stage, "precision": "fp32"},
        "optim": {"warmup_steps": 0},
        "train": {"steps": 2, "global_batch_size": 12, "micro_batch_size": 2},
    }
    cfg = validate(raw, "a test")
    run_ranks(ranks, train, cfg.run_dir / "checkpoints", model, stage, cfg.model_dump(mode="json"))
    shutil.copytree(corpus / "tokenizer", cfg.run_dir / "tokenizer")
    lines = [{"step": 1, "loss/valid": 6.5}, {"step": 1, "loss/train": 6.0}, {"step": 2, "loss/valid": 6.25}]
    (cfg.run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "lo')
    return cfg.run_dir


def change_config(run_dir: Path, step: int, **sections: dict) -> None:
    """Rewrite the config that a checkpoint holds, with the right hash."""
    file = run_dir / "checkpoints" / folder_name(step) / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["xxh3"]
    for section, values in sections.items():
        manifest["config"][section] |= values
    file.write_text(json.dumps({**manifest, "xxh3": body_hash(manifest)}))


def damage(run_dir: Path, step: int) -> Path:
    """Flip a bit of a checkpoint's file."""
    file = run_dir / "checkpoints" / folder_name(step) / "rank-00001.safetensors"
    payload = bytearray(file.read_bytes())
    payload[-100] ^= 1
    file.write_bytes(payload)
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def newest(run_dir: Path) -> int:
    return committed_steps(run_dir / "checkpoints")[-1]
