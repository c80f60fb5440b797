"""The web page in Chromium: a film dropped or chosen, a sentence typed, wrong files, and what happens without a token."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cmcgns.search.answer import answer_film, answer_text
from cmcgns.search.config import SearchConfig
from cmcgns.search.index import Index
from cmcgns.search.serve import make_server
from tests.browser import Browser, running_browser
from tests.library.test_model import png
from tests.search.made import PIXELS

TOKEN, SENTENCE = "a-token-of-this-test", "There is a left pleural effusion."


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@contextmanager
def served(index: Index, token: str | None) -> Iterator[str]:
    """The address of a running server."""
    server = make_server(SearchConfig(index="x", port=0, upload_mib=1), index, token)
    threading.Thread(target=server.run, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.effective_port}/"
    finally:
        server.close()  # its thread ends with the browser's last connection


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / "film.png"
    path.write_bytes(png(PIXELS[0]))
    return path


def shown(browser: Browser) -> list[str]:
    """The study of each case on the page, in order."""
    found: list[str] = browser.evaluate("[...document.querySelectorAll('.case .id')].map(each => each.innerText)")
    return found


def wait_for_cases(browser: Browser) -> None:
    browser.wait_for("document.querySelectorAll('.case').length && !document.querySelector('#message').innerText")


def forget(browser: Browser) -> None:
    browser.evaluate("document.querySelector('#answer').replaceChildren()")


def test_a_film_dropped_or_chosen_and_a_sentence_typed_show_the_nearest_cases(
    browser: Browser, index: Index, film: Path
) -> None:
    of_film, of_text = answer_film(index, film.read_bytes(), 10), answer_text(index, SENTENCE, 10)
    studies = lambda answer: [match.case.study_id for match in (*answer.films, *answer.reports)]
    with served(index, None) as address:
        browser.open(address)
        before = len(browser.requests)
        for ask in (browser.drop_file, browser.choose_file):
            ask("#drop" if ask == browser.drop_file else "#file", film)
            wait_for_cases(browser)
            assert shown(browser) == studies(of_film)
            forget(browser)
        browser.type_into("#text", SENTENCE)
        browser.click("button")
        wait_for_cases(browser)
        assert shown(browser) == studies(of_text)
        broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
        assert browser.evaluate("document.images.length") == 2 * len(shown(browser))
        assert browser.evaluate(broken) == 0
        assert browser.evaluate("document.querySelectorAll('mark').length") == len(shown(browser))
        assert set(browser.requests[before:]) == {f"{address}search?k=10"}
        assert browser.complaints == []


def test_a_wrong_file_has_one_message_and_the_page_goes_on(
    browser: Browser, index: Index, film: Path, tmp_path: Path
) -> None:
    (tmp_path / "letter.pdf").write_bytes(b"%PDF-1.7")
    (tmp_path / "large.png").write_bytes(b"\x89PNG" + bytes(3 * 2**20))
    with served(index, None) as address:
        browser.open(address)
        for name, told in (("letter.pdf", "the film cannot be used"), ("large.png", "refused the size of the file")):
            browser.drop_file("#drop", tmp_path / name)
            browser.wait_for("document.querySelector('#message.wrong')")
            assert told in browser.evaluate("document.querySelector('#message').innerText")
            assert shown(browser) == []
        browser.drop_file("#drop", film)
        wait_for_cases(browser)
        assert len(shown(browser)) == 20


def test_without_a_token_the_page_asks_for_it_and_with_it_answers(browser: Browser, index: Index) -> None:
    with served(index, TOKEN) as address:
        browser.open(address)
        for given in (None, "a-wrong-token"):
            if given:
                browser.type_into("#token", given)
                browser.click("#access button")
            browser.type_into("#text", SENTENCE)
            browser.click("button")
            browser.wait_for("document.querySelector('#message.wrong')")
            assert "the token is missing or wrong" in browser.text()
            assert shown(browser) == []
        browser.type_into("#token", TOKEN)
        browser.click("#access button")
        browser.click("button")
        wait_for_cases(browser)
        assert len(shown(browser)) == 20
        browser.evaluate("sessionStorage.clear()")
        browser.open(f"{address}#token={TOKEN}")  # as the server prints it
        browser.type_into("#text", SENTENCE)
        browser.click("button")
        wait_for_cases(browser)
        assert len(shown(browser)) == 20
        assert TOKEN not in browser.evaluate("location.href")
        assert not [url for url in browser.requests if TOKEN in url]


def test_a_page_of_another_address_gets_no_answer(browser: Browser, index: Index) -> None:
    """A script that asks as this page does, from another origin: the browser asks first, and the server agrees to nothing."""
    with served(index, None) as address, served(index, None) as elsewhere:
        browser.open(elsewhere)
        asking = f"fetch('{address}search', {{method: 'POST', headers: {{'X-Cmcgns-Query': 'text'}}, body: 'no'}})"
        script = f"{asking}.then(() => 'answered', () => 'refused')"
        browser.call("Page.setBypassCSP", enabled=True)
        try:
            browser.open(elsewhere)
            assert browser.evaluate(script) == "refused"
            assert browser.evaluate(script.replace(address, elsewhere)) == "answered"
        finally:
            browser.call("Page.setBypassCSP", enabled=False)
