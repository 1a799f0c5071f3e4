"""Pretrain a GPT-style model: `deepspeed launcher/pretrain.py --config configs/embedded.yaml [section.key=value …]`.

The same command goes on from the newest good checkpoint of the run. It runs alike under `deepspeed`, `torchrun`,
`srun python` and plain `python`. Exit codes: 0 finished; 2 refused before anything was started; 75 stopped by a
signal after saving, start it again to go on; anything else failed.
"""

import argparse
import gc
import logging
import math
import os
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.corpus import Corpus
from data.errors import DataError
from data.loader import Loader, StepBatch, eval_batches
from data.tokenizer import Tokenizer
from launcher.config import ConfigError, RunConfig, load_config, to_yaml
from launcher.metrics import MetricsLog, describe, peak_flops, peak_host_mem_gib
from launcher.run_dir import (
    Ledger,
    RunDirError,
    prepare_run_dir,
    refuse_other_config,
    save_config,
    sole_writer,
)
from launcher.sampling import sample
from launcher.signals import StopFlag, signal_name
from model.init import initial_values
from model.transformer import Transformer
from parallel import device
from parallel.checkpoint import CheckpointError, Manifest, ZeroMoments, committed_steps, newest_good
from parallel.checkpoint import save as save_checkpoint
from parallel.deepspeed_config import check_passthrough, deepspeed_config
from parallel.engine import Engine, UpdateResult, parallelize
from parallel.mesh import LaunchError, Mesh, Place, build_mesh, check_device, close_mesh, place_from_environment
from parallel.optim import lr_at

log = logging.getLogger("longhaul")

STOPPED = 75  # EX_TEMPFAIL: saved and not finished; whoever started it may start it again


@dataclass
class Progress:
    """What a run has behind it; saved with every checkpoint."""

    step: int = 0  # optimizer steps, skipped updates included
    tokens: int = 0  # targets trained on
    skipped: int = 0  # updates left out because gradients were not finite
    skipped_in_a_row: int = 0


@dataclass
class Clock:
    """Where the time of some steps went, seconds; evaluation and checkpoints are not in it."""

    steps: int = 0
    step_s: float = 0.0
    data_wait_s: float = 0.0
    tokens: int = 0

    def add(self, step_s: float, tokens: int) -> None:
        self.steps += 1
        self.step_s += step_s
        self.tokens += tokens


@dataclass
class Stats:
    """One step as this rank saw it."""

    losses: list[Tensor] = field(default_factory=list)  # per micro-batch: sum of token losses, nats, on the device
    update: UpdateResult | None = None


def train(cfg: RunConfig, mesh: Mesh, stop: StopFlag) -> int:
    """The whole run, from wherever it stands to its last step or to a request to stop. Returns the exit code."""
    tokenizer, train_data, valid_data = open_data(cfg)
    ledger = Ledger(cfg.run_dir)
    start = configure_logging(cfg, mesh, ledger)
    engine = build_engine(cfg, mesh)
    progress, cursor = resume(cfg, engine)
    loader = Loader(
        train_data,
        seed=cfg.data.seed,
        global_batch_size=cfg.global_batch_size,
        micro_batch_size=cfg.train.micro_batch_size,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
        cursor=cursor,
    )
    metrics = MetricsLog(cfg.run_dir, progress.step) if mesh.rank == 0 else None
    if mesh.rank == 0:
        announce(cfg, mesh, ledger, metrics, start, progress, tokenizer, train_data, valid_data)
    clock, overall, stopped_by, saved_step, valid = Clock(), Clock(), 0, progress.step, {}
    try:
        while progress.step < cfg.train.steps and not stopped_by:
            vote = mesh.agree_max(stop.signal_number)  # travels while the step computes
            began = time.perf_counter()
            batch = next(loader)
            clock.data_wait_s += time.perf_counter() - began
            seed_step(cfg.run.seed, progress.step, mesh.dp_rank)
            stats = train_step(engine, batch, lr_at(progress.step, cfg.train.steps, cfg.optim))
            progress.step += 1
            note_skipped(cfg, progress, stats, batch, loader, mesh)
            progress.tokens += batch.n_targets
            for c in (clock, overall):
                c.add(time.perf_counter() - began, batch.n_targets)
            stopped_by = vote.result()  # every rank leaves at the same step
            last = progress.step == cfg.train.steps
            if due(progress.step, cfg.log.every) or last:
                log_step(cfg, mesh, metrics, progress, stats, batch, clock)
                clock = Clock()
            if due(progress.step, cfg.eval.every) or last:
                valid = evaluate(cfg, engine, valid_data, metrics, progress.step)
                write_samples(cfg, engine, tokenizer, metrics, progress.step)
            if due(progress.step, cfg.checkpoint.every) or last or stopped_by:
                save(cfg, engine, loader, progress, ledger, metrics)
                saved_step = progress.step
            if overall.steps == 1:
                gc.collect()
                gc.freeze()  # what lives now lives to the end; collections need not look at it again
    except BaseException as error:
        if mesh.rank == 0:
            ledger.add(
                "failed", step=progress.step, saved_step=saved_step, error=f"{type(error).__name__}: {error}"[:500]
            )
        raise
    finally:
        loader.close()
        if metrics is not None:
            metrics.close()
    finished = progress.step >= cfg.train.steps
    if mesh.rank == 0:
        conclude(cfg, ledger, progress, valid, overall, finished, stopped_by)
    return 0 if finished else STOPPED


