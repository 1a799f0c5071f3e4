"""What a run reads, opened and checked against its config before anything is allocated.

A run reads a prepared corpus, or with data.stream raw text. The train loop sees neither: it asks RunData.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.config import SkipConfig
from data.corpus import Corpus, CorpusFolder
from data.dataset import Dataset, open_valid, reading
from data.errors import DataError
from data.lanes import Stream
from data.loader import Loader
from data.masking import Masker
from data.row_loader import RowLoader
from data.store import is_url
from data.stream import StreamLoader, check_lanes, fingerprint
from data.tokenizer import Tokenizer, load_tokenizer
from launcher.config import ConfigError, FinetuneConfig, RunConfig
from launcher.held_out import score_names
from launcher.run_dir import Ledger
from parallel.engine import Engine
from parallel.mesh import Mesh

AnyLoader = Loader | StreamLoader | RowLoader


class RunData(ABC):
    """Tokenizer, training text and held-out text of a run."""

    tokenizer: Tokenizer
    valid: dict[str, Corpus]  # held-out text by source; empty when there is none
    masker: Masker | None = None  # of a masked model
    skip: list[SkipConfig] = []  # what is left out: by the config, and by rewinds
    rewinds: int = 0  # that the run has made
    _not_evaluated: list[str] = []  # a line for each source whose held-out text is too short

    @abstractmethod
    def loader(self, cfg: RunConfig, mesh: Mesh, cursor: dict[str, Any] | None) -> AnyLoader:
        """The batches of this rank from the cursor on, from the beginning without one."""

    def begin(  # noqa: B027  (mostly nothing)
        self, cfg: RunConfig, engine: Engine, cursor: dict[str, Any] | None, enter: Callable[[], None]
    ) -> None:
        """What the data needs of the model before the loader is asked for; cursor None: before its first step.

        enter: called before each forward pass.
        """

    @abstractmethod
    def shares(self, sample: int) -> dict[str, float]:
        """What part of the training text comes from each source of valid, at a sample of the run."""

    def scores(self) -> list[str]:
        """Names of what an evaluation measures; empty where nothing is held out."""
        return score_names(self.valid, self.masker is not None)

    @abstractmethod
    def announce(self, samples: int) -> tuple[list[str], list[str]]:
        """(what the run will have read with so many samples more, what its user should know of it), lines of text."""

    def most_files(self) -> int:
        """File descriptors that reading holds at most."""
        return sum(corpus.most_files for corpus in self.valid.values())

    @abstractmethod
    def progress(self, samples: int) -> dict[str, float]:
        """Metrics of what has been read after so many samples."""


def open_data(
    cfg: RunConfig, cursor: dict[str, Any] | None, step: int, dp_size: int, left_out: Sequence[tuple[int, int]] = ()
) -> RunData:
    """Open a run's data; cursor and step: of its newest checkpoint, None and 0 on a fresh run.

    left_out: stretches of samples, first and last each, that the run has rewound behind.

    Raises DataError or ConfigError where they do not fit the config, the ranks, the cursor or the length of the run.
    """
    if cfg.data.stream is not None:
        return StreamedData(cfg, cursor, dp_size)
    if cursor is not None and "lanes" in cursor:
        raise ConfigError(
            f"{cfg.run_dir} read raw text before, and data.stream is not set now; set it as config.yaml there has it, or "
            "use another run.name for a run on a prepared corpus"
        )
    return PreparedData(cfg, cursor, step, left_out)


class PreparedData(RunData):
    """The sources of a prepared corpus, mixed."""

    def __init__(
        self, cfg: RunConfig, cursor: dict[str, Any] | None, step: int, left_out: Sequence[tuple[int, int]]
    ) -> None:
        self.skip = [*cfg.data.skip, *(SkipConfig(samples=stretch) for stretch in left_out)]
        self.rewinds = len(left_out)
        starts = [event for event in Ledger(cfg.run_dir).events() if event["event"] == "start"]
        _check_steps(cfg, starts)
        self._skip_before = [SkipConfig.model_validate(e) for e in (starts[-1].get("skip", []) if starts else [])]
        self._stages = cfg.data.stages
        data = cfg.data.model_copy(update={"skip": self.skip})
        self.dataset = Dataset.open(data, cfg.model.seq_len, cfg.global_batch_size)
        self.valid, self._not_evaluated = open_valid(cfg.data, cfg.model.seq_len)
        self.tokenizer = CorpusFolder(cfg.data.corpus, reading(cfg.data, cfg.model.seq_len)).tokenizer()
        _check_vocabulary(cfg, self.tokenizer)
        self.masker = masker_of(cfg, self.tokenizer)
        n_windows = sum(source.n_windows for source in self.dataset.corpora.values())
        if n_windows < cfg.global_batch_size:
            raise ConfigError(
                f"{cfg.data.corpus} has {n_windows} sequences of {cfg.model.seq_len} tokens, one step takes "
                f"{cfg.global_batch_size}; use a larger corpus or a smaller train.global_batch_size"
            )
        self._first = self._go_on(cursor)
        self.dataset.check_length(self.dataset.end_of(self._first, (cfg.train.steps - step) * cfg.global_batch_size))

    def loader(self, cfg: RunConfig, mesh: Mesh, cursor: dict[str, Any] | None) -> Loader:
        self._first = self._go_on(cursor)  # of an earlier checkpoint, where the newest was damaged
        return Loader(
            self.dataset,
            global_batch_size=cfg.global_batch_size,
            micro_batch_size=cfg.train.micro_batch_size,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            samples=self._first,
            masker=self.masker,
        )

    def _go_on(self, cursor: dict[str, Any] | None) -> int:
        return 0 if cursor is None else self.dataset.go_on(cursor)

    def most_files(self) -> int:
        return super().most_files() + sum(corpus.most_files for corpus in self.dataset.corpora.values())

    def shares(self, sample: int) -> dict[str, float]:
        return self.dataset.mixture.shares(sample)

    def announce(self, samples: int) -> tuple[list[str], list[str]]:
        end = self.dataset.end_of(self._first, samples)
        counts, epochs = self.dataset.mixture.counts(end), self.dataset.epochs(end)
        total = sum(counts.values())
        lines = [
            f"{name}: {counts[name] / total:.2%} of the run's samples, {epochs[name]:.2f} epochs of {corpus.n_tokens:,} "
            f"tokens (held out: {self.valid[name].n_tokens if name in self.valid else 0:,})"
            for name, corpus in self.dataset.corpora.items()
        ]
        news, warnings = self.dataset.change(self._first, self._stages)
        return news + lines, self._not_evaluated + warnings + self.dataset.check_length(end) + self._read_already()

    def _read_already(self) -> list[str]:
        """What new entries of data.skip name in vain."""
        return [
            f"data.skip has {entry.model_dump(mode='json', exclude_none=True)}, but samples {low} to "
            f"{min(high, self._first - 1)} were read before this checkpoint (of sample {self._first}) and stay in the run; "
            "to leave them out, go on from a checkpoint before them: move the later ones away"
            for entry, (low, high) in self.dataset.stretches
            if entry not in self._skip_before and low < self._first
        ]

    def progress(self, samples: int) -> dict[str, float]:
        counts = self.dataset.mixture.counts(samples)
        values = {f"data/epochs_{name}": epochs for name, epochs in self.dataset.epochs(samples).items()}
        if len(counts) > 1:
            values |= {f"data/share_{name}": count / samples for name, count in counts.items()}
        return values | {f"data/cache_{name}": value for name, value in self.dataset.stats().items()}


class StreamedData(RunData):
    """Raw text, tokenized while it is read; held-out text is that of data.corpus where it is there."""

    def __init__(self, cfg: RunConfig, cursor: dict[str, Any] | None, dp_size: int) -> None:
        assert cfg.data.stream is not None
        check_lanes(cfg.data.stream, dp_size)
        self.tokenizer = load_tokenizer(cfg.data.stream.tokenizer)
        _check_vocabulary(cfg, self.tokenizer)
        self.stream = Stream.open(cfg.data.stream)
        if cursor is not None:
            StreamLoader.check_cursor(cursor, fingerprint(self.stream, cfg.model.seq_len, cfg.data.seed))
        self.valid = {}
        if is_url(cfg.data.corpus) or Path(cfg.data.corpus).is_dir():
            theirs = CorpusFolder(cfg.data.corpus, reading(cfg.data, cfg.model.seq_len)).manifest.tokenizer.fingerprint
            if theirs != self.tokenizer.fingerprint:
                raise DataError(
                    f"data.corpus={cfg.data.corpus} is there for held-out text, but its tokenizer {theirs} is not that of "
                    f"data.stream.tokenizer={cfg.data.stream.tokenizer}, {self.tokenizer.fingerprint}; name a corpus "
                    "prepared with it, or a folder that does not exist to do without held-out text"
                )
            self.valid, self._not_evaluated = open_valid(cfg.data, cfg.model.seq_len)

    def loader(self, cfg: RunConfig, mesh: Mesh, cursor: dict[str, Any] | None) -> StreamLoader:
        return StreamLoader(
            self.stream,
            seq_len=cfg.model.seq_len,
            seed=cfg.data.seed,
            global_batch_size=cfg.global_batch_size,
            micro_batch_size=cfg.train.micro_batch_size,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            cursor=cursor,
        )

    def shares(self, sample: int) -> dict[str, float]:
        return {name: float(corpus.n_tokens) for name, corpus in self.valid.items()}

    def announce(self, samples: int) -> tuple[list[str], list[str]]:
        held_out = sum(corpus.n_tokens for corpus in self.valid.values())
        return [f"raw text, tokenized as it is read (held out: {held_out:,} tokens)"], self._not_evaluated

    def progress(self, samples: int) -> dict[str, float]:
        return {}


def masker_of(cfg: RunConfig, tokenizer: Tokenizer) -> Masker | None:
    """What hides tokens, of a masked model; None of others. Raises DataError where the tokenizer is not made for that."""
    return None if cfg.data.masking is None else Masker(cfg.data.masking, tokenizer, cfg.data.seed)


def _check_steps(cfg: RunConfig, starts: list[dict[str, Any]]) -> None:
    """Raise ConfigError where data.skip names steps of a run whose starts had other batch sizes."""
    named = [str(list(entry.steps)) for entry in cfg.data.skip if entry.steps is not None]
    sizes = sorted({event["global_batch_size"] for event in starts if "global_batch_size" in event})
    if named and set(sizes) - {cfg.global_batch_size}:
        raise ConfigError(
            f"data.skip names steps {', '.join(named)}, but this run has had steps of {', '.join(map(str, sizes))} "
            f"sequences and is to have {cfg.global_batch_size}, so that a step's number does not tell its samples; name "
            f"samples instead: launcher/audit.py {cfg.run_dir} --step K says which. Entries that the run has passed can "
            "be taken out"
        )


def _check_vocabulary(cfg: RunConfig, tokenizer: Tokenizer) -> None:
    ours, theirs, data = cfg.model.vocab_size, tokenizer.vocab_size, cfg.data
    where = f"data.corpus={data.corpus}" if data.stream is None else f"data.stream.tokenizer={data.stream.tokenizer}"
    if ours < theirs:
        raise ConfigError(
            f"model.vocab_size={ours} is smaller than the vocabulary of {where}, {theirs}; set it to {theirs} or more"
        )
    if isinstance(cfg, FinetuneConfig) or Ledger(cfg.run_dir).imported() is not None:
        return  # how much larger it is was decided by who made the model
    if ours > theirs and (ours % 64 or ours - theirs >= 256):
        raise ConfigError(
            f"model.vocab_size={ours} is larger than the vocabulary of {where}, {theirs}; set it to {theirs}, "
            f"or for the speed of even matrices to a multiple of 64 less than 256 above it, such as "
            f"{(theirs // 64 + 1) * 64}"
        )
