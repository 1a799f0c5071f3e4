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
sys.path[:0] = [str(Path(__file__).parent / "parallel"), str(Path(__file__).parent / "launcher")]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A prepared corpus of Python's json, email and asyncio packages: 512 pieces, some 500,000 tokens."""
    from data.config import DataConfig
    from data.prepare import prepare

    folder = tmp_path_factory.mktemp("corpus")
    texts = folder / "texts"
    texts.mkdir()
    for package in ("json", "email", "asyncio"):
        for path in sorted(Path(sysconfig.get_path("stdlib"), package).glob("*.py")):
            shutil.copy(path, texts / f"{package}-{path.name}")
    prepare(
        DataConfig.model_validate(
            {
                "corpus": str(folder / "prepared"),
                "source": {"kind": "text", "paths": [str(texts / "*.py")]},
                "tokenizer": {"vocab_size": 512, "train_bytes": 2**20},
                "valid_fraction": 0.1,
                "shard_bytes": 300_000,
                "workers": 1,
            }
        )
    )
    return folder / "prepared"