def train_step(engine: Engine, batch: StepBatch, lr: float) -> Stats:
    """One optimizer update: forward and backward for each micro-batch, then clip and update."""
    stats = Stats()
    for tokens, targets in zip(batch.tokens, batch.targets, strict=True):  # (B, T) each
        loss = engine.forward(
            tokens.to(engine.mesh.device, non_blocking=True), targets.to(engine.mesh.device, non_blocking=True)
        )
        engine.backward(loss, batch.n_targets)
        stats.losses.append(loss.detach())
    stats.update = engine.update(lr)
    return stats


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def seed_step(seed: int, step: int, dp_rank: int) -> None:
    """Dropout's random numbers are a function of seed, step and rank, so a resumed run draws the same."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + dp_rank) % 2**63)


# -- before the first step ----------------------------------------------------------------------------------------------


def open_data(cfg: RunConfig) -> tuple[Tokenizer, Corpus, Corpus]:
    """Tokenizer, training and held-out split. Raises DataError or ConfigError where they do not fit the config."""
    corpus = Path(cfg.data.corpus)
    train_data = Corpus.open(corpus, "train", cfg.model.seq_len)
    valid_data = Corpus.open(corpus, "valid", cfg.model.seq_len)
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    ours, theirs = cfg.model.vocab_size, tokenizer.vocab_size
    if ours < theirs:
        raise ConfigError(
            f"model.vocab_size={ours} is smaller than the vocabulary of {corpus}, {theirs}; set it to {theirs} or more"
        )
    if ours > theirs and (ours % 64 or ours - theirs >= 256):
        raise ConfigError(
            f"model.vocab_size={ours} is larger than the vocabulary of {corpus}, {theirs}; set it to {theirs}, or for the "
            f"speed of even matrices to a multiple of 64 less than 256 above it, such as {(theirs // 64 + 1) * 64}"
        )
    if train_data.n_windows < cfg.global_batch_size:
        raise ConfigError(
            f"{corpus} has {train_data.n_windows} sequences of {cfg.model.seq_len} tokens, one step takes "
            f"{cfg.global_batch_size}; use a larger corpus or a smaller train.global_batch_size"
        )
    return tokenizer, train_data, valid_data


def configure_logging(cfg: RunConfig, mesh: Mesh, ledger: Ledger) -> int:
    """Rank 0 speaks at INFO, others at WARNING; every rank has a file of its own. Returns the number of this start."""
    start = 1 + sum(event["event"] == "start" for event in ledger.events()) if mesh.rank == 0 else 0
    start = mesh.broadcast(start)
    folder = cfg.run_dir / "logs"
    folder.mkdir(exist_ok=True)
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(message)s" if mesh.rank == 0 else f"[rank {mesh.rank}] %(message)s"))
    console.setLevel(logging.INFO if mesh.rank == 0 else logging.WARNING)
    file = logging.FileHandler(folder / f"start-{start:04d}-rank-{mesh.rank:05d}.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [console, file]
    root.setLevel(logging.INFO)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of DeepSpeed's calls
    return start


def build_engine(cfg: RunConfig, mesh: Mesh) -> Engine:
    ds_config = deepspeed_config(
        cfg.parallel,
        micro_batch_size=cfg.train.micro_batch_size,
        grad_accum_steps=cfg.grad_accum_steps(mesh.dp_size),
        dp_size=mesh.dp_size,
        grad_clip=cfg.optim.grad_clip,
    )
    return parallelize(lambda: Transformer(cfg.model), cfg.parallel, cfg.optim, ds_config, mesh)


def resume(cfg: RunConfig, engine: Engine) -> tuple[Progress, dict[str, Any] | None]:
    """Load the newest good checkpoint, or initial weights if there is none; returns progress and data cursor."""
    reader = newest_good(cfg.run_dir / "checkpoints", engine.mesh)
    if reader is None:

        def weights(name: str, first: int, stop: int) -> Tensor:
            return initial_values(name, engine.shapes[name], cfg.model, cfg.run.seed, first, stop)

        engine.load_state(ZeroMoments(weights), adam_steps=0)
        return Progress(), None
    reader.check_shapes(engine.shapes)
    manifest = reader.manifest
    engine.load_state(reader, manifest.adam_steps, manifest.loss_scaler)
    log.info("resumed from %s, written by %d ranks with ZeRO %d", reader.path, manifest.world_size, manifest.zero_stage)
    return Progress(step=manifest.step, **manifest.totals), manifest.cursor


def announce(
    cfg: RunConfig,
    mesh: Mesh,
    ledger: Ledger,
    metrics: MetricsLog | None,
    start: int,
    progress: Progress,
    tokenizer: Tokenizer,
    train_data: Corpus,
    valid_data: Corpus,
) -> None:
    """Rank 0 says what begins, once, in the log, the ledger and TensorBoard."""
    assert metrics is not None
    save_config(cfg)  # at each start: what was changed on purpose is what the next resume is held to
    if start == 1:
        tokenizer.save(cfg.run_dir / "tokenizer")  # so that the run's weights can be used without its corpus
    ledger.add(
        "start",
        number=start,
        step=progress.step,
        world_size=mesh.world_size,
        zero_stage=cfg.parallel.zero_stage,
        device=device.name(),
    )
    metrics.write_text("config", f"```yaml\n{to_yaml(cfg)}\n```", progress.step)
    epochs = cfg.train.steps * cfg.global_batch_size / train_data.n_windows
    log.info(
        "%s: %s parameters on %d x %s, ZeRO %d, %s; steps %d to %d of %s tokens (%.2f epochs of %s tokens; held out: %s)",
        cfg.run_dir,
        f"{cfg.model.n_params:,}",
        mesh.world_size,
        device.name(),
        cfg.parallel.zero_stage,
        cfg.parallel.precision,
        progress.step,
        cfg.train.steps,
        f"{cfg.tokens_per_step:,}",
        epochs,
        f"{train_data.n_tokens:,}",
        f"{valid_data.n_tokens:,}",
    )


# -- beside the steps ---------------------------------------------------------------------------------------------------


def note_skipped(
    cfg: RunConfig, progress: Progress, stats: Stats, batch: StepBatch, loader: Loader, mesh: Mesh
) -> None:
    """Say which rank and which documents were in a step that DeepSpeed left out; too many in a row end the run.

    All ranks come here alike: DeepSpeed agrees on whether gradients are finite.
    """
    assert stats.update is not None
    if not stats.update.skipped:
        progress.skipped_in_a_row = 0
        return
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    bad = [a for a, loss in enumerate(stats.losses) if not math.isfinite(loss.item())]
    suspects = batch.samples[bad] if bad else batch.samples
    what = f"loss not finite in micro-batches {bad}" if bad else "losses finite, the gradient is not"
    counts = mesh.gather(len(bad))
    if bad or not any(counts):  # the ranks whose loss broke speak; all do when none did
        log.warning(
            "step %d skipped, gradients not finite: rank %d, %s; samples %s; documents %s",
            progress.step,
            mesh.rank,
            what,
            suspects.ravel().tolist(),
            loader.describe(suspects.ravel()),
        )
    if progress.skipped_in_a_row >= cfg.train.max_skipped_in_a_row:
        raise FloatingPointError(
            f"{progress.skipped_in_a_row} updates in a row had gradients that are not finite, up to step "
            f"{progress.step}; the limit is train.max_skipped_in_a_row; the log names the documents of each"
        )


def log_step(
    cfg: RunConfig,
    mesh: Mesh,
    metrics: MetricsLog | None,
    progress: Progress,
    stats: Stats,
    batch: StepBatch,
    clock: Clock,
) -> None:
    """The numbers of this step, and the speed since the last logged one. All ranks take part in the loss's sum."""
    assert stats.update is not None
    (loss_sum,) = mesh.sum([torch.stack(stats.losses).double().sum().item()])
    loss = loss_sum / batch.n_targets  # token-weighted mean over ranks and micro-batches
    if not math.isfinite(loss) and not stats.update.skipped and mesh.rank == 0:
        log.warning("step %d: the loss is %s, gradients were finite", progress.step, loss)
    if metrics is None:
        return
    tokens_per_s = clock.tokens / clock.step_s
    flops = tokens_per_s / mesh.world_size * cfg.model.flops_per_token(cfg.model.seq_len)
    values = {
        "loss/train": loss,
        "optim/lr": lr_at(progress.step - 1, cfg.train.steps, cfg.optim),
        "optim/grad_norm": stats.update.grad_norm,
        "progress/tokens": progress.tokens,
        "optim/skipped_steps": progress.skipped,
        "speed/tokens_per_s": tokens_per_s,
        "speed/tokens_per_s_per_device": tokens_per_s / mesh.world_size,
        "speed/tflops_per_device": flops / 1e12,
        "speed/step_time_s": clock.step_s / clock.steps,
        "speed/data_wait_s": clock.data_wait_s / clock.steps,
        "system/peak_host_mem_gib": peak_host_mem_gib(),
    }
    if (peak := peak_flops(device.name(), cfg.parallel.precision)) is not None:
        values["speed/mfu"] = flops / peak
    if (gib := device.peak_mem_gib()) is not None:
        values["system/peak_device_mem_gib"] = gib
    metrics.write(progress.step, values)
    left_s = (cfg.train.steps - progress.step) * clock.step_s / clock.steps
    shown = ["loss/train", "optim/grad_norm", "optim/lr", "speed/tokens_per_s", "speed/mfu", "speed/data_wait_s"]
    log.info("step %*d/%d  %s  left %s", len(str(cfg.train.steps)), progress.step, cfg.train.steps,
             describe(values, shown), f"{left_s / 60:.1f} min")  # fmt: skip


