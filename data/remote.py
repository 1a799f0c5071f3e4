"""Files at a URL, read through fsspec with patience: every read has an end, and what fails for a while is tried again.

A file is read in blocks, each a request of its own, so that an interruption costs a block and not the file. Drivers try
again by themselves as a rule; that is turned off where it can be (s3fs), so that tries are counted and told in one place.
Messages and log lines name the URL without user, password and query, in which signed URLs have their signature.
"""

import logging
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import IO, Any, NoReturn, TypeVar
from urllib.parse import quote

import fsspec
import fsspec.asyn
import xxhash

from data.cache import CacheConfig, StoreError
from data.urls import missing_driver, redact, secrets_of

log = logging.getLogger(__name__)

T = TypeVar("T")

BLOCK = 8 * 2**20  # bytes a request; at 100 MB/s 0.08 s, beside which the time to its first byte is small
FEW = 3  # tries of what is hardly going to change: a missing object, or one with other content
MAX_PAUSE_S = 30.0  # between tries
HTTP_RETRIED = (404, 408, 416, 425, 429)  # of the 4xx: the others say that the request is refused, now and later


class MissingError(StoreError):
    """A file that is not in the store."""


class DifferentError(StoreError):
    """A file whose content is not what the manifest says, read several times."""


class Stopped(Exception):
    """The store was closed in the middle of a read."""


class Tries:
    """Counts what failed since something last arrived, and waits between tries; ends in an error when it is enough.

    on_retry: called before each further try.    stop: set by another thread to end the waiting (raises Stopped).
    """

    def __init__(
        self, cfg: CacheConfig, *, retries: int | None = None, on_retry: Callable[[], None] = lambda: None,
        stop: threading.Event | None = None,
    ) -> None:  # fmt: skip
        self._cfg, self._on_retry, self.stop = cfg, on_retry, stop or threading.Event()
        self._retries = cfg.retries if retries is None else retries
        # seeded, and otherwise for each process, so that ranks that failed together do not come back together
        self._random = random.Random(f"{socket.gethostname()} {os.getpid()} {threading.current_thread().name}")
        self._found: Counter[str] = Counter()  # what came instead of the right content
        self.progress()

    def progress(self) -> None:
        """Something arrived: an outage begins anew from here."""
        self._failed, self._missing, self._since = 0, 0, time.monotonic()

    def failed(self, url: str, what: str) -> None:
        """Count a failure and wait. Raises StoreError when there were too many, or for too long."""
        self._failed += 1
        for_s = time.monotonic() - self._since
        if self._failed > self._retries or for_s > self._cfg.outage_s:
            raise StoreError(
                f"{url} could not be read: {self._count(self._failed)} in {for_s:.1f} s, the last: {what}. Check the store "
                "and the network, then start again; a longer outage is waited for with larger data.cache.retries "
                f"({self._cfg.retries}) and data.cache.outage_s ({self._cfg.outage_s:g})"
            )
        self._again(url, what, self._failed)

    def missing(self, url: str, what: str) -> None:
        """Count a file that is not there, which a store may say of a new one, and wait. Raises MissingError soon."""
        self._missing += 1
        if self._missing > min(FEW - 1, self._retries):
            raise MissingError(
                f"{url} does not exist ({self._count(self._missing)}, the last: {what}); it was removed or renamed, or the "
                "location is wrong: restore it, or correct data.corpus"
            )
        self._again(url, what, self._missing)

    def differs(self, url: str, found: str, expected: str) -> None:
        """Count wrong content, from a fault on the way or for good, and wait. Raises DifferentError soon."""
        self._found[found] += 1
        if self._found[found] > min(FEW - 1, self._retries) or self._found.total() > self._retries:
            raise DifferentError(
                f"{url} has {found}, the manifest says {expected} ({self._count(self._found.total())}); it was rewritten "
                "or damaged after the manifest was made: restore it, or copy the whole corpus there again"
            )
        self._again(url, f"{found}, expected {expected}", self._found.total())

    def refused(self, url: str, what: str) -> NoReturn:
        """What another try will not change. Raises StoreError."""
        raise StoreError(
            f"{url} may not or cannot be read: {what}. Give this node credentials that may read it through the environment "
            "(for S3: AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY); for a public bucket, or a store "
            "elsewhere, set data.cache.options, such as {anon: true} or {endpoint_url: ...}"
        )

    def _again(self, url: str, what: str, count: int) -> None:
        pause = min(self._cfg.backoff_s * 2 ** min(count - 1, 16), MAX_PAUSE_S) * self._random.uniform(0.5, 1)
        log.warning("%s: try %d failed (%s); again in %.1f s", url, count, what, pause)
        if self.stop.wait(pause):
            raise Stopped
        self._on_retry()

    @staticmethod
    def _count(tries: int) -> str:
        return f"{tries} {'try' if tries == 1 else 'tries'}"


