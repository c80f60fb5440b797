"""The search job: builds an index, answers a query or serves the page, as its settings say. Only the build needs Ray."""

from typing import TYPE_CHECKING

from cmcgns import storage
from cmcgns.data.text import decode_text
from cmcgns.errors import UserError
from cmcgns.search.config import SearchConfig, SearchJobConfig
from cmcgns.terminal import console, log_on

if TYPE_CHECKING:
    from cmcgns.search.answer import Answer
    from cmcgns.search.index import Index


def search(config: SearchJobConfig) -> int:
    """Exit status of the job."""
    own, terminal = config.search, console()
    if not own.query and not own.serve:
        from cmcgns.search.build import build_index  # needs Ray

        return build_index(config, terminal)
    from transformers.utils import logging

    from cmcgns.search.index import open_index

    logging.disable_progress_bar()  # a bar for each encoder
    with log_on(terminal):
        index = open_index("search.index", own.index, own.run or None, trusted=own.trusted)
        if own.serve:
            from cmcgns.search.serve import serve

            serve(own, index, terminal)
            return 0
        found = answer(index, own)
    found.show(terminal)
    for path, content, what in ((own.json, found.to_json, "JSON"), (own.page, found.page, "page")):
        if path is not None:
            uri = storage.absolute("search", path)
            storage.write_bytes(uri, content())
            terminal.print(f"{what} with texts of the corpus written to {uri}", highlight=False, markup=False)
    return 0


def answer(index: "Index", own: SearchConfig) -> "Answer":
    """The answer to the query of the settings."""
    from cmcgns.search.answer import answer_film, answer_text

    if own.film is not None:
        return answer_film(index, own.film, own.k, "search.film")
    return answer_text(index, own.text if own.text is not None else read_report(own.report or ""), own.k)


def read_report(path: str) -> str:
    """The text in a file."""
    try:
        return decode_text(storage.read_bytes(path))
    except storage.MissingFileError:
        raise UserError(f"search.report {path} is not a file; check the path") from None