def evaluate(cfg: RunConfig, engine: Engine, data: Corpus, metrics: MetricsLog | None, step: int) -> dict[str, float]:
    """Loss on held-out windows, the same ones at every world size: mean over their tokens on all ranks."""
    mesh, began = engine.mesh, time.perf_counter()
    total, count = 0.0, 0.0
    with engine.evaluating() as model:
        for tokens, targets in eval_batches(
            data, cfg.eval.windows, cfg.train.micro_batch_size, mesh.dp_rank, mesh.dp_size
        ):
            total += model(tokens.to(mesh.device), targets.to(mesh.device)).item()
            count += int((targets != -100).sum())
    total, count = mesh.sum([total, count])
    loss = total / count
    values = {
        "loss/valid": loss,
        "loss/valid_perplexity": math.exp(min(loss, 700.0)),
        "loss/valid_bits_per_byte": loss / math.log(2) / data.bytes_per_token,
    }
    if metrics is not None:
        metrics.write(step, {**values, "speed/eval_time_s": time.perf_counter() - began})
        log.info("step %d  held-out %s", step, describe(values, list(values)))
    return values


def write_samples(cfg: RunConfig, engine: Engine, tokenizer: Tokenizer, metrics: MetricsLog | None, step: int) -> None:
    """Continue the recipe's prompts and show them in TensorBoard. All ranks take part: under ZeRO 3 all hold weights."""
    for i, prompt in enumerate(cfg.eval.prompts):
        with engine.evaluating() as model:
            ids = sample_ids(cfg, tokenizer, model, prompt, engine.mesh.device)
        if metrics is not None:
            text = tokenizer.decode(ids)
            metrics.write_text(f"sample/{i}", f"```\n{text}\n```", step)
            log.info("step %d  sample %d:\n%s", step, i, textwrap.indent(text, "    | ", lambda line: True))


