"""URLs: what of them, or of a driver's options, lets a reader into a store; and which package reads them.

Credentials are refused in a config, which is kept with every corpus, run and checkpoint, and left out of messages; they
come from the environment alone.
"""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel

ENVIRONMENT = (
    "give credentials through the environment (for S3: AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for "
    "Hugging Face: HF_TOKEN)"
)
INSTALL = {
    "s3": "'longhaul[s3]'",
    "s3a": "'longhaul[s3]'",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp requests",
    "https": "aiohttp requests",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
# in the name of a driver's option or of a parameter in a query
SECRET = re.compile(
    r"secret|token|passw|pwd|credential|signature|authorization|connection_string|key($|[^a-z]|id)|"
    r"(^|[^a-z])(sig|sas|auth|jwt)($|[^a-z])",
    re.IGNORECASE,
)
NO_SECRETS = ("anon", "google_default", "cloud", "browser", "cache")  # what gcsfs takes as token
# user:password@, also of a password with a slash in it; of a web address any user, as a token may stand for one
_PASSWORD = r"(?<=://)[^\s/?#@]*:(?!\d*(?:[/?#]|$))[^\s@]*@"
_LOGIN = re.compile(rf"{_PASSWORD}|https?://[^\s/?#]*@")


def secret_in(url: str) -> str:
    """What a URL has that lets its reader in, in words; empty for nothing, and for what is no URL."""
    if "://" not in url:
        return ""
    plain = unquote(url)
    if _LOGIN.search(url) or _LOGIN.search(plain):
        return "a user or password in it"
    names = [name for name in re.findall(r"[?&;#]([^=&;#?/]+)=", plain) if SECRET.search(name)]
    return f"{', '.join(names)} in its query" if names else ""


def secret_options(options: dict[str, Any]) -> list[str]:
    """The options that hold a credential by their names, a.b for b of a."""
    harmless = (None, True, False, *NO_SECRETS)
    return sorted(key for key, value in leaves(options) if SECRET.search(key) and value not in harmless)


def missing_driver(url: str, error: ImportError) -> str:
    """What to say where the package that reads such URLs is not there."""
    protocol = url.partition("://")[0]
    install = INSTALL.get(protocol, "the package that it names")
    return f"the driver for {protocol}:// is not installed ({error}); install it with: pip install {install}"


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(a.0.b, value) of all that is neither mapping nor list in what a config is made of."""
    value = value.model_dump() if isinstance(value, BaseModel) else value
    if isinstance(value, dict | list | tuple):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def redact(text: str, secrets: list[str] | None = None) -> str:
    """The text with *** for users, passwords and queries of the URLs in it, and for the secrets."""
    for secret in secrets or ():
        text = text.replace(secret, "***")
    text = re.sub(rf"(?<=://)[^/\s'\"]+(?:@|%40)|{_PASSWORD}", "***@", text)
    return re.sub(r"[?#][^\s'\")>]*=[^\s'\")>]*", "?***", text)


def secrets_of(url: str) -> list[str]:
    """What must not be shown of a URL, as written and decoded; the longest first, as one may contain another."""
    parts = urlsplit(url)
    found = {parts.username, parts.password, *(pair.partition("=")[2] for pair in parts.query.split("&"))}
    written = [text for text in found if text]
    return sorted(
        {form for text in written for form in (text, unquote(text)) if len(form) > 3}, key=lambda t: (-len(t), t)
    )
