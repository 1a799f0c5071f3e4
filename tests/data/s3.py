"""A real S3 server (moto) on the loopback, and a proxy in front of it that injects faults and counts requests.

server = Server(); proxy = Proxy(server.port)
proxy.fault("train-00001.bin", Fault.SLOW_DOWN, times=3)     # the next 3 requests for keys that end so
proxy.stop(); proxy.start()                                  # the store is gone, and back at the same address
"""

import http.client
import os
import socket
import struct
import threading
from collections import Counter
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "corpora"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
ALWAYS = 10**9


class Fault(Enum):
    SLOW_DOWN = "503 as S3 says it"
    ERROR = "another status, with S3's code: argument (status, code)"
    MISSING = "404 NoSuchKey"
    TRUNCATED = "the body ends after half of the bytes announced"
    SHORT = "half of the body, announced as if it were all"
    RESET = "the connection is reset after half of the body"
    TRICKLE = "the body comes slowly: argument bytes a second"
    STALL = "half of the body, then nothing for ever"
    CORRUPT = "a bit of the body is turned over"


class Request(NamedTuple):
    key: str
    start: int  # of the range asked for, 0 if none was


class Server:
    """moto's S3, with one bucket."""

    def __init__(self) -> None:
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        _, self.port = self._moto.get_host_and_port()
        self.client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        )
        self.client.create_bucket(Bucket=BUCKET)

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=body, ACL="public-read")

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=key)

    def stop(self) -> None:
        self._moto.stop()


class Proxy:
    """Passes GET and HEAD on to a server, as it says so, on a port that stays the same over stop() and start()."""

    def __init__(self, server_port: int) -> None:
        self.requests: list[Request] = []
        self._faults: list[tuple[str, Fault, object, list[int]]] = []
        self._lock = threading.Lock()
        self._released = threading.Event()  # ends what stalls
        self._connections: set[socket.socket] = set()
        self._server_port, self.port = server_port, 0
        self._listener: ThreadingHTTPServer | None = None
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fault(self, suffix: str, fault: Fault, argument: object = None, times: int = ALWAYS) -> None:
        """For the next requests whose key ends with suffix; faults of the same suffix come one after the other."""
        with self._lock:
            self._faults.append((suffix, fault, argument, [times]))

    def heal(self) -> None:
        """No more faults."""
        with self._lock:
            self._faults.clear()

    def counts(self) -> Counter[str]:
        """Requests by key."""
        with self._lock:
            return Counter(request.key for request in self.requests)

    def passes(self) -> Counter[str]:
        """How often each key was read from its beginning."""
        with self._lock:
            return Counter(request.key for request in self.requests if request.start == 0)

    def start(self) -> None:
        self._released.clear()
        self._listener = _Listener(("127.0.0.1", self.port), _handler(self))
        self.port = self._listener.server_address[1]
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections and cut those that there are."""
        if self._listener is None:
            return
        self._listener.shutdown()
        self._listener.server_close()
        self._listener = None
        self._released.set()
        for connection in list(self._connections):
            _reset(connection)

    def take(self, key: str, start: int) -> tuple[Fault | None, object]:
        """Note a request, and say what is to go wrong with it."""
        with self._lock:
            self.requests.append(Request(key, start))
            for suffix, fault, argument, left in self._faults:
                if key.endswith(suffix) and left[0] > 0:
                    left[0] -= 1
                    return fault, argument
        return None, None

    def fetch(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self._server_port, timeout=60)
        try:
            upstream.request(method, path, headers=headers)
            answer = upstream.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            upstream.close()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """A client that went away is nothing to be told."""


def _reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
        connection.close()
    except OSError:
        pass  # gone already


def _error(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code} injected</Message></Error>'.encode()
    return status, {"Content-Type": "application/xml", "Content-Length": str(len(body))}, body


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self):
            super().setup()
            proxy._connections.add(self.connection)

        def finish(self):
            proxy._connections.discard(self.connection)
            super().finish()

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self._answer(*proxy.fetch("HEAD", self.path, self._headers()))

        def do_GET(self):
            key = self.path.partition("?")[0].removeprefix(f"/{BUCKET}/")
            start = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0]
            fault, argument = proxy.take(key, int(start or 0))
            if fault is Fault.SLOW_DOWN:
                return self._answer(*_error(503, "SlowDown"))
            if fault is Fault.MISSING:
                return self._answer(*_error(404, "NoSuchKey"))
            if fault is Fault.ERROR:
                return self._answer(*_error(*argument))
            status, headers, body = proxy.fetch("GET", self.path, self._headers())
            if fault is None:
                return self._answer(status, headers, body)
            return self._spoil(fault, argument, status, headers, body)

        def _spoil(self, fault, argument, status, headers, body):
            half = body[: len(body) // 2]
            if fault in (Fault.CORRUPT, Fault.SHORT):  # as from the many stores that send no checksums along
                headers = {name: value for name, value in headers.items() if "checksum" not in name.lower()}
            if fault is Fault.CORRUPT:
                return self._answer(status, headers, body[:-1] + bytes([body[-1] ^ 1]))
            if fault is Fault.SHORT:
                return self._answer(status, headers, half)
            if fault is Fault.TRICKLE:
                return self._trickle(argument, status, headers, body)
            self._head(status, headers, len(body))
            self.wfile.write(half)
            self.wfile.flush()
            if fault is Fault.STALL:
                proxy._released.wait()
            if fault is Fault.RESET:
                _reset(self.connection)
            self.close_connection = True
            return None

        def _trickle(self, bytes_per_s, status, headers, body):
            self._head(status, headers, len(body))
            step = max(bytes_per_s // 20, 1)
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                if proxy._released.wait(0.05):
                    return

        def _headers(self):
            return {name: value for name, value in self.headers.items() if name.lower() != "connection"}

        def _head(self, status, headers, length):
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("connection", "content-length", "date", "server", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()

        def _answer(self, status, headers, body):
            length = int(headers.get("Content-Length", 0)) if self.command == "HEAD" else len(body)
            self._head(status, headers, length)
            self.wfile.write(body)

    return Handler


def use_credentials() -> None:
    """For a process of its own; a test's own process sets them through monkeypatch."""
    os.environ.update(CREDENTIALS)