def sample_ids(
    cfg: RunConfig, tokenizer: Tokenizer, model: Callable[[Tensor], Tensor], prompt: str, where: torch.device
) -> list[int]:
    return sample(
        model,
        tokenizer.encode(prompt).tolist(),
        cfg.eval.sample_tokens,
        seq_len=cfg.model.seq_len,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        seed=cfg.run.seed,
        device=where,
        stop_at_eos=False,  # every rank must make the same number of calls
    )


def save(
    cfg: RunConfig, engine: Engine, loader: Loader, progress: Progress, ledger: Ledger, metrics: MetricsLog | None
) -> None:
    """Write a checkpoint, all ranks together, and say what it cost."""
    began = time.perf_counter()
    manifest = Manifest(
        step=progress.step,
        adam_steps=engine.adam_steps,
        world_size=engine.mesh.world_size,
        zero_stage=cfg.parallel.zero_stage,
        shapes={name: list(shape) for name, shape in engine.shapes.items()},
        files={},
        cursor=loader.cursor(),
        config=cfg.model_dump(mode="json"),
        loss_scaler=engine.loss_scaler_state(),
        totals={
            "tokens": progress.tokens,
            "skipped": progress.skipped,
            "skipped_in_a_row": progress.skipped_in_a_row,
        },
        versions={name: version(name) for name in ("torch", "deepspeed", "longhaul")},
    )
    path = save_checkpoint(cfg.run_dir / "checkpoints", engine, manifest, cfg.checkpoint.keep)
    stall_s = time.perf_counter() - began
    if metrics is not None:
        ledger.add("checkpoint", step=progress.step, stall_s=round(stall_s, 3), path=str(path))
        metrics.write(progress.step, {"speed/checkpoint_stall_s": stall_s})
        log.info("step %d  saved %s in %.2f s", progress.step, path, stall_s)


