"""What the tests of faults share: an undisturbed run, a recipe, the right to mount."""

import subprocess

import pytest

from runs import write_recipe
from straight import Straight


@pytest.fixture(scope="session")
def straight(tmp_path_factory, corpus):
    return Straight(tmp_path_factory.mktemp("straight"), corpus)


@pytest.fixture
def recipe(tmp_path, corpus):
    return write_recipe(tmp_path, corpus)


@pytest.fixture
def may_mount(tmp_path):
    """Skips where the kernel does not let this process mount."""
    (tmp_path / "probe").mkdir()
    asked = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", tmp_path / "probe"], capture_output=True)
    if asked.returncode:
        pytest.skip(f"needs the right to mount: {asked.stderr.decode().strip()}")
