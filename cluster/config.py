"""What a cluster is: one YAML file, checked whole before a job is queued. configs/cluster/ has examples to copy."""

import dataclasses
import difflib
import re
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

_TIME = re.compile(r"(?:(\d+)-(\d+)(?::(\d+)(?::(\d+))?)?|(\d+)(?::(\d+)(?::(\d+))?)?)")
_SECRET = re.compile(r"(?:^|_)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(?:_|$)", re.IGNORECASE)


class ClusterError(ValueError):
    """The job cannot be submitted; the message has one line for each thing that is wrong."""


@dataclass(frozen=True, kw_only=True)
class Container:
    """Where the ranks run, if not in the host's own system. The job's supervisor stays outside."""

    kind: Literal["apptainer", "pyxis"]
    image: str
    mounts: list[str] = field(default_factory=list)  # HOST:INSIDE; checkout, run and corpus must be among them
    python: str = "python"  # inside


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What each node must show before a start."""

    enabled: bool = True
    within_s: int = 300  # loading libraries from a shared disk takes most of it
    free_disk_gb: float = 1.0  # where the run lies, and in scratch
    clock_s: float = 5.0  # from the batch host's; with three nodes or more from the median
    free_device_memory: float = 0.9  # share of an accelerator's
    speed: float = 0.5  # of the median of the nodes; with three nodes or more
    matmul_tflops: float = 0.0  # of each device, at least
    all_reduce_gb_s: float = 0.0  # with the same device of a neighbour, at least


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What is asked of SLURM, and what its nodes need to be told. What is None is left to SLURM."""

    nodes: int
    time: str  # limit of one start, as SLURM writes it: "24:00:00", "2-00:00:00"; the job requeues itself until it is done
    min_nodes: int | None = None  # with which it starts when there are no more; None: all of `nodes`
    gpus_per_node: int = 0
    tasks_per_node: int | None = None  # ranks; None: one for each GPU
    cpus_per_task: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    exclude: str | None = None  # nodes to keep away from, "n3,n[7-9]"
    launch: Literal["srun", "deepspeed"] = "srun"  # a task for each rank, or one `deepspeed` for each node
    lead_s: int = 300  # seconds before the time limit to save and stop; longer where the run's saves need it
    max_failures: int = 3  # starts in a row that fail and save nothing; then the job stops instead of requeueing
    python: str | None = None  # on the nodes; None: the one that runs submit.py
    modules: list[str] = field(default_factory=list)  # `module load` each
    env: dict[str, str] = field(default_factory=dict)
    network_interface: str | None = None  # between the nodes, "ib0"; None: NCCL and gloo choose
    scratch: str | None = None  # a folder on each node's own disk, for temporary files and compiled kernels
    cache: str | None = None  # a folder that all nodes see, for what Hugging Face libraries download
    container: Container | None = None
    preflight: Preflight = field(default_factory=Preflight)
    sbatch: list[str] = field(default_factory=list)  # further options of sbatch, "--exclusive"

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def least_nodes(self) -> int:
        return self.nodes if self.min_nodes is None else self.min_nodes

    @property
    def time_s(self) -> int:
        seconds = parse_time(self.time)
        assert seconds is not None  # load_cluster refuses others
        return seconds


def parse_time(text: str) -> int | None:
    """Seconds of a time as SLURM writes it; None for what is none, "infinite" among it."""
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    days, d_hours, d_minutes, d_seconds, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is not None:
        return ((days * 24 + d_hours) * 60 + d_minutes) * 60 + d_seconds
    if match[7] is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second  # MINUTES or MINUTES:SECONDS


