"""Pretrain a GPT-style model: `deepspeed launcher/pretrain.py --config configs/embedded.yaml [section.key=value …]`.

The same command goes on from the newest good checkpoint of the run. It runs alike under `deepspeed`, `torchrun`,
`srun python` and plain `python`. Exit codes: 0 finished; 2 refused before anything was started; 75 stopped by a
signal, or at train.stop_at, after saving, start it again to go on; anything else failed.
"""

import gc
import logging
import math
import os
import shutil
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from launcher.launchers import leaving_with_launcher, up_s  # first: it notes who started this rank; torch takes seconds

# isort: split
import torch
from torch import Tensor

from data.errors import DataError
from data.lanes import StreamEnd
from data.loader import StepBatch
from launcher import bad_steps
from launcher.agreement import agree_on_folder, agree_on_start
from launcher.bad_steps import BadStep, Judge, Rewind
from launcher.config import ConfigError, RunConfig, to_yaml
from launcher.goodput import Goodput
from launcher.lease import Lease, LeaseLost, sole_writer
from launcher.limits import LimitError
from launcher.metrics import Clock, MetricsLog, describe, peak_flops, peak_host_mem_gib
from launcher.read_log import ReadLog
from launcher.redaction import HidingFormatter, hide
from launcher.run_data import AnyLoader, RunData
from launcher.run_dir import Ledger, RunDirError, prepare_run_dir, remove_unbegun, save_config
from launcher.saving import Progress, Saves, checkpoint_bytes, never_saved, resume
from launcher.signals import StopFlag, signal_name
from launcher.start import PRETRAIN, Command, check, is_finished, open_again, parse_arguments, refuse_stop_behind
from launcher.stragglers import Stragglers
from launcher.teacher import load_teacher, parts_of_loss, teach, told_teacher
from launcher.trained import Initial, told_too_many, told_trained
from launcher.watchdog import ALLOWANCE_S, Watchdog, is_effect
from parallel import device
from parallel.checkpoint import CheckpointError, committed_steps
from parallel.deepspeed_config import deepspeed_config
from parallel.engine import Engine, UpdateResult, parallelize
from parallel.mesh import (
    LaunchError,
    Mesh,
    Place,
    build_mesh,
    close_mesh,
)
from parallel.optim import lr_at
from parallel.replicas import ReplicaError

log = logging.getLogger("longhaul")

WATCHED_S = 30.0  # that a collective may last beyond parallel.timeout_s: in it the watchdog finds out why
# What all ranks raise together, having agreed on it: no rank's own failure.
ALIKE = (StreamEnd, FloatingPointError, ReplicaError, CheckpointError, LeaseLost)
STOPPED = 75  # EX_TEMPFAIL: saved and not finished; whoever started it may start it again


@dataclass(frozen=True)
class Stats:
    """One step as this rank saw it."""

    losses: list[Tensor]  # per micro-batch: sum of token losses, nats, on the device
    loss: float  # mean over the step's targets on all ranks, nats
    update: UpdateResult
    bad: BadStep | None


