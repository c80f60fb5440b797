"""The web page without a browser: who may ask, what it takes, what it says and what it logs."""

import logging
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from cmcgns.errors import UserError
from cmcgns.search import serve as serving
from cmcgns.search.config import SearchConfig
from cmcgns.search.index import Index
from cmcgns.search.serve import QUERY_HEADER, is_known_host, make_app, make_server, token_of
from tests.library.test_model import png
from tests.search.made import PIXELS

TOKEN = "a-token-of-this-test"
FILM, TEXT = {QUERY_HEADER: "film"}, {QUERY_HEADER: "text"}
SENTENCE = "There is a left pleural effusion."


@pytest.fixture
def client(index: Index) -> FlaskClient:
    return make_app(index, None, 2**20).test_client()


@pytest.fixture
def guarded(index: Index) -> FlaskClient:
    """Of a page that needs the token."""
    return make_app(index, TOKEN, 2**20).test_client()


def check_plain(answer: Any, status: int, *words: str) -> None:
    """One line of text with these words."""
    assert answer.status_code == status
    assert answer.mimetype == "text/plain"
    assert len(answer.text.splitlines()) == 1
    for word in words:
        assert word in answer.text


def test_a_film_and_a_text_are_answered_with_cases(client: FlaskClient) -> None:
    for headers, body in ((FILM, png(PIXELS[0])), (TEXT, SENTENCE.encode())):
        answer = client.post("/search?k=4", headers=headers, data=body)
        assert answer.status_code == 200
        assert answer.text.count('class="case"') == 8
        assert "<script" not in answer.text


def test_a_form_of_another_page_cannot_ask(client: FlaskClient) -> None:
    """What a browser sends without asking first: any simple type, no header of one's own."""
    for kind in ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain"):
        headers = {"Content-Type": kind, "Origin": "https://elsewhere.example"}
        check_plain(client.post("/search", headers=headers, data=SENTENCE), 403, QUERY_HEADER)
    asked = client.options("/search", headers={"Origin": "https://elsewhere.example"})
    assert not [name for name, _ in asked.headers if name.lower().startswith("access-control")]
    check_plain(client.get("/search"), 405)


@pytest.mark.parametrize("path", ["/", "/page.js", "/search"])
def test_a_name_that_was_rebound_to_this_machine_is_refused(path: str, client: FlaskClient) -> None:
    ask = client.post if path == "/search" else client.get
    for host in ("evil.example", "evil.example:8421", "127.0.0.1.evil.example", "localhost.evil.example", ""):
        check_plain(ask(path, headers={"Host": host, **TEXT}, data=SENTENCE), 421)


def test_this_machine_and_named_hosts_are_known() -> None:
    names = {"localhost", "search.hospital.example"}
    for host in ("127.0.0.1:8421", "[::1]:8421", "10.1.2.3", "localhost:80", "LOCALHOST", "search.hospital.example"):
        assert is_known_host(host, names), host


def test_without_the_token_nothing_is_answered(guarded: FlaskClient) -> None:
    for header in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer ü"},
    ):
        check_plain(guarded.post("/search", headers=TEXT | header, data=SENTENCE), 401, "the token is missing or wrong")
    with_token = {"Authorization": f"Bearer {TOKEN}"}
    assert guarded.post("/search", headers=TEXT | with_token, data=SENTENCE).status_code == 200
    shown = guarded.get("/")
    assert shown.status_code == 200  # the page itself holds nothing
    assert TOKEN not in shown.text


def test_an_address_that_others_reach_demands_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CMCGNS_SEARCH_TOKEN", raising=False)
    assert [token_of(host) for host in ("127.0.0.1", "::1", "localhost")] == [None] * 3
    made = {token_of(host) for host in ("0.0.0.0", "::", "10.0.0.1", "head") for _ in range(2)}
    assert len(made) == 8
    assert min(len(str(token)) for token in made) >= 32
    monkeypatch.setenv("CMCGNS_SEARCH_TOKEN", TOKEN)
    assert token_of("0.0.0.0") == token_of("127.0.0.1") == TOKEN
    for weak in ("", "short", "sixteen letters!", "ü" * 20):
        monkeypatch.setenv("CMCGNS_SEARCH_TOKEN", weak)
        with pytest.raises(UserError, match="CMCGNS_SEARCH_TOKEN: give at least 16"):
            token_of("127.0.0.1")


def test_wrong_queries_have_one_plain_message_each(client: FlaskClient) -> None:
    post = lambda headers, body, query="": client.post(f"/search{query}", headers=headers, data=body)
    check_plain(post(FILM, b"%PDF-1.7"), 400, "the film cannot be used")
    check_plain(post(FILM, b""), 400, "the film cannot be used")
    check_plain(post(FILM, b"x" * (2**20 + 1)), 413, "larger than 1 MiB (search.upload_mib)")
    check_plain(post(TEXT, b"..."), 400, "text 0 has no word")
    check_plain(post(TEXT, b"\xff\xfe"), 400, "the text is not UTF-8")
    check_plain(post(TEXT, b"no " * 7000), 400, "at most 20000")
    for k in ("0", "101", "-1", "x", "1e1", "²"):
        check_plain(post(TEXT, SENTENCE.encode(), f"?k={k}"), 400, "k: give a number from 1 to 100")
    check_plain(client.get("/../index.json"), 404)
    check_plain(client.get("/index.json"), 404)


def test_no_log_and_no_message_has_a_word_of_a_query(
    client: FlaskClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    client.post("/search", headers=TEXT, data="Jane Doe has a pneumothorax.")
    client.post("/search", headers=FILM, data=b"Jane Doe")

    def fail(*_: object) -> None:
        raise ValueError("Jane Doe")

    monkeypatch.setattr(serving, "answer_text", fail)
    answer = client.post("/search", headers=TEXT, data="Jane Doe has a pneumothorax.")
    check_plain(answer, 500, "the query failed")
    said = caplog.text + "".join(capfd.readouterr()) + answer.text
    assert "a text of 28 bytes: 10 cases in" in said
    assert "a query failed: ValueError in" in said
    assert "Jane" not in said
    assert "pneumothorax" not in said


def test_every_answer_forbids_scripts_of_others_and_is_not_kept(guarded: FlaskClient) -> None:
    for answer in (guarded.get("/"), guarded.get("/none"), guarded.post("/search", headers=TEXT, data="x")):
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe-inline" not in policy


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_port_that_is_taken_is_named(index: Index, taken_port: int) -> None:
    with pytest.raises(UserError, match=f"search.port {taken_port}: cannot be used"):
        make_server(SearchConfig(index="x", port=taken_port), index, None)


def test_the_server_listens_on_this_machine_alone(index: Index) -> None:
    server = make_server(SearchConfig(index="x", port=0), index, None)
    try:
        assert server.socket.getsockname()[0] == "127.0.0.1"
    finally:
        server.close()
