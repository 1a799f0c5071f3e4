"""The faults that a run must survive, by their number in the table that `make faults` prints.

A test that injects one carries `@pytest.mark.fault(number)`, wherever in tests/ it lies. A row without such a test says
why here; tests/faults/test_table.py holds the two together.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    fault: str
    why_not: str = ""  # no test injects it


ROWS = {
    1: Row("a rank is killed before the first step"),
    2: Row("a rank is killed in forward, backward, reduction, update"),
    3: Row("a worker that reads data is killed"),
    4: Row("a rank is killed at any file operation of a save"),
    5: Row("a rank is killed around the writing of `latest`"),
    6: Row("a rank is killed while an old checkpoint is removed"),
    7: Row("an export is killed"),
    8: Row("the launcher is killed or told to stop"),
    9: Row("a rank stands still"),
    10: Row("a rank is slow"),
    11: Row("ranks wait for each other at different places"),
    12: Row("a shard of a checkpoint is cut"),
    13: Row("a bit of a checkpoint is flipped"),
    14: Row("a shard is gone, or one too many is there"),
    15: Row("`latest` is empty, wrong, a link, no file"),
    16: Row("no checkpoint is whole"),
    17: Row("the disk is full when a checkpoint is written"),
    18: Row("the disk is full when logs and metrics are written"),
    19: Row("the run's folder is or becomes read-only"),
    20: Row("storage that takes long to sync"),
    21: Row("a machine sees the run's folder late"),
    22: Row("two jobs on one run"),
    23: Row("the mark of a dead job, or of this one before a requeue"),
    24: Row("SIGUSR1 from SLURM, to the batch script or to all the rest"),
    25: Row("SIGTERM and scancel"),
    26: Row("a signal in each phase of a run"),
    27: Row("a signal to one rank alone"),
    28: Row("the time limit passes without a signal"),
    29: Row("a node that is drained or down, or loses its power or its slurmd"),
    30: Row("a job that fails at the same step again and again"),
    31: Row("preemption by another job"),
    32: Row("the network is cut"),
    33: Row("a port is taken; packets lost, late, or smaller ones alone"),
    34: Row("an address that leads nowhere"),
    35: Row("gradients that are not finite, on one rank or on all"),
    36: Row("weights that are not finite when they are to be saved"),
    37: Row("a batch of noise"),
    38: Row("a flipped bit in the weights of one rank"),
    39: Row("another number of ranks, ZeRO stage or precision"),
    40: Row("another batch, length, tokenizer or corpus on resume"),
    41: Row("a clock that jumps or differs"),
    42: Row("a node with other code, libraries or config"),
    43: Row("a config that is wrong"),
    44: Row("malformed JSON lines"),
    45: Row("text that is not UTF-8"),
    46: Row("compressed files that are cut, mixed up or bombs"),
    47: Row("damaged or drifting columnar files"),
    48: Row("text or shards that change under a run"),
    49: Row("documents of a gigabyte, and of nothing"),
    50: Row("no text at all, or too little to share"),
    51: Row("files that would run code when they are loaded"),
    52: Row("a model or tokenizer that brings code"),
    53: Row("secrets in environment, URLs and config"),
    54: Row("a rank that runs out of memory"),
    55: Row("low limits of files and processes"),
    56: Row("a tracker that is down or raises"),
    57: Row("an evaluation or export that fails"),
    58: Row("fine-tuning from a checkpoint of other ranks"),
}