def train(
    cfg: RunConfig,
    command: Command,
    data: RunData,
    engine: Engine,
    initial: Initial | None,
    ledger: Ledger,
    stop: StopFlag,
    lease: Lease | None,
    watch: Watchdog,
) -> int:
    """The whole run, from wherever it stands to its end or to a request to stop. Returns the exit code.

    initial: values of a run's first step, None where it has saved.
    Raises Rewind where it is to be begun again from its newest checkpoint.
    """
    mesh = engine.mesh
    watch.enter("start-up", 0)
    start = configure_logging(cfg, mesh, ledger)
    progress, cursor = resume(cfg, engine, initial)
    data.begin(cfg, engine, cursor, lambda: watch.enter("start-up", 0))
    loader = data.loader(cfg, mesh, cursor)
    reads = ReadLog(cfg.run_dir, start, mesh.dp_rank)
    metrics = MetricsLog(cfg.run_dir, progress.step) if mesh.rank == 0 else None
    if mesh.rank == 0:
        announce(cfg, engine, ledger, metrics, start, progress, data, loader)
    saves = Saves(cfg, engine, loader, reads, ledger, lease, progress.best_step)
    judge = Judge(cfg.train.bad_steps, progress.losses, progress.grad_norms)
    stragglers = Stragglers(cfg.log.straggler_share, engine, watch.hosts, ledger)
    spans = deque[tuple[int, int]](maxlen=cfg.train.bad_steps.leave_out)  # of the last steps' samples
    may_end = cfg.data.stream is not None and cfg.data.stream.epochs is not None
    clock, overall, stopped_by, valid = Clock(), Clock(), 0, {}
    try:
        if progress.at_end(cfg):  # killed before it could tell its end, or told to end where it stands
            sample, in_step = loader.cursor()["samples"] - cfg.global_batch_size, watch.within(progress.step)
            valid = command.evaluate(cfg, engine, data, sample, metrics, progress.step, in_step)
        while progress.step < cfg.train.end and not stopped_by and not progress.at_end(cfg):
            watch.enter("data", progress.step + 1)
            vote = mesh.agree_max(stop.signal_number, saves.failures)  # travels while the step computes
            began = time.perf_counter()
            if may_end and mesh.agree_max(int(loader.at_end())).result()[0]:
                watch.enter("save", progress.step)
                saves.finish(progress)
                raise StreamEnd(end_of_stream(cfg, progress))
            asked = time.perf_counter()
            batch = next(loader)
            own_wait_s = time.perf_counter() - asked
            clock.data_wait_s += time.perf_counter() - began
            reads.add(progress.step + 1, batch)
            spans.append(batch.span)
            n_targets = n_read = batch.n_targets
            if not loader.fixed_targets:
                n_targets, n_read = (int(n) for n in mesh.sum([batch.n_targets, batch.tokens.numel()]))
            seed_step(cfg.run.seed, progress.step, mesh.dp_rank)
            lr, in_step = lr_at(progress.step, cfg.train.steps, cfg.optim), watch.within(progress.step + 1, batch.span)
            stats = train_step(engine, batch, n_targets, lr, judge, in_step)
            stragglers.add(own_wait_s)
            progress.step += 1
            note_step(progress, stats, judge)
            if stats.bad is not None:
                if mesh.rank == 0:
                    ledger.add("bad_step", step=progress.step, **asdict(stats.bad))
                bad_steps.tell(progress.step, stats.bad, stats.update.made, stats.losses, batch, loader, mesh)
                watch.enter("save", progress.step)  # which a rewind waits for
                bad_steps.give_up_or_rewind(cfg, progress, stats.bad, spans, saves, data.rewinds)
            progress.tokens += n_read if cfg.what_counts == "tokens read" else n_targets
            progress.train_s += time.perf_counter() - began
            for c in (clock, overall):
                c.add(time.perf_counter() - began, n_read)
            stopped_by, failures = vote.result()  # every rank leaves at the same step
            last = progress.step == cfg.train.steps
            if due(progress.step, cfg.log.every) or last:
                also = {**stragglers.look(progress.step), **parts_of_loss(engine, stats.loss, n_targets)}
                log_step(cfg, mesh, metrics, progress, stats, clock, also)
                if metrics is not None:
                    metrics.write(progress.step, data.progress(batch.span[1]))
                clock = Clock()
            if due(progress.step, cfg.eval.every) or last:
                in_step = watch.within(progress.step)
                valid = command.evaluate(cfg, engine, data, batch.span[0], metrics, progress.step, in_step)
                progress.note_score(valid, cfg.eval)
            watch.enter("save", progress.step)
            saves.heed(failures, progress.step)
            leaving = bool(stopped_by) or progress.step == cfg.train.end or progress.at_end(cfg)
            if leaving or saves.due(progress):
                stall_s = saves.finish(progress) if leaving else saves.begin(progress)
                if metrics is not None and stall_s is not None:
                    metrics.write(progress.step, {"speed/checkpoint_stall_s": stall_s})
            if overall.steps == 1:
                gc.collect()
                gc.freeze()  # what lives now lives to the end; collections need not look at it again
    except Rewind as back:
        if mesh.rank == 0:
            ledger.add("rewind", step=back.step, saved_step=saves.committed_step, samples=back.samples)
        raise
    except BaseException as error:
        cause = f"{type(error).__name__}: {error}"
        if isinstance(error, ALIKE):
            watch.close()
        else:
            cause = watch.failed(error)  # which may be another rank's
        if mesh.rank == 0 and not isinstance(error, LeaseLost):  # then the ledger is another job's
            ledger.add("failed", step=progress.step, saved_step=saves.committed_step, error=hide(cause)[:1000])
        raise
    finally:
        saves.close()
        loader.close()
        reads.close()
        if metrics is not None:
            metrics.close()
    finished = progress.at_end(cfg)
    if mesh.rank == 0:
        conclude(cfg, command, ledger, progress, valid, overall, finished, stopped_by)
    return 0 if finished else STOPPED