def load_cluster(path: str) -> ClusterConfig:
    """Read a cluster file. Raises ClusterError listing all that is wrong."""
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        near = ", ".join(sorted(str(p) for p in Path("configs/cluster").glob("*.yaml")))
        raise ClusterError(f"cannot read the cluster file {path}: {error}; examples: {near or 'none here'}") from None
    except yaml.YAMLError as error:
        raise ClusterError(f"{path}: not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ClusterError(f"{path}: expected keys such as nodes: and time:; got {type(raw).__name__}")
    wrong: list[str] = []
    cfg = _build(ClusterConfig, raw, "", wrong)
    wrong += _judge(cfg) if cfg is not None else []
    if wrong:
        raise ClusterError(f"{path}: {len(wrong)} wrong\n" + "\n".join(f"  {line}" for line in wrong))
    assert cfg is not None
    return cfg


def _build(cls: Any, raw: dict[Any, Any], where: str, wrong: list[str]) -> Any:
    """An object of the dataclass from a mapping; None, and lines in `wrong`, where it cannot be."""
    before = len(wrong)
    hints, known = get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in raw.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            wrong.append(
                f"{where}{key}: no such key; "
                + (f"did you mean {where}{near[0]}?" if near else f"known here: {', '.join(known)}")
            )
            continue
        values[key] = _value(hints[key], value, f"{where}{key}", wrong)
    for name, f in known.items():
        if name not in raw and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            wrong.append(f"{where}{name}: missing; it has no default")
    return cls(**values) if len(wrong) == before else None


def _value(hint: Any, value: Any, where: str, wrong: list[str]) -> Any:
    """The value, checked against a type hint."""
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(arm for arm in get_args(hint) if arm is not type(None))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _build(hint, value, f"{where}.", wrong)
        expected = "a mapping"
    elif get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        expected = " or ".join(get_args(hint))
    elif get_origin(hint) is list:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        expected = "a list of texts"
    elif get_origin(hint) is dict:
        if isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()):
            return value
        expected = 'names with texts (numbers in quotes: "1")'
    elif hint is bool:
        if isinstance(value, bool):
            return value
        expected = "true or false"
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
            return float(value)
        expected = "a number, 0 or more"
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        expected = "a whole number"
    else:
        if isinstance(value, str):
            return value
        expected = "a text" + (', in quotes, as YAML reads 24:00:00 as a number: "24:00:00"' if where == "time" else "")
    wrong.append(f"{where}: got {value!r}; expected {expected}")
    return None


def _judge(cfg: ClusterConfig) -> list[str]:
    """What does not make sense, one line each."""
    wrong = []
    for name, least in (("nodes", 1), ("gpus_per_node", 0), ("tasks_per_node", 1), ("cpus_per_task", 1), ("lead_s", 1),
                        ("max_failures", 1)):  # fmt: skip
        value = getattr(cfg, name)
        if value is not None and value < least:
            wrong.append(f"{name}: got {value}; expected {least} or more")
    if not 1 <= cfg.least_nodes <= cfg.nodes:
        wrong.append(f"min_nodes: got {cfg.min_nodes}; expected 1 to {cfg.nodes}, which is nodes")
    if cfg.preflight.within_s < 30:
        wrong.append(f"preflight.within_s: got {cfg.preflight.within_s}; expected 30 or more")
    for name in ("free_device_memory", "speed"):
        if not getattr(cfg.preflight, name) < 1:
            wrong.append(f"preflight.{name}: got {getattr(cfg.preflight, name):g}; expected a share, below 1")
    if not cfg.ranks_per_node:
        wrong.append(
            "gpus_per_node: got 0 and no tasks_per_node; give one of the two: it is the number of ranks of a node"
        )
    seconds = parse_time(cfg.time)
    if seconds is None:
        wrong.append(
            f'time: got {cfg.time!r}; expected a time as SLURM writes it: "90" (minutes), "24:00:00", "2-00:00:00"'
        )
    elif seconds <= cfg.lead_s:
        wrong.append(
            f"lead_s: got {cfg.lead_s}, and time is {cfg.time}; nothing of a start would be left: lower lead_s"
        )
    elif cfg.preflight.enabled and seconds <= cfg.lead_s + cfg.preflight.within_s:
        wrong.append(
            f"preflight.within_s: got {cfg.preflight.within_s}, lead_s is {cfg.lead_s} and time {cfg.time}; a pre-flight "
            "that takes its time would leave nothing of a start: lower one of them"
        )
    for name in cfg.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            wrong.append(f"env.{name}: no name of a variable")
        elif _SECRET.search(name):
            wrong.append(
                f"env.{name}: the job's script may be read by others, so no secrets here; export it where you call "
                "submit.py: sbatch hands your environment to the job"
            )
    if cfg.network_interface is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:-]*", cfg.network_interface):
        wrong.append(f"network_interface: got {cfg.network_interface!r}; expected one name, such as ib0 or eth0")
    for option in cfg.sbatch:
        if not option.startswith("-") or "\n" in option:
            wrong.append(f'sbatch: got {option!r}; expected an option of sbatch, such as "--exclusive"')
    return wrong
