"""A run's config: typed sections composed from their owners, read from YAML, changed by `section.key=value`.

Defaults, then the recipe, then the command line. Everything that is wrong is reported at once, before a model or a
process group exists.
"""

import difflib
import re
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from data.config import DataConfig
from data.urls import SECRET, redact
from launcher.task_config import TaskConfig
from model.hf_config import AnyModelConfig, HfModelConfig, is_masked
from model.lora import LoraConfig
from parallel.config import CheckpointConfig, OptimConfig, ParallelConfig


class ConfigError(ValueError):
    """The config cannot be used; the message has one line for each thing that is wrong."""


class RunSection(BaseModel, frozen=True, extra="forbid", strict=True):
    """Which run this is."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # the run's folder is folder/name
    folder: str = "runs"
    seed: int = Field(0, ge=0, lt=2**63)  # of initial weights and dropout; the order of data has data.seed


class BadStepConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """What is done about a bad step, by its kind.

    log: say so, with its documents.    skip: its update is left out on all ranks alike.    rewind: back to the newest
    checkpoint, and its samples are left out.
    """

    not_finite: Literal["skip", "rewind"] = "skip"  # loss or gradient is NaN or infinite; no such update is ever made
    loss_spike: Literal["log", "skip", "rewind"] = "log"
    grad_spike: Literal["log", "skip", "rewind"] = "log"  # of the gradient's norm before clipping
    sigma: float = Field(8.0, gt=0, allow_inf_nan=False)  # standard deviations above the median that make a spike
    window: int = Field(
        128, ge=8, le=65_536
    )  # steps that the median is taken of; none is a spike before they are there
    leave_out: PositiveInt = 1  # steps whose samples a rewind leaves out: the bad one and those right before it
    max_rewinds: PositiveInt = 5  # of the whole run; then it stops
    max_skipped_in_a_row: PositiveInt = 20  # updates; then the run stops

    @property
    def may_rewind(self) -> bool:
        return "rewind" in (self.not_finite, self.loss_spike, self.grad_spike)


class TrainConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """How long, and how much at a time. The batch is said once; accumulation is derived."""

    steps: int = Field(gt=0, le=10**12)  # optimizer steps of the whole run
    stop_at: PositiveInt | None = None  # leave after this step, saved; the schedule stays that of `steps`
    global_batch_size: PositiveInt | None = None  # sequences a step, over all ranks; or:
    tokens_per_step: PositiveInt | None = None  # tokens a step, over all ranks
    micro_batch_size: PositiveInt = 1  # sequences, one rank, one forward
    bad_steps: BadStepConfig = BadStepConfig()

    @model_validator(mode="after")
    def _batch_is_said_once(self) -> Self:
        if (self.global_batch_size is None) == (self.tokens_per_step is None):
            raise ValueError(
                f"global_batch_size={self.global_batch_size} and tokens_per_step={self.tokens_per_step}; "
                "give exactly one of the two"
            )
        return self

    @model_validator(mode="after")
    def _stops_within_the_run(self) -> Self:
        if self.stop_at is not None and self.stop_at > self.steps:
            raise ValueError(
                f"stop_at={self.stop_at} is behind the run's last step, steps={self.steps}; leave it out, or make it smaller"
            )
        return self

    @property
    def end(self) -> int:
        """The step after which a start leaves, if nothing stops it before."""
        return self.stop_at or self.steps


class LogConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """What is written down while the run goes."""

    every: PositiveInt = 10  # optimizer steps between lines in the log, metrics.jsonl and TensorBoard
    straggler_share: float = Field(
        0.2, ge=0, allow_inf_nan=False
    )  # a rank slower than the median by more is named; 0: none


class EvalConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Loss on held-out documents, and samples, inside the run."""

    every: NonNegativeInt = 500  # optimizer steps between evaluations; 0 means only at the end
    windows: PositiveInt = 256  # at most so many held-out sequences, always the same ones
    prompts: list[str] = []  # continued at each evaluation and written to TensorBoard
    sample_tokens: PositiveInt = 64  # length of a continuation
    keep_best: str | None = None  # what an evaluation measures, such as loss/valid: its best checkpoint always stays
    patience: PositiveInt | None = None  # end the run after so many evaluations in which keep_best was not better

    @model_validator(mode="after")
    def _patience_has_a_score(self) -> Self:
        if self.patience is not None and self.keep_best is None:
            raise ValueError(f"patience={self.patience} needs keep_best, the score that must become better")
        if self.patience is not None and not self.every:
            raise ValueError(f"patience={self.patience} needs evaluations on the way; set every to more than 0")
        return self

    @property
    def lower_is_better(self) -> bool:
        """Of keep_best: losses, perplexities and bits a byte, whose names begin with loss/; all else is a score."""
        return (self.keep_best or "").startswith("loss/")


class OriginConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Which trained model a run began with or learns from: found from its name, kept with the run and held to ever after."""

    step: NonNegativeInt | None = None  # of the run's checkpoint; None for a Hugging Face folder
    digest: (
        str  # xxh3-128 of what the checkpoint's manifest says, which has every file's hash; or of the folder's files
    )
    tokenizer: str  # fingerprint
    model: AnyModelConfig


class DistillConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """A larger model that the run learns from beside its text; see model/distill.py."""

    teacher: str  # runs/NAME, runs/NAME@STEP, a Hugging Face folder or hf://ORG/NAME, with the tokenizer of the data
    weight: float = Field(0.5, gt=0, le=1, allow_inf_nan=False)  # of the teacher in the loss; the rest is the text's
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)  # of both distributions
    origin: OriginConfig | None = None  # of the teacher; None: not opened yet, see launcher/teacher.py


class RunConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The whole of it. A section is declared beside its owner."""

    run: RunSection
    model: AnyModelConfig  # Longhaul's own decoder; with family: hf, a model that transformers builds
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
    distill: DistillConfig | None = None

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        wrong = []
        tokens, length = self.train.tokens_per_step, self.model.seq_len
        if tokens is not None and tokens % length:
            below, above = tokens // length * length, -(-tokens // length) * length
            wrong.append(
                f"train.tokens_per_step={tokens} is no multiple of model.seq_len={length}; the nearest are "
                + " and ".join(str(n) for n in (below, above) if n > 0)
            )
        ramp = self.optim.warmup_steps + self.optim.decay_steps
        if self.optim.schedule != "constant" and ramp > self.train.steps:
            wrong.append(
                f"optim.warmup_steps={self.optim.warmup_steps} and optim.decay_steps={self.optim.decay_steps} "
                f"do not fit into train.steps={self.train.steps}; make them at most {self.train.steps} together"
            )
        wrong += self._wrong_of_masking()
        if self.distill is not None and isinstance(self.model, HfModelConfig):
            wrong.append(
                f"distill: got model.family=hf, objective={self.model.objective}; only Longhaul's own decoder (a GPT-2, a "
                "Llama, a Qwen3) learns from a teacher: leave distill out"
            )
        bad_steps = self.train.bad_steps
        if bad_steps.may_rewind and self.data.stream is not None:
            wrong.append(
                "train.bad_steps: got rewind with data.stream; raw text that was read cannot be left out afterwards: use "
                "skip, or a prepared corpus"
            )
        if bad_steps.not_finite == "rewind" and self.parallel.precision == "fp16":
            wrong.append(
                "train.bad_steps.not_finite: got rewind with parallel.precision=fp16; there gradients overflow by design "
                "whenever the loss scale is tried higher: use skip"
            )
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    def _wrong_of_masking(self) -> list[str]:
        masked = is_masked(self.model) and self.reads_text
        if not masked and self.data.masking is not None and not is_masked(self.model):
            return ["data.masking: set, and without effect on a model that is not masked; leave it out"]
        if not masked:
            return []
        wrong = []
        if self.data.masking is None:
            wrong.append(
                "data.masking: missing, and model.objective=masked needs it; data.masking={} hides 15 % of the tokens"
            )
        if self.data.tokenizer.path is None and self.data.tokenizer.mask_token is None:
            wrong.append(
                'data.tokenizer.mask_token: missing, and a masked model needs a tokenizer that has one: set it to "[MASK]"'
            )
        if self.data.stream is not None:
            wrong.append("data.stream: tokens of raw text cannot be hidden on the way; prepare a corpus")
        if self.data.packing == "best_fit" and not self.data.document_mask:
            wrong.append(
                "data.packing: best_fit pads rows, and a masked model would attend to the padding; set data.document_mask: "
                "true, or packing: windows"
            )
        if self.eval.prompts:
            wrong.append("eval.prompts: a masked model continues no text; leave them out, or give eval.prompts=[]")
        return wrong

    @property
    def reads_text(self) -> bool:
        """Whether what is trained on is the text of the data section, not examples of a task."""
        return True

    @property
    def run_dir(self) -> Path:
        return Path(self.run.folder) / self.run.name

    @property
    def begun_with(self) -> dict[str, Any]:
        """What the ledger says of weights that were there before the run."""
        if self.distill is None or self.distill.origin is None:
            return {}
        found = self.distill.origin
        return {"teacher": self.distill.teacher, "teacher_step": found.step, "teacher_digest": found.digest}

    @property
    def what_counts(self) -> str:
        """The name of what a run's tokens are counted by: what losses are means over, but of a masked model all it reads."""
        return "tokens read" if is_masked(self.model) else "tokens"

    @property
    def flops_per_token(self) -> int:
        """Floating point operations for one token: of forward and backward, and of a teacher's forward, a third of both."""
        own = self.model.flops_per_token(self.model.seq_len)
        teacher = self.distill.origin if self.distill is not None else None
        return own if teacher is None else own + teacher.model.flops_per_token(self.model.seq_len) // 3

    @property
    def global_batch_size(self) -> int:
        """Sequences a step, over all ranks."""
        return self.train.global_batch_size or self.tokens_per_step // self.model.seq_len

    @property
    def tokens_per_step(self) -> int:
        return self.train.tokens_per_step or (self.train.global_batch_size or 0) * self.model.seq_len

    def grad_accum_steps(self, dp_size: int) -> int:
        """Forward passes a rank makes for one step. Raises ConfigError, naming what would divide instead."""
        micro, batch = self.train.micro_batch_size, self.global_batch_size
        unit = micro * dp_size
        if batch % unit:
            nearest = [n for n in (batch // unit * unit, -(-batch // unit) * unit) if n > 0]
            ways = [
                "global batches that do are " + " and ".join(f"{n} ({n * self.model.seq_len} tokens)" for n in nearest)
            ]
            if ranks := _nearest_divisors(batch, micro, dp_size):
                ways.append(f"numbers of ranks that do are {' and '.join(map(str, ranks))}")
            if sizes := _nearest_divisors(batch, dp_size, micro):
                ways.append(f"train.micro_batch_size that do are {' and '.join(map(str, sizes))}")
            raise ConfigError(
                f"a global batch of {batch} sequences does not divide into train.micro_batch_size={micro} on {dp_size} "
                "ranks; the nearest " + "; the nearest ".join(ways)
            )
        return batch // unit


class FinetuneConfig(RunConfig, frozen=True, extra="forbid", strict=True):
    """Of launcher/finetune.py. The model section comes from the origin; see launcher/origin_config.py."""

    init: str  # runs/NAME, runs/NAME@STEP, a Hugging Face folder or hf://ORG/NAME
    task: TaskConfig
    lora: LoraConfig | None = None  # None: all weights are trained
    origin: OriginConfig

    @model_validator(mode="after")
    def _model_can_learn_the_task(self) -> Self:
        kind = self.task.kind
        if kind == "chat" and is_masked(self.model):
            raise ValueError(
                "task.kind: got chat, and the model is a masked one, which answers nothing; expected classify, tag or text"
            )
        if kind == "preference" and isinstance(self.model, HfModelConfig):
            raise ValueError(
                "task.kind: got preference, and the model is of family hf; expected a run of the own decoder or "
                "a folder of a GPT-2, a Llama or a Qwen3"
            )
        if kind in ("classify", "tag") and isinstance(self.model, HfModelConfig) and not is_masked(self.model):
            raise ValueError(
                f"task.kind: got {kind}, and the model is of family hf and causal, for which there is no head here; begin "
                "with a model of Longhaul's own decoder (export it, and name the folder), or with a masked one"
            )
        if self.distill is not None and kind not in ("text", "chat"):
            raise ValueError(
                f"distill: got task.kind={kind}; a teacher tells the next token, which text and chat alone learn: leave "
                "distill out"
            )
        if self.lora is not None and (added := self.data.tokenizer.add_tokens):
            raise ValueError(
                f"data.tokenizer.add_tokens: got {added} with lora, which would leave their rows at the mean of the others; "
                "tune in full, or grow the vocabulary by launcher/import_hf.py or a full tuning first"
            )
        return self

    @property
    def begun_with(self) -> dict[str, Any]:
        own = {"init": self.init, "origin_step": self.origin.step, "origin_digest": self.origin.digest}
        return {**own, **super().begun_with}

    @property
    def flops_per_token(self) -> int:
        """With LoRA without the gradients of the matrices, a third of what they take, and without its own few."""
        return super().flops_per_token - (2 * self.model.n_matrix_params if self.lora is not None else 0)

    @property
    def what_counts(self) -> str:
        if self.reads_text:
            return super().what_counts
        return "pairs" if self.task.kind == "preference" else "targets"

    @property
    def reads_text(self) -> bool:
        return self.task.kind == "text"


def _nearest_divisors(whole: int, by: int, near: int) -> list[int]:
    """The n just below and just above `near` for which n * by divides `whole`."""
    if whole % by:
        return []
    divisors = [n for n in range(1, min(whole // by, 10**6) + 1) if whole // by % n == 0]
    below, above = [n for n in divisors if n < near], [n for n in divisors if n > near]
    return below[-1:] + above[:1]


def load_config(path: str, overrides: list[str]) -> RunConfig:
    """Read a pretraining's recipe and apply `section.key=value` overrides. Raises ConfigError listing all that is wrong."""
    raw = read_recipe(path, overrides)
    if is_finetune(raw):
        raise ConfigError(f"{path} has init and task, so it is of a fine-tuning: start it with launcher/finetune.py")
    return validate(raw, path)


def is_finetune(raw: dict[str, Any]) -> bool:
    return "init" in raw or "task" in raw


def read_recipe(path: str, overrides: list[str]) -> dict[str, Any]:
    """A recipe as it is written, with overrides put in and nothing judged. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = sorted(str(p) for folder in ("configs", "configs/finetune") for p in Path(folder).glob("*.yaml"))
        raise ConfigError(
            f"cannot read the recipe {path}: {error}; recipes here: {', '.join(near) or 'none'}"
        ) from None
    raw = _parse(text, path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as run:, model:, train:; got {type(raw).__name__}")
    wrong = []
    for override in overrides:
        try:
            _set(raw, override)
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return raw


def validate(raw: dict[str, Any], where: str) -> RunConfig:
    """Check a mapping of sections, of a FinetuneConfig where it is one. `where` names it in the message."""
    kind = FinetuneConfig if is_finetune(raw) else RunConfig
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        lines = [redact(line) for item in error.errors() for line in _explain(item, kind)]
        raise ConfigError(f"{where}: {len(lines)} wrong\n" + "\n".join(f"  {line}" for line in lines)) from None


def _explain(item: Any, kind: type[RunConfig]) -> list[str]:
    """One pydantic error as `key: got VALUE; EXPECTED`."""
    loc = [str(part) for part in item["loc"]]
    if loc[:1] == ["task"] and len(loc) > 2:
        del loc[1]  # the kind, which no recipe has there
    key = ".".join(loc)
    if item["type"] == "extra_forbidden":
        never = "; code that comes with a dataset, a tokenizer or a model is never run"
        return [f"{key}: no such key{never if loc[-1] == 'trust_remote_code' else _suggest(loc, kind)}"]
    if item["type"] == "missing":
        return [f"{key}: missing; it has no default"]
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return [_explain_tag(key, item)]
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":  # our own, written with their values
        return [f"{key}: {line}" if key else line for line in message.split("\n")]
    return [f"{key}: got {_shown(loc, item['input'])}; {message[0].lower()}{message[1:]}"]


def _explain_tag(key: str, item: Any) -> str:
    """A section whose kind is none that there is, or that has none."""
    field = item["ctx"]["discriminator"].strip("'")
    if item["type"] == "union_tag_not_found":
        return f"{key}.{field}: missing; it has no default"
    got, known = item["ctx"]["tag"], re.findall("'(.+?)'", item["ctx"]["expected_tags"])
    near = difflib.get_close_matches(got, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{key}.{field}: got {redact(repr(got))}; {hint}expected {', '.join(known)}"


def _shown(loc: list[str], value: Any) -> str:
    """The value at loc for a message: no whole section, which may hold what must not be shown, nor a driver's option."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return "***" if any(part.endswith("options") for part in loc) else redact(repr(value))


def _suggest(loc: list[str], kind: type[RunConfig]) -> str:
    known = _keys_at(kind, loc[:-1])
    match = difflib.get_close_matches(loc[-1], [key for key in known if key != loc[-1]], n=1, cutoff=0.5)
    if loc[-1] in known:  # of another kind of this section, which is not the recipe's
        return f"; it is a key of another {'.'.join(loc[:-1])} than this one"
    if match:
        return f"; did you mean {'.'.join([*loc[:-1], match[0]])}?"
    elsewhere = [f"{s}.{loc[-1]}" for s in kind.model_fields if [s] != loc[:1] and loc[-1] in _keys_at(kind, [s])]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; known here: {', '.join(known) or 'none'}"


def _keys_at(model: type[BaseModel], loc: list[str]) -> list[str]:
    """Field names of the section at `loc`, going through unions of sections."""
    models: list[type[BaseModel]] = [model]
    for part in loc:
        inner: list[type[BaseModel]] = []
        for m in models:
            if part in m.model_fields:
                inner += _models_in(m.model_fields[part].annotation)
        models = inner or models  # a union's tag in the location names no field
    return sorted({name for m in models for name in m.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for argument in get_args(annotation) for m in _models_in(argument)]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats (1e-4 is a number) and no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*)(\.[\d_]*)?([eE][-+]?\d+)$|^[-+]?\d[\d_]*\.[\d_]*$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: no tag can make an object
    except yaml.MarkedYAMLError as error:  # without the lines that it would quote, which may hold a secret
        mark = error.problem_mark
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{where}: not YAML: {error.problem}{at}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {error}") from None


def _set(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    shown = redact(f"{path}=***" if SECRET.search(text) else override)
    keys = path.split(".")
    if not equals or (len(keys) < 2 and keys != ["init"]) or not all(keys):
        raise ConfigError(f"{shown!r}: expected section.key=value, for example train.steps=100")
    section = raw
    for key in keys[:-1]:
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise ConfigError(f"{shown!r}: {key} is {_shown(keys, section)}, not a section")
    section[keys[-1]] = _parse(text, shown)


def to_yaml(cfg: RunConfig) -> str:
    """The resolved config, every default written out."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# What a resumed run may be given anew: where it runs and what it writes, not what it computes.
_MAY_CHANGE = ("parallel.", "checkpoint.", "log.", "eval.", "train.micro_batch_size", "train.stop_at", "train.bad_steps.",
               "run.folder", "run.name", "data.workers", "data.stream.workers", "data.corpus", "data.cache.", "data.on_bad",
               "data.max_bad", "data.max_document_bytes", "data.shard_bytes", "data.valid_fraction",
               "task.train", "task.valid", "distill.teacher")  # fmt: skip


def unknown_keys(cfg: RunConfig, keys: list[str]) -> list[str]:
    """Those of `keys` that are no key of a config, written section.key, nor a section that may be left out."""
    optional = [name for name, field in type(cfg).model_fields.items() if field.default is None]
    known = flat(cfg.model_dump(mode="json")).keys() | optional
    return [key for key in keys if key not in known]


def contradictions(old: dict[str, Any], new: dict[str, Any], allowed: list[str]) -> list[str]:
    """Keys of a saved config that `new` changes though a resumed run must keep them, as `key: was A, is B`.

    allowed: keys that the user has named to be changed on purpose. A section that one of them has not is told once.
    The corpus is compared by its content, not here.
    """
    before, after = flat(_sources_by_name(old)), flat(_sources_by_name(new))
    differ = [
        key
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not key.startswith(_MAY_CHANGE)
        and not any(key == name or key.startswith(f"{name}.") for name in allowed)
    ]
    told = {}
    for key in differ:
        section, dot, _ = key.partition(".")
        if dot and old.get(section) is None:
            told[section] = f"{section}: was left out, is there"
        elif dot and new.get(section) is None:
            told[section] = f"{section}: was there, is left out"
        else:
            told[key] = f"{key}: was {before.get(key)!r}, is {after.get(key)!r}"
    return list(told.values())


def _sources_by_name(config: dict[str, Any]) -> dict[str, Any]:
    """The config with data.sources as name -> what the mixture depends on; where the text lies may change."""
    data = config.get("data") or {}
    sources = {
        source.get("name") or source.get("kind"): {
            "weight": source.get("weight") or "its size",  # never None, which stands for a source that is not there
            "max_epochs": source.get("max_epochs"),
        }
        for source in data.get("sources") or []
        if isinstance(source, dict)
    }
    return {**config, "data": {**data, "sources": sources}}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping of section.key."""
    keys: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            keys |= flat(value, f"{prefix}{key}.")
        else:
            keys[f"{prefix}{key}"] = value
    return keys
