"""Secrets of the environment are in nothing that a run writes or says, also when it breaks."""

import json
import logging
import sys

import pytest

from launcher.redaction import HidingFormatter, environment_secrets, hide
from runs import PRETRAIN, SCRIPTS, deepspeed, run, write_recipe

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "AKIACANARY0000000001",
    "AWS_SECRET_ACCESS_KEY": "canary/0002+secret",
    "HF_TOKEN": "hf_canary0003",
    "WANDB_API_KEY": "canary0004wandb",
    "DATABASE_URL": "postgres://user:canary0005@host/db",
    "HTTPS_PROXY": "http://user:canary%200006@127.0.0.1:9",
}
CANARIES = [
    "AKIACANARY0000000001",
    "canary/0002",
    "hf_canary",
    "canary0004",
    "canary0005",
    "canary%200006",
    "canary 0006",
]
VISIBLE = "visible0007"  # a prompt, so in config, manifests and TensorBoard: the search finds what is there
ARGUMENTS = ["train.steps=2", "optim.warmup_steps=1", "eval.every=1", f"eval.prompts=[{VISIBLE}]", "checkpoint.every=1"]
# with HF_TOKEN where the ledger cuts the message off: 500 characters
QUOTING = (
    "RuntimeError('no way to ' + os.environ['DATABASE_URL'] + 430 * '.' + os.environ['HF_TOKEN'] + str(os.environ))"
)


def assert_nowhere(folder, output):
    """No file below the folder holds a canary, nor does the output."""
    texts = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()} | {"output": output.encode()}
    for canary in CANARIES:
        found = [name for name, content in texts.items() if canary.encode() in content]
        assert not found, f"{canary} is in {found}"
    return [name for name, content in texts.items() if VISIBLE.encode() in content]


@pytest.mark.fault(53)
def test_a_run_to_its_end(corpus, tmp_path):
    recipe = write_recipe(tmp_path, corpus)
    text = run([sys.executable, PRETRAIN, "--config", str(recipe), *ARGUMENTS], tmp_path / "log", **ENVIRONMENT)
    visible = assert_nowhere(tmp_path / "runs", text)
    for part in ("config.yaml", "manifest.json", "tfevents", "rank-00000.log", "output"):
        assert any(part in name for name in visible), part


@pytest.mark.slow
def test_a_run_under_deepspeed(corpus, tmp_path):
    recipe = write_recipe(tmp_path, corpus)
    text = run(deepspeed(2, "--config", recipe, *ARGUMENTS), tmp_path / "log", **ENVIRONMENT)
    assert assert_nowhere(tmp_path / "runs", text)


@pytest.mark.parametrize(
    ("where", "code"),
    [("train_step", 1), ("build_mesh", 1), ("check", 1), ("check", 2)],
)
@pytest.mark.fault(53)
def test_an_error_that_quotes_them(corpus, tmp_path, where, code):
    """Raised in a step, before the logs begin, before anything begins, and as a refusal."""
    recipe = write_recipe(tmp_path, corpus)
    error = QUOTING if code == 1 else QUOTING.replace("RuntimeError", "p.DataError")
    program = (
        "import os, sys; import launcher.pretrain as p\n"
        f"def broken(*_): raise {error} from ValueError(os.environ['DATABASE_URL'])\n"
        f"p.{where} = broken\n"
        f"p.leave(p.main(['--config', {str(recipe)!r}, *{ARGUMENTS!r}]))\n"
    )
    text = run([str(SCRIPTS / "python"), "-c", program], tmp_path / "log", code=code, **ENVIRONMENT)
    assert "no way to" in text
    assert "***" in text
    assert_nowhere(tmp_path, text)
    if where == "train_step":
        events = [json.loads(line) for line in (tmp_path / "runs/test/ledger.jsonl").read_text().splitlines()]
        assert "no way to" in events[-1]["error"]
        (log,) = (tmp_path / "runs/test/logs").iterdir()
        assert "Traceback" in log.read_text()


@pytest.fixture
def environment(monkeypatch):
    for name, value in {**ENVIRONMENT, "TOKENIZERS_PARALLELISM": "false", "KEY": "short"}.items():
        monkeypatch.setenv(name, value)
    environment_secrets.cache_clear()
    yield
    environment_secrets.cache_clear()


def test_what_is_hidden_and_what_is_not(environment):
    line = "false short user postgres://user:canary0005@host/db canary 0006 canary%200006 hf_canary0003"
    assert hide(line) == "false short user postgres://user:***@host/db *** *** ***"


def test_the_current_folder_is_no_password(monkeypatch):
    """A shell keeps it in PWD, so that every path below it was shown as ***."""
    for name in ("PWD", "OLDPWD"):
        monkeypatch.setenv(name, f"/home/ada/{name.lower()}")
    monkeypatch.setenv("DB_PWD", "canary0008")
    environment_secrets.cache_clear()
    assert hide("/home/ada/pwd/runs/x /home/ada/oldpwd canary0008") == "/home/ada/pwd/runs/x /home/ada/oldpwd ***"
    environment_secrets.cache_clear()


def test_tracebacks_are_formatted_without_them(environment):
    try:
        raise RuntimeError("hf_canary0003")
    except RuntimeError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "%s", ("canary0004wandb",), sys.exc_info())
    text = HidingFormatter().format(record)
    assert "canary0" not in text
    assert text.startswith("***\nTraceback")
