"""A proxy in front of the real S3 server that makes its faults: errors, silence, cut connections, refusals.

It speaks enough HTTP/1.1 for S3 clients, one request after another on each connection, and hands everything on as it
came, so that signatures stay right.
"""

import asyncio
import random
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

SLOW_DOWN = (503, "SlowDown", "Please reduce your request rate.")
INTERNAL_ERROR = (500, "InternalError", "We encountered an internal error. Please try again.")
EXPIRED = (400, "ExpiredToken", "The provided token has expired.")
NO_BUCKET = (404, "NoSuchBucket", "The specified bucket does not exist")
NO_KEY = (404, "NoSuchKey", "The specified key does not exist.")
DENIED = (403, "AccessDenied", "Access Denied")


@dataclass
class Faults:
    """What the proxy does to requests that match ``only``; shares lie between 0 and 1."""

    errors: float = 0.0
    """Share answered with 500 and 503 in turn, without reaching the server."""
    cuts: float = 0.0
    """Share of answers whose connection ends in the middle of the body."""
    silence: float = 0.0
    """Share that is never answered."""
    refusal: tuple[int, str, str] | None = None
    """Status, code and message that answer everything."""
    only: str = ""
    """Regular expression, of such as ``GET /bucket/key?query``."""


class FaultyProxy:
    """A running proxy; ``faults`` may be set anew at any time."""

    def __init__(self, upstream: str, seed: int = 0) -> None:
        target = urlsplit(upstream)
        self._upstream = (target.hostname or "127.0.0.1", target.port or 80)
        self._random = random.Random(seed)
        self.faults = Faults()
        self.counts: Counter[str] = Counter()
        """Requests by what became of them: passed, error, cut, silence, refusal."""
        self.endpoint = ""

    async def serve(self, connection: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        """One client connection."""
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._exchange(connection, answers):
                pass
        answers.close()

    async def _exchange(self, connection: asyncio.StreamReader, answers: asyncio.StreamWriter) -> bool:
        """One request and its answer; False where the connection ends with it."""
        head = await connection.readuntil(b"\r\n\r\n")
        if re.search(rb"(?i)\r\nexpect: *100-continue", head):
            answers.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = re.sub(rb"(?i)\r\nexpect:[^\r]*", b"", head)
        body = await connection.readexactly(_length(head))
        head = re.sub(rb"^(\w+) http://[^/ ]+", rb"\1 ", head)  # of a client for which this is its proxy
        method, target = head.split(b" ", 2)[:2]
        fault = self._draw(f"{method.decode()} {target.decode()}")
        if fault == "cut" and method != b"GET":  # its answer has no body
            fault = "passed"
        self.counts[fault] += 1
        if fault == "silence":
            await connection.read(1)  # until the client has had enough
            return False
        if fault in ("error", "refusal"):
            status, code, message = self.faults.refusal or (INTERNAL_ERROR, SLOW_DOWN)[self.counts["error"] % 2]
            answers.write(_refused(status, code, message, method == b"HEAD"))
            await answers.drain()
            return True
        answer = await self._ask(head, body)
        if fault == "cut":
            answers.write(answer[: (answer.find(b"\r\n\r\n") + 4 + len(answer)) // 2])
            await answers.drain()
            return False
        answers.write(answer)
        await answers.drain()
        return True

    def _draw(self, request: str) -> str:
        if not re.search(self.faults.only, request):
            return "passed"
        if self.faults.refusal:
            return "refusal"
        place = self._random.random()
        for kind, share in (("error", self.faults.errors), ("cut", self.faults.cuts), ("silence", self.faults.silence)):
            if place < share:
                return kind
            place -= share
        return "passed"

    async def _ask(self, head: bytes, body: bytes) -> bytes:
        """The server's whole answer, framed for a connection that stays open."""
        reader, writer = await asyncio.open_connection(*self._upstream)
        head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)
        writer.write(head[:-2] + b"Connection: close\r\n\r\n" + body)
        answer = await reader.read()
        writer.close()
        answered, _, content = answer.partition(b"\r\n\r\n")
        answered = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", answered)
        if re.search(rb"(?i)\r\ntransfer-encoding: *chunked", answered):
            answered = re.sub(rb"(?i)\r\ntransfer-encoding:[^\r]*", b"", answered)
            content = _unchunked(content)
            answered += f"\r\nContent-Length: {len(content)}".encode()
        return answered + b"\r\n\r\n" + content


def _length(head: bytes) -> int:
    found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return int(found.group(1)) if found else 0


def _unchunked(content: bytes) -> bytes:
    whole = b""
    while content:
        size, _, rest = content.partition(b"\r\n")
        number = int(size.split(b";")[0] or b"0", 16)
        whole, content = whole + rest[:number], rest[number + 2 :]
        if number == 0:
            break
    return whole


def _refused(status: int, code: str, message: str, without_body: bool) -> bytes:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + (b"" if without_body else body)


@contextmanager
def running_proxy(upstream: str, seed: int = 0) -> Iterator[FaultyProxy]:
    """A proxy in front of the server at ``upstream``, on a port of its own."""
    proxy, loop, ready = FaultyProxy(upstream, seed), asyncio.new_event_loop(), threading.Event()

    async def start() -> None:
        server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=2**20)
        proxy.endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()

    def work() -> None:
        loop.create_task(start())
        loop.run_forever()

    thread = threading.Thread(target=work, name="faulty-proxy", daemon=True)
    thread.start()
    ready.wait()
    try:
        yield proxy
    finally:
        asyncio.run_coroutine_threadsafe(_end_all(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


async def _end_all() -> None:
    """Cancel every exchange that still goes on."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