def conclude(
    cfg: RunConfig,
    ledger: Ledger,
    progress: Progress,
    valid: dict[str, float],
    overall: Clock,
    finished: bool,
    stopped_by: int,
) -> None:
    """Rank 0 says how it ended and what to do next."""
    if not finished:
        ledger.add("stopped", step=progress.step, signal=signal_name(stopped_by))
        log.info(
            "stopped by %s at step %d of %d, saved; the same command goes on from there",
            signal_name(stopped_by),
            progress.step,
            cfg.train.steps,
        )
        return
    tokens_per_s = overall.tokens / overall.step_s if overall.step_s else None  # of this start's steps alone
    ledger.add("finished", step=progress.step, tokens=progress.tokens, **valid)
    log.info(
        "finished: %d steps, %s tokens, %s%s\n"
        "  the run lies in   %s\n"
        "  sample its text   %s launcher/generate.py %s --prompt 'def '\n"
        "  see its curves    %s --logdir %s",
        progress.step,
        f"{progress.tokens:,}",
        describe(valid, list(valid)),
        f"  tokens_per_s {tokens_per_s:,.0f}" if tokens_per_s else "",
        cfg.run_dir,
        command("python"),
        cfg.run_dir,
        command("tensorboard"),
        cfg.run.folder,
    )


def command(program: str) -> str:
    """How to type a program of this environment: by its name where the shell finds it, else by its path."""
    here = Path(sys.executable).parent / program
    found = shutil.which(program)
    # without following links: every environment's python links to the same one
    return program if found and os.path.abspath(found) == os.path.abspath(here) else os.path.relpath(here)


# -- the command --------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deepspeed launcher/pretrain.py",
        description="Pretrain, or go on from the run's newest good checkpoint.",
        epilog="example: deepspeed --num_accelerators 2 launcher/pretrain.py --config configs/embedded.yaml "
        "train.steps=100 run.name=try",
    )
    parser.add_argument("--config", required=True, help="recipe, a YAML file")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", help="config key that a resumed "
                        "run may change on purpose; may be repeated")  # fmt: skip
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # passed by deepspeed
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    return parser.parse_intermixed_args(argv)  # options may stand between overrides


def check(args: argparse.Namespace) -> tuple[RunConfig, Place]:
    """Everything that can be refused before a process group or a model exists."""
    cfg = load_config(args.config, args.overrides)
    if wrong := check_passthrough(cfg.parallel):
        raise ConfigError("\n".join(wrong))
    place = place_from_environment(os.environ)
    cfg.grad_accum_steps(place.world_size)
    check_device(cfg.parallel.precision)
    open_data(cfg)
    refuse_other_config(cfg, args.allow_change)
    return cfg, place


def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        cfg, place = check(args)
        steps = committed_steps(cfg.run_dir / "checkpoints")
        if steps and steps[-1] >= cfg.train.steps:
            if place.rank == 0:
                print(f"{cfg.run_dir} is finished: {steps[-1]} of {cfg.train.steps} steps; nothing to do")
            return 0
        if place.rank == 0:
            prepare_run_dir(cfg, needed_bytes=12 * cfg.model.n_params)  # fp32 weights and two moments
            with sole_writer(cfg.run_dir):
                return run(cfg, place)
        return run(cfg, place)
    except (ConfigError, DataError, RunDirError, LaunchError) as error:
        if local_rank == 0:
            print(f"pretrain: {error}", file=sys.stderr)
        return 2


def run(cfg: RunConfig, place: Place) -> int:
    mesh = build_mesh(place, cfg.parallel.timeout_s)
    stop = StopFlag()
    try:
        return train(cfg, mesh, stop)
    except (CheckpointError, FloatingPointError) as error:
        log.error("%s", error)
        return 1
    finally:
        close_mesh()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