def train_step(
    engine: Engine,
    batch: StepBatch,
    n_targets: int,
    lr: float,
    judge: Judge | None = None,
    enter: Callable[[str], None] = lambda phase: None,
) -> Stats:
    """One optimizer update: forward and backward for each micro-batch, then clip and update, if the judge lets it.

    n_targets: targets of the step that count, over all ranks.    enter: told of each phase as it begins.
    """
    losses, where = [], engine.mesh.device
    for a in range(len(batch.tokens)):  # (B, T) each
        every = (batch.tokens, batch.targets, batch.documents, batch.reference)
        parts = [part for part in every if part is not None]
        enter("forward")
        loss = engine.forward(*(part[a].to(where, non_blocking=True) for part in parts))
        enter("backward")
        engine.backward(loss, n_targets)
        losses.append(loss.detach())
    enter("update")
    loss_sum = engine.mesh.sum_on_device(torch.stack(losses).double().sum())
    verdicts: list[BadStep | None] = []

    def veto(grad_norm: float) -> bool:
        verdicts.append(judge.look(loss_sum.item() / n_targets, grad_norm) if judge is not None else None)
        return verdicts[0] is not None and verdicts[0].policy != "log"

    update = engine.update(lr, veto)
    if not verdicts:  # DeepSpeed left the update out before it came to ask
        veto(update.grad_norm)
    return Stats(losses, loss_sum.item() / n_targets, update, verdicts[0])


def end_of_stream(cfg: RunConfig, progress: Progress) -> str:
    assert cfg.data.stream is not None
    return (
        f"the text ends after data.stream.epochs={cfg.data.stream.epochs} at step {progress.step} of {cfg.train.steps}; "
        f"that step is saved. Finish with train.steps={progress.step} --allow-change train.steps, or begin a new run with "
        "more text or epochs"
    )


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def seed_step(seed: int, step: int, dp_rank: int) -> None:
    """Dropout's random numbers are a function of seed, step and rank, so a resumed run draws the same."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + dp_rank) % 2**63)


# -- before the first step ----------------------------------------------------------------------------------------------


def begin_logging() -> None:
    """Until the run's folder is there; nothing where a program that calls main has its own."""
    console = logging.StreamHandler()
    console.setFormatter(HidingFormatter("%(message)s"))
    logging.basicConfig(handlers=[console])


