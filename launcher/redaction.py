"""Secrets of the environment stay out of what a run writes: its logs, its ledger, what it says when it breaks.

None is written on purpose; the error of a library may quote one, such as the URL of a proxy with its password.
"""

import functools
import logging
import os
import re
from urllib.parse import unquote

from data.urls import SECRET

FOLDERS = ("PWD", "OLDPWD")  # the shell's, not passwords
SHORTEST = 8  # characters of a variable's value; a shorter one is a flag or a number, and stands in many a line
_PASSWORD = re.compile(r"://[^\s/?#@:]*:([^\s@]+)@")


@functools.cache
def environment_secrets() -> tuple[str, ...]:
    """Values of variables that are called a key, token, password or the like, and passwords in URLs; the longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if SECRET.search(name) and name not in FOLDERS and len(value) >= SHORTEST
    }
    for value in os.environ.values():
        found |= {form for password in _PASSWORD.findall(value) for form in (password, unquote(password))}
    return tuple(sorted(found, key=lambda secret: (-len(secret), secret)))


def hide(text: str) -> str:
    """The text with *** for the secrets of the environment."""
    for secret in environment_secrets():
        text = text.replace(secret, "***")
    return text


class HidingFormatter(logging.Formatter):
    """Formats records, tracebacks included, without the secrets of the environment."""

    def format(self, record: logging.LogRecord) -> str:
        return hide(super().format(record))
