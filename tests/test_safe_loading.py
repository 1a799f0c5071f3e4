"""Nothing that is read can run code: a pickle that leaves a trace stands wherever a file is read, and leaves none."""

import ast
import io
import json
import pickle
import shutil
import sys
import sysconfig
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_imports import ALLOWED, ROOT, imported_names
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from data.clean import CleanConfig, CleanError, Marker, NearConfig, decide, mark, verdicts
from data.config import DataConfig
from data.errors import DataError
from data.lanes import Stream, StreamConfig
from data.prepare import prepare
from data.tokenizer import TokenizerError, load_tokenizer
from launcher import audit, generate, lease, pretrain
from launcher import prepare as prepare_command
from launcher.config import ConfigError, load_config
from launcher.metrics import MetricsLog
from launcher.run_dir import Ledger, RunDirError, read_saved_config
from parallel.checkpoint import CheckpointError, body_hash, file_hash, newest_good
from runs import run

# -- the source ---------------------------------------------------------------------------------------------------------

# What can run code that is in a file or comes over a connection: modules and their parts, methods, built-in functions.
PARTS = ("pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "runpy", "importlib.util",
         "importlib.import_module", "torch.load", "torch.save", "torch.hub", "torch.package", "torch.jit",
         "torch.distributed.checkpoint", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
         "yaml.full_load", "yaml.full_load_all", "yaml.Loader", "yaml.FullLoader", "yaml.UnsafeLoader", "os.system",
         "os.popen")  # fmt: skip
METHODS = ("read_pickle", "load_checkpoint", "recv", "all_gather_object", "broadcast_object_list", "gather_object",
           "scatter_object_list", "recv_object_list", "add_constructor", "from_pretrained")  # fmt: skip
BUILTINS = ("exec", "eval", "compile", "__import__")
# Arguments, and the only value that each may have.
ARGUMENTS = {"allow_pickle": False, "trust_remote_code": False, "shell": False, "weights_only": True}
EXCEPTIONS = {
    ("launcher/config.py", "yaml.load"): "with a subclass of yaml.SafeLoader, which a test below tries",
    ("data/workers.py", "pickle"): "asks whether a worker's exception can travel; nothing comes from a file",
    ("data/workers.py", "recv"): "a pipe between a process and the workers that it has started",
    ("data/lane_workers.py", "recv"): "a socket pair between a process and the workers that it has started",
    ("parallel/mesh.py", "all_gather_object"): "between the ranks of one job, which run the same program",
    ("parallel/mesh.py", "broadcast_object_list"): "between the ranks of one job, which run the same program",
    (
        "data/hf_tokenizer.py",
        "from_pretrained",
    ): "of a class that is named here, and a folder that asks for code is refused",
    (
        "data/fast_tokenizer.py",
        "from_pretrained",
    ): "of a folder that this program has just written, never with its code",
    ("model/hf_folder.py", "from_pretrained"): "of a folder that this program has just written, never with its code",
}