class Remote:
    """The files below a URL. Several threads may use it; a process needs one of its own.

    Raises StoreError for a kind of URL that is not known, or whose driver is missing or refuses data.cache.options.
    """

    def __init__(self, location: str, cfg: CacheConfig) -> None:
        self._cfg = cfg
        self._secrets = secrets_of(location)
        self._web = location.startswith(("http://", "https://"))
        base, _, query = location.partition("?") if self._web else (location, "", "")
        self._base, self._query = base.rstrip("/"), f"?{query}" if query else ""
        self.location = self.redact(location)
        self._fs = self._connect(location)

    def url(self, name: str) -> str:
        """For messages."""
        return self.redact(f"{self._base}/{name}")

    def redact(self, text: str) -> str:
        """The text without what lets its reader into the store."""
        return redact(text, self._secrets)

    def read(self, name: str, tries: Tries) -> bytes:
        """A whole file. Raises StoreError."""
        return self._patiently(name, None, None, tries)

    def copy(self, name: str, size: int, xxh3: str, stream: IO[bytes], tries: Tries) -> None:
        """Write a file to stream, which ends up with just it. xxh3: xxh3-64 of the content, in hexadecimal.

        Raises StoreError; what writing raises goes through.
        """
        while True:
            stream.seek(0)
            stream.truncate()
            found_size, found = self._pass(name, size, stream, tries)
            if (found_size, found) == (size, xxh3):
                return
            if found_size > size:
                wrong = f"more than {size} bytes"
            else:
                wrong = f"{found_size} bytes" if found_size < size else f"xxh3-64 {found}"
            tries.differs(self.url(name), wrong, f"{size} bytes of xxh3-64 {xxh3}")

    def _pass(self, name: str, size: int, stream: IO[bytes], tries: Tries) -> tuple[int, str]:
        """Read a file from its beginning. Returns how much there is, as far as it matters, and its hash."""
        digest, done = xxhash.xxh3_64(), 0
        while True:
            end = done + BLOCK
            if end >= size:
                end = size + 1  # a byte more than there should be: shows an object that has grown
            block = self._patiently(name, done, end, tries)
            tries.progress()
            stream.write(block)
            digest.update(block)
            asked, done = end - done, done + len(block)
            if done >= size or len(block) < asked:  # a web server without ranges sends everything at once
                return done, digest.hexdigest()

    def _patiently(self, name: str, start: int | None, end: int | None, tries: Tries) -> bytes:
        path = self._path(name)
        while True:
            if tries.stop.is_set():
                raise Stopped
            try:
                return self._read(path, start, end)
            except Exception as caught:  # drivers raise what they like; each ends in another try or a StoreError
                error = caught
            # out here, or a traceback would show what was caught along with it, credentials and all
            if start is not None and _beyond_end(error):
                return b""
            self._failed(name, error, tries)

    def _failed(self, name: str, error: Exception, tries: Tries) -> None:
        what = self._describe(error)
        if isinstance(error, FileNotFoundError):
            tries.missing(self.url(name), what)
        elif _refuses(error):
            tries.refused(self.url(name), what)
        else:
            tries.failed(self.url(name), what)

    def _read(self, path: str, start: int | None, end: int | None) -> bytes:
        timeout_s = self._cfg.timeout_s
        if getattr(self._fs, "async_impl", False):  # a request in a coroutine can be cancelled
            cat = self._fs._cat_file
            return fsspec.asyn.sync(self._fs.loop, cat, path, start=start, end=end, timeout=timeout_s)
        return _within(timeout_s, lambda: self._fs.cat_file(path, start=start, end=end))

    def _path(self, name: str) -> str:
        url = f"{self._base}/{quote(name) if self._web else name}{self._query}"
        return str(self._fs._strip_protocol(url))

    def _describe(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError):  # fsspec's too; they say nothing themselves
            return f"nothing, or too little, came within data.cache.timeout_s={self._cfg.timeout_s:g}"
        text = self.redact(" ".join(f"{type(error).__name__}: {error}".split()))  # before a secret is cut in two
        return text if len(text) <= 300 else text[:300] + " ..."

    def _connect(self, location: str) -> Any:
        protocol = location.partition("://")[0]
        options = dict(self._cfg.options)
        if protocol in ("s3", "s3a"):
            ours: dict[str, Any] = {"connect_timeout": self._cfg.timeout_s, "read_timeout": self._cfg.timeout_s}
            ours |= {"retries": {"total_max_attempts": 1}}
            options["config_kwargs"] = ours | options.get("config_kwargs", {})
        try:
            fs, _ = fsspec.core.url_to_fs(location, skip_instance_cache=True, **options)
        except ImportError as error:
            raise StoreError(f"{self.location}: {self.redact(missing_driver(location, error))}") from None
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise StoreError(
                f"{self.location} cannot be opened ({self._describe(error)}); expected a folder, or a URL such as "
                "s3://bucket/corpus, gs://, https://, hf:// or file://, and data.cache.options that its driver knows: "
                f"{sorted(self._cfg.options)} were given"
            ) from None
        if protocol in ("s3", "s3a"):
            fs.retries = 1
        return fs


def _refuses(error: BaseException) -> bool:
    """The store, or its driver, will say the same again."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in HTTP_RETRIED
    refusals = (PermissionError, NotImplementedError, TypeError, ImportError, IsADirectoryError)
    return isinstance(error, refusals) or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")


def _beyond_end(error: BaseException) -> bool:
    """A range was asked for that begins behind the last byte."""
    return getattr(error, "status", None) == 416 or "range is not satisfiable" in str(error).lower()


def _within(timeout_s: float, read: Callable[[], T]) -> T:
    """What read returns or raises; TimeoutError when it takes too long. It is then left to itself, in its thread."""
    done: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            done.append((read(), None))
        except BaseException as error:  # handed over to the caller
            done.append((None, error))

    thread = threading.Thread(target=run, name="data-read", daemon=True)  # the end of the process does not wait for it
    thread.start()
    thread.join(timeout_s)
    if not done:
        raise TimeoutError
    value, error = done[0]
    if error is not None:
        raise error
    return value  # type: ignore[return-value]
