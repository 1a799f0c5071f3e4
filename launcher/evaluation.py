"""Inside a run: loss on held-out text, source by source, and samples of the model's own."""

import logging
import textwrap
import time
from collections.abc import Callable

import torch
from torch import Tensor

from data.corpus import Corpus
from data.errors import DataError
from data.loader import eval_batches
from data.masking import Masker
from data.tokenizer import Tokenizer
from launcher.config import RunConfig
from launcher.held_out import combine, sum_losses
from launcher.metrics import MetricsLog, describe
from launcher.run_data import RunData
from launcher.sampling import sample
from parallel.engine import Engine

log = logging.getLogger("longhaul")


def evaluate_text(
    cfg: RunConfig,
    engine: Engine,
    data: RunData,
    sample: int,
    metrics: MetricsLog | None,
    step: int,
    enter: Callable[[str], None],
) -> dict[str, float]:
    """Loss on held-out windows, and samples of the model's text. Returns what `data.scores()` names, {} where the loss
    could not be measured.

    sample: number of one that the step read.    metrics: on rank 0.    enter: told of its phase before a forward pass.
    """
    values = evaluate(cfg, engine, data.valid, data.shares(sample), metrics, step, enter, data.masker)
    write_samples(cfg, engine, data.tokenizer, metrics, step)
    return values


def evaluate(
    cfg: RunConfig,
    engine: Engine,
    valid: dict[str, Corpus],
    shares: dict[str, float],
    metrics: MetricsLog | None,
    step: int,
    enter: Callable[[str], None],
    masker: Masker | None = None,
) -> dict[str, float]:
    """Loss on held-out windows, the same ones at every world size: mean over their tokens on all ranks.

    valid: by source.    shares: of the sources in the training mixture; of several sources the loss is the mean of
    theirs with these weights, an estimate of the training loss on unseen text.    enter: told of its phase before each
    forward pass.    masker: of a masked model.
    Returns {} where nothing is held out, or it could not be read: that is told, and ends no run.
    """
    if not valid:
        return {}
    began = time.perf_counter()
    losses = {name: _loss(cfg, engine, corpus, enter, masker) for name, corpus in valid.items()}
    if failed := next((found for found in losses.values() if isinstance(found, str)), None):
        if engine.mesh.rank == 0:
            log.warning("step %d could NOT be evaluated, training goes on: %s", step, failed)
        return {}
    found = {name: loss for name, loss in losses.items() if isinstance(loss, float)}
    values = combine(found, shares, valid, masked=masker is not None)
    if metrics is not None:
        metrics.write(step, {**values, "speed/eval_time_s": time.perf_counter() - began})
        log.info("step %d  held-out %s", step, describe(values, list(values)))
    return values


def _loss(
    cfg: RunConfig, engine: Engine, corpus: Corpus, enter: Callable[[str], None], masker: Masker | None
) -> float | str:
    """What went wrong, on all ranks alike, where one of them could not read its part."""
    mesh, batches, wrong = engine.mesh, [], ""
    enter("evaluation")
    try:
        micro, windows = cfg.train.micro_batch_size, cfg.eval.windows
        batches = list(eval_batches(corpus, windows, micro, mesh.dp_rank, mesh.dp_size, masker))
    except (DataError, OSError) as error:
        wrong = f"rank {mesh.rank}: {type(error).__name__}: {error}"
    if corpus.remote:
        corpus.hold(())  # its shards' places in the cache are for the training data meanwhile
    if failed := next(filter(None, mesh.gather(wrong)), None):
        return failed
    with engine.evaluating() as model:
        mine = sum_losses(model, batches, mesh.device, lambda: enter("evaluation"))
    total, count = mesh.sum([mine.nats, float(mine.targets)])
    return total / count


def write_samples(cfg: RunConfig, engine: Engine, tokenizer: Tokenizer, metrics: MetricsLog | None, step: int) -> None:
    """Continue the recipe's prompts and show them in TensorBoard. All ranks take part: under ZeRO 3 all hold weights."""
    began = time.perf_counter()
    for i, prompt in enumerate(cfg.eval.prompts):
        with engine.evaluating() as model:
            ids = _sample_ids(cfg, tokenizer, model, prompt, engine.mesh.device)
        if metrics is not None:
            text = tokenizer.decode(ids)
            metrics.write_text(f"sample/{i}", f"```\n{text}\n```", step)
            log.info("step %d  sample %d:\n%s", step, i, textwrap.indent(text, "    | ", lambda line: True))
    if metrics is not None and cfg.eval.prompts:
        metrics.write(step, {"speed/sample_time_s": time.perf_counter() - began})


def _sample_ids(
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
