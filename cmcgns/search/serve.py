"""A web page on top of an index: drop a film or type a text, see the nearest cases.

What comes from a browser is guarded: the Host header (a page elsewhere may rebind its name to this address), a header of our own
on each query (a form of another page cannot set it), the size of films, the token, and one plain message for each error.
"""

import hmac
import ipaddress
import logging
import os
import re
import secrets
import socket
import threading
import time
import traceback
from importlib import resources
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cmcgns.errors import UserError
from cmcgns.search.answer import answer_film, answer_text
from cmcgns.search.config import LOOPBACK, TOKEN_VARIABLE, SearchConfig
from cmcgns.search.index import Index
from cmcgns.signals import sigterm_as_ctrl_c

if TYPE_CHECKING:
    from flask import Flask, Response

logger = logging.getLogger(__name__)
QUERY_HEADER = "X-Cmcgns-Query"
"""What a query is: `film` (the body is a file) or `text` (the body is UTF-8)."""
MOST_K, MOST_TEXT = 100, 20_000
"""Most cases, and most characters of a text."""
LEAST_TOKEN = 16
"""Fewest characters of a token."""
THREADS = 4
FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def serve(own: SearchConfig, index: Index, terminal: Console) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    logging.getLogger("cmcgns").setLevel(logging.INFO)
    token = token_of(own.host)
    server = make_server(own, index, token)
    shown, port = f"[{own.host}]" if ":" in own.host else own.host, port_of(server)
    address = f"http://{shown}:{port}/{'' if token is None else f'#token={token}'}"
    terminal.print(f"{index!r}\n{address}", highlight=False, markup=False)
    with sigterm_as_ctrl_c():
        server.run()
    server.close()


def make_server(own: SearchConfig, index: Index, token: str | None) -> Any:
    """The server, which listens already."""
    try:
        from waitress.server import create_server
    except ImportError:
        raise UserError("search.serve needs Flask and waitress: pip install 'cmcgns[search]'") from None
    most_bytes = own.upload_mib * 2**20
    app = make_app(index, token, most_bytes, own.hosts)
    try:
        return create_server(
            app, host=own.host, port=own.port, threads=THREADS, max_request_body_size=most_bytes, ident=None
        )
    except OSError as error:
        raise UserError(
            f"search.host {own.host}, search.port {own.port}: cannot be used ({error.strerror}); give another port, or 0 for a "
            "free one"
        ) from None


def port_of(server: Any) -> int:
    """The port on which a server of waitress listens; a name with several addresses has one socket for each."""
    return int(server.effective_port if hasattr(server, "effective_port") else server.effective_listen[0][1])


def token_of(host: str) -> str | None:
    """The token that queries need: that of the environment, a new one on an address that others reach, otherwise None.

    Raises:
        UserError: the token of the environment is too short.
    """
    given = os.environ.get(TOKEN_VARIABLE)
    if given is None:
        return None if host in LOOPBACK else secrets.token_urlsafe(24)
    if not re.fullmatch(r"[\w.~-]+", given, re.ASCII) or len(given) < LEAST_TOKEN:
        raise UserError(
            f"{TOKEN_VARIABLE}: give at least {LEAST_TOKEN} letters, digits, and . _ ~ -, such as those of: openssl rand -hex 16"
        )
    return given


def make_app(index: Index, token: str | None, most_bytes: int, hosts: tuple[str, ...] = ()) -> "Flask":
    """The application; ``hosts`` are names by which it may be addressed besides this machine's own."""
    from flask import Flask, request
    from werkzeug.exceptions import HTTPException

    app = Flask("cmcgns.search", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = most_bytes
    names = {"localhost", socket.gethostname().lower(), socket.getfqdn().lower(), *(name.lower() for name in hosts)}
    one_at_a_time = threading.Lock()  # the model takes all cores

    @app.before_request
    def check_host() -> Any:
        if not is_known_host(request.host, names):
            return plain(f"this page is not at {request.host}: name it in search.hosts if it is", 421)
        return None

    @app.after_request
    def add_headers(response: "Response") -> "Response":
        response.headers.update(HEADERS)
        return response

    @app.errorhandler(Exception)
    def one_message(error: Exception) -> Any:
        if isinstance(error, UserError):
            return plain(str(error), 400)
        if isinstance(error, HTTPException):
            too_large = f"the file is larger than {most_bytes / 2**20:.0f} MiB (search.upload_mib)"
            return plain(too_large if error.code == 413 else (error.name or "refused").lower(), error.code or 500)
        # never the message: it may quote what was sent
        last = traceback.extract_tb(error.__traceback__)[-1]
        logger.error("a query failed: %s in %s, line %s", type(error).__name__, last.filename, last.lineno)
        return plain("the query failed; the terminal of the server says where", 500)

    @app.post("/search")
    def search() -> Any:
        kind = request.headers.get(QUERY_HEADER)
        if kind not in ("film", "text"):
            return plain(f"a query needs the header {QUERY_HEADER}: film or text", 403)
        if token is not None and not has_token(request.headers.get("Authorization", ""), token):
            return plain("the token is missing or wrong: open the address that the server printed", 401)
        k = number_of(request.args.get("k", "10"))
        body, began = request.get_data(), time.perf_counter()
        with one_at_a_time:
            found = answer_film(index, body, k) if kind == "film" else answer_text(index, text_of(body), k)
        size = f"{len(body) / 2**20:.1f} MiB" if kind == "film" else f"{len(body)} bytes"
        logger.info("a %s of %s: %d cases in %.1f s", kind, size, len(found.films), time.perf_counter() - began)
        return found.fragment()

    for path, (name, kind) in FILES.items():
        content = (resources.files("cmcgns.search") / name).read_bytes()
        app.add_url_rule(
            path, name, lambda content=content, kind=kind: (content, {"Content-Type": f"{kind}; charset=utf-8"})
        )
    return app


def plain(message: str, status: int) -> Any:
    """A response with one line of text."""
    return message, status, {"Content-Type": "text/plain; charset=utf-8"}


def is_known_host(host: str, names: set[str]) -> bool:
    """Whether the Host header is an IP address, which no name can be rebound to, or one of ``names``."""
    name = re.sub(r":\d+$", "", host.lower()).strip("[]")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in names
    return True


def has_token(header: str, token: str) -> bool:
    """Whether the Authorization header carries the token."""
    return hmac.compare_digest(header.encode(), f"Bearer {token}".encode())


def number_of(text: str) -> int:
    """The number of cases asked for."""
    if not re.fullmatch(r"\d{1,3}", text, re.ASCII) or not 1 <= int(text) <= MOST_K:
        raise UserError(f"k: give a number from 1 to {MOST_K}")
    return int(text)


def text_of(body: bytes) -> str:
    """The text of a query; messages never quote it."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise UserError("the text is not UTF-8") from None
    if len(text) > MOST_TEXT:
        raise UserError(f"the text has {len(text)} characters; give at most {MOST_TEXT}")
    return text
