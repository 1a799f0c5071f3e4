"""What program this machine would run: its code, by hash, and the libraries, by version. Loads none of them."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import xxhash

ROOT = Path(__file__).parents[1]
PACKAGES = ("launcher", "model", "data", "parallel")
LIBRARIES = ("torch", "deepspeed", "numpy", "transformers", "sentencepiece", "safetensors")


def program() -> dict[str, str]:
    """What must be the same on all machines, by a name for people."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).glob("*.py"))]
    code = {f"{path.relative_to(ROOT)}": xxhash.xxh3_64_hexdigest(path.read_bytes()) for path in files}
    return {**code, **{name: _version(name) for name in LIBRARIES}, "Python": platform.python_version()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