def forbidden(path):
    """What a file uses of the above, names resolved through its imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    full = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            full |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    names = set(imported_names(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            head, *rest = ast.unparse(node).split(".")
            names.add(".".join([full.get(head, head), *rest]))
            if isinstance(node, ast.Attribute) and node.attr in METHODS:
                yield node.attr
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in BUILTINS:
                yield node.id
        elif (
            isinstance(node, ast.keyword)
            and node.arg in ARGUMENTS
            and ast.unparse(node.value) != str(ARGUMENTS[node.arg])
        ):
            yield f"{node.arg}={ast.unparse(node.value)}"
    yield from (part for part in PARTS if any(name == part or name.startswith(f"{part}.") for name in names))


def test_the_source_uses_nothing_that_runs_code_from_a_file():
    found = {
        (str(path.relative_to(ROOT)), what)
        for folder in ALLOWED
        for path in (ROOT / folder).rglob("*.py")
        for what in forbidden(path)
    }
    assert found == EXCEPTIONS.keys()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("from torch import load as get; get('x')", "torch.load"),
        ("import torch as t; t.load('x')", "torch.load"),
        ("import torch.distributed.checkpoint as dcp", "torch.distributed.checkpoint"),
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("from yaml import UnsafeLoader", "yaml.UnsafeLoader"),
        ("np.load('x', allow_pickle=True)", "allow_pickle=True"),
        ("np.load('x', allow_pickle=flag)", "allow_pickle=flag"),
        ("load_dataset('x', trust_remote_code=True)", "trust_remote_code=True"),
        ("frame = pandas.read_pickle('x')", "read_pickle"),
        ("engine.load_checkpoint('x')", "load_checkpoint"),
        ("eval('x')", "eval"),
    ],
)
def test_what_the_test_of_the_source_finds(tmp_path, line, what):
    (tmp_path / "x.py").write_text(f"{line}\nmodel.eval()\nre.compile('x')\nnp.load('y', allow_pickle=False)\n")
    assert what in set(forbidden(tmp_path / "x.py"))


# -- files --------------------------------------------------------------------------------------------------------------


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def payloads(canary):
    """kind -> bytes that make the file `canary` when they are read by what must not read them."""
    torch_file, numpy_file = io.BytesIO(), io.BytesIO()
    torch.save(Canary(canary), torch_file)
    np.save(numpy_file, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    return {
        "pickle": pickle.dumps(Canary(canary)),
        "torch": torch_file.getvalue(),
        "numpy": numpy_file.getvalue(),
        "yaml": f"!!python/object/apply:os.mknod [{canary}]\n".encode(),
    }


KINDS = tuple(payloads(Path("x")))


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "what was read ran code"


def test_the_payloads_run_where_they_are_read_carelessly(tmp_path):
    path = tmp_path / "made"
    readers = {
        "pickle": pickle.loads,
        "torch": lambda content: torch.load(io.BytesIO(content), weights_only=False),
        "numpy": lambda content: np.load(io.BytesIO(content), allow_pickle=True),
        "yaml": yaml.unsafe_load,
    }
    for kind, payload in payloads(path).items():
        readers[kind](payload)
        assert path.exists(), kind
        path.unlink()


RECIPE = """
run: {{name: test, folder: {folder}/runs}}
model: {{vocab_size: 512, seq_len: 32, d_model: 32, n_layers: 1, n_heads: 2, d_ff: 64}}
optim: {{warmup_steps: 1}}
parallel: {{precision: fp32}}
train: {{steps: 2, global_batch_size: 2}}
log: {{every: 1}}
data:
  corpus: {folder}/corpus
  sources: [{{kind: text, paths: ["{folder}/texts/*.py"]}}, {{kind: jsonl, paths: ["{folder}/texts/*.jsonl"], field: text}}]
  tokenizer: {{vocab_size: 512, train_bytes: 131072}}
  on_bad: skip
  packing: best_fit
  clean: {{exact: true}}
  valid_fraction: 0.2
  workers: 1
