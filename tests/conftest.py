"""What all tests share: one thread a process, the folders that tests' helpers are imported from, a small real corpus."""

import os
import shutil
import signal
import sys
import sysconfig
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A job started in the background ignores Ctrl-C and hands that down; the tests that send one need it to arrive.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = [str(Path(__file__).parent / folder) for folder in ("parallel", "launcher", "faults", "cluster")]

pytest_plugins = ["table"]

PACKAGES = ("json", "email", "asyncio")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared corpus of Python's json, email and asyncio packages: 512 pieces, some 500,000 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = folder / "texts"
    texts.mkdir()
    for package in PACKAGES:
        for path in sorted(Path(sysconfig.get_path("stdlib"), package).glob("*.py")):
            shutil.copy(path, texts / f"{package}-{path.name}")
    return _prepared(folder, [{"kind": "text", "paths": [str(texts / "*.py")]}])


@pytest.fixture(scope="session")
def mixture(tmp_path_factory):
    """The same texts as three sources named json, email and asyncio."""
    library = sysconfig.get_path("stdlib")
    sources = [{"kind": "text", "name": name, "paths": [f"{library}/{name}/*.py"]} for name in PACKAGES]
    return _prepared(tmp_path_factory.mktemp("mixture"), sources, valid_fraction=0.25)


def _prepared(folder, sources, valid_fraction=0.1):
    from data.config import DataConfig
    from data.prepare import prepare

    prepare(
        DataConfig.model_validate(
            {
                "corpus": str(folder / "prepared"),
                "sources": sources,
                "tokenizer": {"vocab_size": 512, "train_bytes": 2**20},
                "valid_fraction": valid_fraction,
                "shard_bytes": 300_000,
                "workers": 1,
            }
        )
    )
    return folder / "prepared"