def configure_logging(cfg: RunConfig, mesh: Mesh, ledger: Ledger) -> int:
    """Rank 0 speaks at INFO, others at WARNING; every rank has a file of its own. Returns the number of this start."""
    start = 1 + sum(event["event"] == "start" for event in ledger.events()) if mesh.rank == 0 else 0
    start = mesh.broadcast(start)
    folder = cfg.run_dir / "logs"
    folder.mkdir(exist_ok=True)
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(HidingFormatter("%(message)s" if mesh.rank == 0 else f"[rank {mesh.rank}] %(message)s"))
    console.setLevel(logging.INFO if mesh.rank == 0 else logging.WARNING)
    file = logging.FileHandler(folder / f"start-{start:04d}-rank-{mesh.rank:05d}.log", encoding="utf-8")
    file.setFormatter(HidingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.raiseExceptions = False  # a log file on a full disk is no reason to end, nor for a traceback a line
    root = logging.getLogger()
    for handler in root.handlers:
        handler.close()  # a rewind begins a start in the same process
    root.handlers[:] = [console, file]
    root.setLevel(logging.INFO)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of DeepSpeed's calls
    return start


def build_engine(cfg: RunConfig, mesh: Mesh, command: Command = PRETRAIN) -> Engine:
    ds_config = deepspeed_config(
        cfg.parallel,
        micro_batch_size=cfg.train.micro_batch_size,
        grad_accum_steps=cfg.grad_accum_steps(mesh.dp_size),
        dp_size=mesh.dp_size,
        grad_clip=cfg.optim.grad_clip,
    )
    return parallelize(lambda: command.build_model(cfg), cfg.parallel, cfg.optim, ds_config, mesh)


def announce(
    cfg: RunConfig,
    engine: Engine,
    ledger: Ledger,
    metrics: MetricsLog | None,
    start: int,
    progress: Progress,
    data: RunData,
    loader: AnyLoader,
) -> None:
    """Rank 0 says what begins, once, in the log, the ledger and TensorBoard."""
    assert metrics is not None
    mesh = engine.mesh
    save_config(cfg)  # at each start: what was changed on purpose is what the next resume is held to
    if not (cfg.run_dir / "tokenizer").is_dir():
        data.tokenizer.save(cfg.run_dir / "tokenizer")  # so that the run's weights can be used without its corpus
    ledger.add(
        "start",
        number=start,
        step=progress.step,
        up_s=up_s(),
        world_size=mesh.world_size,
        zero_stage=cfg.parallel.zero_stage,
        parameters=sum(map(math.prod, engine.shapes.values())),
        trained_parameters=sum(math.prod(engine.shapes[name]) for name in engine.trained),
        device=device.name(),
        dp_size=mesh.dp_size,
        global_batch_size=cfg.global_batch_size,
        micro_batch_size=cfg.train.micro_batch_size,
        cursor=loader.cursor() if cfg.data.stream is None else None,  # a stream cannot be audited
        skip=[entry.model_dump(mode="json", exclude_none=True) for entry in data.skip],
        **cfg.begun_with,
    )
    metrics.goodput = Goodput(cfg.run_dir, time.time())
    metrics.write_text("config", f"```yaml\n{to_yaml(cfg)}\n```", progress.step)
    log.info(
        "%s: %s parameters on %d x %s, ZeRO %d, %s; steps %d to %d of %s",
        cfg.run_dir,
        f"{sum(map(math.prod, engine.shapes.values())):,}",
        mesh.world_size,
        device.name(),
        cfg.parallel.zero_stage,
        cfg.parallel.precision,
        progress.step,
        cfg.train.steps,
        f"{cfg.tokens_per_step:,} tokens" if cfg.reads_text else f"{cfg.global_batch_size:,} sequences",
    )
    if len(engine.trained) < len(engine.shapes):
        log.info("  %s", told_trained(cfg, engine.shapes, engine.trained))
        if warning := told_too_many(cfg, engine.shapes, engine.trained):
            log.warning("%s", warning)
    if cfg.distill is not None:
        log.info("  %s", told_teacher(cfg))
    lines, warnings = data.announce((cfg.train.steps - progress.step) * cfg.global_batch_size)
    for line in lines:
        log.info("  %s", line)
    for line in warnings:
        log.warning("%s", line)


# -- beside the steps ---------------------------------------------------------------------------------------------------


def note_step(progress: Progress, stats: Stats, judge: Judge) -> None:
    """Count a step as one whose update was made, by which later ones are judged, or was left out."""
    if stats.update.made:
        progress.skipped_in_a_row = 0
        judge.accept(stats.loss, stats.update.grad_norm)
    else:
        progress.skipped += 1
        progress.skipped_in_a_row += 1


def log_step(
    cfg: RunConfig,
    mesh: Mesh,
    metrics: MetricsLog | None,
    progress: Progress,
    stats: Stats,
    clock: Clock,
    also: dict[str, float],
) -> None:
    """The numbers of this step, and the speed since the last logged one; also: how ranks compare, parts of the loss."""
    if metrics is None:
        return
    tokens_per_s = clock.tokens / clock.step_s
    flops = tokens_per_s / mesh.world_size * cfg.flops_per_token
    values = {
        "loss/train": stats.loss,
        "optim/lr": lr_at(progress.step - 1, cfg.train.steps, cfg.optim),
        "optim/grad_norm": stats.update.grad_norm,
        "progress/tokens": progress.tokens,
        "optim/skipped_steps": progress.skipped,
        "speed/tokens_per_s": tokens_per_s,
        "speed/tokens_per_s_per_device": tokens_per_s / mesh.world_size,
        "speed/tflops_per_device": flops / 1e12,
        "speed/step_time_s": clock.step_s / clock.steps,
        "speed/median_step_time_s": clock.usual_step_s,
        "speed/data_wait_s": clock.data_wait_s / clock.steps,
        "system/peak_host_mem_gib": peak_host_mem_gib(),
        **also,
    }
    if (peak := peak_flops(device.name(), cfg.parallel.precision)) is not None:
        values["speed/mfu"] = flops / peak
    if (gib := device.peak_mem_gib()) is not None:
        values["system/peak_device_mem_gib"] = gib
    metrics.write(progress.step, values)
    left_s = (cfg.train.steps - progress.step) * clock.usual_step_s
    shown = ["loss/train", "optim/grad_norm", "optim/lr", "speed/tokens_per_s", "speed/mfu", "speed/data_wait_s"]
    log.info("step %*d/%d  %s  left %s", len(str(cfg.train.steps)), progress.step, cfg.train.steps,
             describe(values, shown), f"{left_s / 60:.1f} min")  # fmt: skip


def conclude(
    cfg: RunConfig,
    command: Command,
    ledger: Ledger,
    progress: Progress,
    valid: dict[str, float],
    overall: Clock,
    finished: bool,
    stopped_by: int,
) -> None:
    """Rank 0 says how it ended and what to do next."""
    if not finished:
        cause = signal_name(stopped_by) if stopped_by else "train.stop_at"
        ledger.add("stopped", step=progress.step, signal=cause if cause.startswith("SIG") else None, cause=cause)
        log.info(
            "stopped by %s at step %d of %d, saved; %s goes on from there",
            cause,
            progress.step,
            cfg.train.steps,
            "the same command" if stopped_by else "the same command with a later train.stop_at, or without,",
        )
        return
    tokens_per_s = overall.tokens / overall.step_s if overall.step_s else None  # of this start's steps alone
    best = progress.best_of(cfg.eval)
    ledger.add("finished", step=progress.step, tokens=progress.tokens, **valid, **best)
    log.info(
        "finished: %d steps, %s %s, %s%s",
        progress.step,
        f"{progress.tokens:,}",
        cfg.what_counts,
        describe(valid, list(valid)),
        f"  tokens_per_s {tokens_per_s:,.0f}" if tokens_per_s else "",
    )
    if best:
        log.info(
            "  best by %s: %.4g at step %d, which stays", cfg.eval.keep_best, best["best_score"], best["best_step"]
        )
    if "ended_by" in best:
        log.info("  ended before step %d by %s", cfg.train.steps, best["ended_by"])
    log.info("  the run lies in   %s", cfg.run_dir)
    of_best = f" --step {best['best_step']}" if best and best["best_step"] != progress.step else ""
    for doing, typed in command.uses(cfg).items():
        log.info("  %-17s %s %s%s", doing, typed_as("python"), typed, of_best)
    log.info("  see its curves    %s --logdir %s", typed_as("tensorboard"), cfg.run.folder)


def typed_as(program: str) -> str:
    """How to type a program of this environment: by its name where the shell finds it, else by its path."""
    here = Path(sys.executable).parent / program
    found = shutil.which(program)
    # without following links: every environment's python links to the same one
    return program if found and os.path.abspath(found) == os.path.abspath(here) else os.path.relpath(here)


# -- the command --------------------------------------------------------------------------------------------------------


def main(argv: list[str], command: Command = PRETRAIN) -> int:
    args = parse_arguments(argv, command)
    begin_logging()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        cfg, place, data = check(args, command)
        steps = committed_steps(cfg.run_dir / "checkpoints")
        if is_finished(cfg):
            if place.rank == 0:
                print(f"{cfg.run_dir} is finished: {steps[-1]} of {cfg.train.steps} steps; nothing to do")
            return 0
        refuse_stop_behind(cfg, steps)
        if place.rank == 0:
            prepare_run_dir(cfg, checkpoint_bytes(cfg, command.build_model))
            try:
                with sole_writer(cfg.run_dir) as lease:
                    return run(cfg, place, data, lease, command)
            except ConfigError:  # found by all ranks together: an origin that is damaged
                remove_unbegun(cfg.run_dir)
                raise
        return run(cfg, place, data, None, command)
    except (ConfigError, DataError, RunDirError, LaunchError, LimitError) as error:
        if local_rank == 0:
            print(hide(f"{command.name}: {error}"), file=sys.stderr)
        return 2
    except Exception as error:  # so that it is in the rank's log, too, and without secrets
        effect = is_effect(error) and log.isEnabledFor(logging.INFO)  # told by the rank that is the cause
        level = logging.INFO if effect else logging.CRITICAL
        log.log(level, "%s: %s", type(error).__name__, error, exc_info=True)
        return 1


def run(cfg: RunConfig, place: Place, data: RunData, lease: Lease | None, command: Command = PRETRAIN) -> int:
    with leaving_with_launcher():
        mesh = build_mesh(place, cfg.parallel.timeout_s)
    stop, ledger, left_out = StopFlag(), Ledger(cfg.run_dir), Ledger(cfg.run_dir).left_out()

    def tell(cause: str) -> None:
        if mesh.rank == 0 and lease is not None and lease.lost() is None:
            ledger.add("failed", error=cause)

    try:
        agree_on_start(mesh, cfg, left_out)
        agree_on_folder(mesh, cfg, lease)
        initial = command.initial(cfg, mesh) if never_saved(cfg, mesh) else None
        teacher = load_teacher(cfg, mesh)
        watch = Watchdog(mesh, cfg.parallel.timeout_s, stop, tell)
        try:
            engine = build_engine(cfg, mesh, command)
            teach(engine, teacher)
            mesh.set_timeout(cfg.parallel.timeout_s + max(ALLOWANCE_S.values()) + WATCHED_S)
            while True:
                try:
                    code = train(cfg, command, data, engine, initial, ledger, stop, lease, watch)
                    watch.close()
                    mesh.barrier()  # the store may end with rank 0's process
                    return code
                except Rewind as back:  # as if it had been stopped there and started again
                    log.warning("%s; going back to the newest checkpoint", back)
                    left_out.append(back.samples)
                    data = open_again(cfg, mesh.dp_size, left_out, command)
        except Exception as error:
            alike = isinstance(error, ALIKE)
            if watch.starting:  # train tells of the rest
                tell(hide(f"{type(error).__name__}: {error}")[:1000] if alike else watch.failed(error))
            if alike:
                watch.close()
            raise
    except (CheckpointError, FloatingPointError, ReplicaError, DataError, LeaseLost) as error:
        log.error("%s", error)
        return 1
    finally:
        close_mesh()


def leave(code: int) -> NoReturn:
    """End the process here and now, with its output written.

    The interpreter's own end tears down modules under native threads that still run (Arrow's readers, gloo's); it has
    been seen to wait for them, and to abort. A finished run must not end in a signal for that.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