checkpoint: {{every: 1}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus and a run of two steps on it, as the commands make them, and a copy of both to put back."""
    folder = tmp_path_factory.mktemp("safe") / "made"
    shutil.copytree(
        Path(sysconfig.get_path("stdlib"), "json"), folder / "texts", ignore=shutil.ignore_patterns("__*__")
    )
    lines = [json.dumps({"text": f"{n} is a number"}) for n in range(50)]
    (folder / "texts/lines.jsonl").write_text("\n".join([*lines, "{"]))
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    for command in ("prepare", "pretrain"):
        run([sys.executable, f"launcher/{command}.py", "--config", str(recipe)], folder / "log")
    shutil.copytree(folder, folder.with_name("backup"))
    return folder


class Alone:
    """What newest_good needs of a mesh, in one process."""

    rank, world_size = 0, 1

    def gather(self, value):
        return [value]

    def broadcast(self, value):
        return value

    def barrier(self):
        pass


def read_as_a_start_does(cfg, place, data, lease, command):
    """What a run reads before its first step, in place of pretrain.run."""
    Ledger(cfg.run_dir).events()
    reader = newest_good(cfg.run_dir / "checkpoints", Alone())
    for name in reader.manifest.shapes:
        reader.tensor(name)
    MetricsLog(cfg.run_dir, reader.manifest.step).close()
    data.dataset.read(np.arange(4))
    return 0


def all_commands(folder, name):
    """Every command over everything in the folder, in which the file `name` is another: (command, exit code)."""
    recipe, run_dir, corpus = str(folder / "recipe.yaml"), str(folder / "runs/test"), folder / "corpus"
    more = ["train.steps=4", "--allow-change", "train.steps"]
    yield "pretrain", pretrain.main(["--config", recipe, *more])
    yield "generate", generate.main([run_dir, "--prompt", "a", "--tokens", "1"])
    yield "audit", audit.main([run_dir, "--verify"])
    yield "audit", audit.main([run_dir, "--step", "1"])
    if name.parts[0] == "corpus":
        yield "prepare", prepare_command.main(["--config", recipe])
        (corpus / "manifest.json").unlink(missing_ok=True)  # so that it looks at what became of each unit
        if name.parts[1] in ("clean", "tokenizer"):  # and what it was made with
            shutil.rmtree(corpus / "records")
        yield "prepare", prepare_command.main(["--config", recipe])


# Which commands refuse, by the end of the file's name; what is not here is made again, set aside or not read.
REFUSED = {
    "corpus/bad.jsonl": {"prepare"},
    "corpus/clean/text/00000.verdict.npy": {"prepare"},
    "corpus/clean/jsonl/00000.verdict.npy": {"prepare"},
    "corpus/manifest.json": {"prepare", "pretrain", "audit"},
    "corpus/packing/best_fit-32.json": {"pretrain", "audit"},
    "corpus/plan.json": {"prepare"},
    "corpus/tokenizer/tokenizer.model": {"prepare", "pretrain"},
    "corpus/tokenizer/tokenizer_config.json": {"prepare", "pretrain"},
    "runs/test/config.yaml": {"pretrain", "audit"},
    "runs/test/ledger.jsonl": {"audit"},
    "runs/test/reads/start-0001-rank-00000.bin": {"audit"},
    "runs/test/tokenizer/tokenizer.model": {"generate", "audit"},
    "runs/test/tokenizer/tokenizer_config.json": {"generate", "audit"},
} | {
    f"corpus/{source}/{split}-00000-000.{suffix}": {"pretrain", "audit"} if split == "train" else {"pretrain"}
    for source in ("text", "jsonl") for split in ("train", "valid") for suffix in ("bin", "idx")
}  # fmt: skip


@pytest.mark.parametrize(
    "kind", [kind if kind == "pickle" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
@pytest.mark.fault(51)
def test_each_file_of_a_corpus_and_of_a_run(made, canary, monkeypatch, capsys, kind):
    """No command takes it for more than text or numbers, and each either does without it or says what is wrong."""
    monkeypatch.setattr(pretrain, "run", read_as_a_start_does)
    monkeypatch.setattr(lease, "STALE_S", 0.1)
    backup = made.with_name("backup")
    names = {
        path.relative_to(backup) for part in ("corpus", "runs") for path in (backup / part).rglob("*") if path.is_file()
    }
    assert {str(name) for name in names} > REFUSED.keys()
    for name in sorted(names):
        shutil.rmtree(made)
        shutil.copytree(backup, made)
        (made / name).write_bytes(payloads(canary)[kind])
        refused = set()
        for command, code in all_commands(made, name):
            said = capsys.readouterr().err
            assert not canary.exists(), f"{command} ran {name}"
            if code:
                assert code in (1, 2)
                assert said
                refused.add(command)
        assert refused == REFUSED.get(str(name), set()), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.fault(51)
def test_a_checkpoint_whose_hashes_are_right(made, canary, tmp_path, kind):
    """As somebody writes it who knows the format."""
    folder = tmp_path / "step-00000002"
    shutil.copytree(made.with_name("backup") / "runs/test/checkpoints" / folder.name, folder)
    shard, manifest = folder / "rank-00000.safetensors", json.loads((folder / "manifest.json").read_text())
    shard.write_bytes(payloads(canary)[kind])
    manifest["files"] = {shard.name: {"bytes": shard.stat().st_size, "xxh3": file_hash(shard)}}
    del manifest["xxh3"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "xxh3": body_hash(manifest)}))
    with pytest.raises(CheckpointError, match="rank-00000.safetensors: "):
        newest_good(tmp_path, Alone())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["00000.marks.npy", "00000.sketch.npy", "00000.verdict.npy"])
@pytest.mark.fault(51)
def test_the_marks_of_cleaning(canary, tmp_path, kind, file):
    cfg, prefix = CleanConfig(exact=True, near=NearConfig()), tmp_path / "clean/source/00000"
    prefix.parent.mkdir(parents=True)
    marker = Marker(prefix, cfg)
    marker.add(["a text", "another"], [mark(text, text.encode(), False, cfg) for text in ("a text", "another")])
    marker.close()
    (prefix.parent / file).write_bytes(payloads(canary)[kind])
    with pytest.raises(
        CleanError, match=f"{file} is damaged .*; delete {tmp_path}/clean, which launcher/prepare.py makes"
    ):
        verdicts(prefix) if "verdict" in file else decide([prefix], cfg)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json", "special_tokens_map.json",
                                  "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt"])  # fmt: skip
@pytest.mark.fault(51)
def test_a_hugging_face_tokenizer(canary, tmp_path, kind, file):
    backend = Backend(WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / file).write_bytes(payloads(canary)[kind])
    not_read = file in ("vocab.json", "merges.txt") or (file == "chat_template.jinja" and kind == "yaml")  # a text
    with nullcontext() if not_read else pytest.raises(TokenizerError, match=f"{tmp_path}/folder"):
        assert load_tokenizer(tmp_path / "folder").encode("a").tolist() == [0]


def data_files(folder, canary, kind):
    folder.mkdir()
    for suffix in ("txt", "jsonl", "parquet", "arrow", "pkl", "py"):
        (folder / f"file.{suffix}").write_bytes(payloads(canary)[kind])
    (folder / "saved").mkdir()
    (folder / "saved/state.json").write_bytes(payloads(canary)[kind])
    (folder / "scripted").mkdir()
    (folder / "scripted/scripted.py").write_text(f"import os\nos.mknod({str(canary)!r})\n")
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "source",
    [
        {"kind": "text", "paths": ["{}/file.txt"]},
        {"kind": "jsonl", "paths": ["{}/file.jsonl"], "field": "text"},
        {"kind": "parquet", "paths": ["{}/file.parquet"], "field": "text"},
        {"kind": "arrow", "paths": ["{}/file.arrow"], "field": "text"},
        {"kind": "dataset", "path": "{}", "field": "text"},
        {"kind": "dataset", "path": "{}/saved", "field": "text"},
        {"kind": "dataset", "path": "{}/scripted", "field": "text"},
        {"kind": "dataset", "path": "{}/scripted/scripted.py", "field": "text"},
    ],
    ids=str,
)
@pytest.mark.fault(51)
def test_the_text_of_a_corpus(canary, tmp_path, monkeypatch, kind, source):
    folder = str(data_files(tmp_path / "data", canary, kind))
    source = json.loads(json.dumps(source).replace("{}", folder))
    config = {"corpus": str(tmp_path / "corpus"), "sources": [source], "workers": 1, "valid_fraction": 0}
    cfg = DataConfig.model_validate(config)  # nothing is held out: the text names its folder, so its hash varies
    with pytest.raises(
        DataError, match=f"{folder}|vocab_size"
    ):  # YAML is a text like any other, too short for a vocabulary
        prepare(cfg)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dataset", "files"),
    [("json", "jsonl"), ("parquet", "parquet"), ("arrow", "arrow"), ("pandas", "pkl"), ("webdataset", "pkl"), ("{}", None),
     ("{}/saved", None), ("{}/scripted", None), ("{}/scripted/scripted.py", None)],
)  # fmt: skip
@pytest.mark.fault(51)
def test_the_text_of_a_stream(canary, tmp_path, kind, dataset, files):
    folder = data_files(tmp_path / "data", canary, kind)
    named = None if files is None else [str(folder / f"file.{files}")]
    cfg = StreamConfig(dataset=dataset.format(folder), data_files=named, tokenizer="-")
    with pytest.raises(DataError, match=str(folder)):
        list(Stream.open(cfg).texts(0, 0, 0))


# -- configs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mknod [{}]", "!!python/object/new:os.mknod [[{}]]",
                                 "!!python/name:os.mknod", "!!python/module:os"])  # fmt: skip
@pytest.mark.fault(51)
def test_tags_in_yaml_make_no_objects(canary, tmp_path, capsys, tag):
    tag = tag.format(canary)
    (tmp_path / "recipe.yaml").write_text(f"run:\n  name: {tag}\n")
    with pytest.raises(ConfigError, match="not YAML: could not determine a constructor for the tag"):
        load_config(str(tmp_path / "recipe.yaml"), [])
    with pytest.raises(ConfigError, match="not YAML: could not determine a constructor for the tag"):
        load_config("configs/embedded.yaml", [f"run.name={tag}"])
    (tmp_path / "config.yaml").write_text(f"run:\n  name: {tag}\n")
    with pytest.raises(RunDirError, match="config.yaml cannot be read: could not determine a constructor for the tag"):
        read_saved_config(tmp_path)


@pytest.mark.parametrize(
    "override",
    ["data.sources=[{kind: dataset, path: x, field: text, trust_remote_code: true}]",
     "data.stream={dataset: x, tokenizer: x, trust_remote_code: true}", "data.tokenizer.trust_remote_code=true",
     "model.trust_remote_code=true"],
)  # fmt: skip
@pytest.mark.fault(52)
def test_code_that_comes_with_data_cannot_be_asked_for(override):
    message = "trust_remote_code: no such key; code that comes with a dataset, a tokenizer or a model is never run"
    with pytest.raises(ConfigError, match=message):
        load_config("configs/embedded.yaml", [override])
