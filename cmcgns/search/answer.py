"""The answer to one query: cases with the matching sentence of each report, pictures and heat maps; as table, JSON and page."""

import base64
import io
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cmcgns.data.reports import as_parsed
from cmcgns.library.films import READERS, FilmLike, read_square
from cmcgns.library.model import Heatmap, Model
from cmcgns.library.texts import embed_sentences
from cmcgns.search.index import Case, Index

QueryKind = Literal["film", "text"]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Match:
    """A case of an answer."""

    case: Case
    cosine_S: list[float]
    """Similarity of each sentence of the report to the query."""
    film: Pixels | None = field(default=None, repr=False)
    """As the model sees it; None without pictures."""
    heat: Image.Image | None = field(default=None, repr=False)
    """Where the nearest sentence looks on the film; None without pictures or for a method without attention."""

    @property
    def best(self) -> int:
        """Index of the sentence nearest to the query."""
        return int(np.argmax(self.cosine_S))

    @property
    def sentence(self) -> str:
        """The sentence nearest to the query."""
        return self.case.sentences[self.best]

    def record(self) -> dict[str, Any]:
        """The match as JSON."""
        own = self.case
        return {
            "cosine": round(own.cosine, 6),
            "study_id": own.study_id,
            "film": own.path,
            "view": own.view,
            "split": own.split,
            "sentences": own.sentences,
            "nearest_sentence": self.sentence,
            "nearest_sentence_cosine": round(self.cosine_S[self.best], 6),
        }


@dataclass(frozen=True)
class Answer:
    """The nearest films and reports of one query."""

    kind: QueryKind
    query: str
    """Name of the film, or the text."""
    index: Index
    films: list[Match]
    reports: list[Match]
    film: Pixels | None = field(default=None, repr=False)
    """The film of the query as the model sees it."""
    heat: Image.Image | None = field(default=None, repr=False)
    """Where the sentence of the nearest report looks on the film of the query."""

    @property
    def sentence(self) -> str:
        """The sentence of the nearest report that is nearest to the query; '' without a report."""
        return self.reports[0].sentence if self.reports else ""

    def to_json(self) -> bytes:
        """The answer without pictures."""
        facts = {
            "query": {self.kind: self.query},
            "index": self.index.uri,
            "model": self.index.manifest.model["uri"],
            "films": [match.record() for match in self.films],
            "reports": [match.record() for match in self.reports],
        }
        return (json.dumps(facts, indent=1) + "\n").encode()

    def page(self) -> bytes:
        """A page of its own, without any remote part."""
        return render("answer.html.jinja", answer=self).encode()

    def fragment(self) -> str:
        """The part of ``page`` with the cases."""
        return render("cases.html.jinja", answer=self)

    def show(self, terminal: Console) -> None:
        """Print the cases as two tables."""
        for title, matches in (("nearest films", self.films), ("nearest reports", self.reports)):
            terminal.print(match_table(title, matches))


def answer_film(index: Index, film: FilmLike, k: int, name: str = "the film") -> Answer:
    """The answer to a film; messages call it ``name``."""
    model = index.model
    square_RR = read_square(film, model.config.data, name)
    query_D = model.embed_squares([square_RR])[0]
    films, reports = matches_of(index, query_D, k)
    heat = None
    if reports and model.method.has_attention:
        heat = heat_pictures(model, [square_RR], [reports[0]])[0]
    shown = str(film) if isinstance(film, str | os.PathLike) else name
    return Answer("film", shown, index, films, reports, model.seen(square_RR), heat)


def answer_text(index: Index, text: str, k: int) -> Answer:
    """The answer to a sentence or a report."""
    query_D = index.model.embed_reports([text])[0]
    return Answer("text", text, index, *matches_of(index, query_D, k))


def matches_of(index: Index, query_D: NDArray[np.float32], k: int) -> tuple[list[Match], list[Match]]:
    """The nearest films and reports of an embedding, each with its nearest sentence, film and heat map."""
    found = index.nearest(query_D[None], k)[0]
    cases = [*found.films, *found.reports]
    sentences = list(dict.fromkeys(sentence for case in cases for sentence in case.sentences))
    vector_SD = embed_in_batches(index.model, sentences)
    cosine_of = dict(zip(sentences, (vector_SD @ query_D).tolist(), strict=True))
    matches = [Match(case, [cosine_of[sentence] for sentence in case.sentences]) for case in cases]
    matches = with_pictures(index, matches)
    return matches[: len(found.films)], matches[len(found.films) :]


def embed_in_batches(model: Model, sentences: Sequence[str]) -> NDArray[np.float64]:
    """Embeddings of the sentences, each as a report of its own, (S, D)."""
    size = model.batch_size
    parts = [
        embed_sentences(model.network, model.run.tokenizer, sentences[start : start + size])
        for start in range(0, len(sentences), size)
    ]
    return np.concatenate([np.zeros((0, model.dim)), *parts])


def with_pictures(index: Index, matches: Sequence[Match]) -> list[Match]:
    """The matches with films and heat maps, as far as index and method have them."""
    model = index.model
    with ThreadPoolExecutor(READERS) as threads:  # each may wait for S3
        pictures = list(threads.map(index.picture, (match.case for match in matches)))
    squares = [square_RR for square_RR in pictures if square_RR is not None]
    if len(squares) < len(matches):
        return list(matches)
    heats = heat_pictures(model, squares, matches) if model.method.has_attention else [None] * len(matches)
    return [
        Match(match.case, match.cosine_S, model.seen(square_RR), heat)
        for match, square_RR, heat in zip(matches, squares, heats, strict=True)
    ]


def heat_pictures(model: Model, squares: Sequence[Pixels], matches: Sequence[Match]) -> list[Image.Image]:
    """Where the nearest sentence of each match, read in its report, looks on each padded square."""
    read = [
        (parsed, model.run.tokenizer.encode(parsed.sentences))
        for parsed in (as_parsed(m.case.sentences) for m in matches)
    ]
    maps: list[Heatmap] = model.heatmaps(squares, read)
    return [heat.picture(match.best) for heat, match in zip(maps, matches, strict=True)]


def match_table(title: str, matches: Iterable[Match]) -> Table:
    """One row for each case."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("", "cosine", "study", "film", "nearest sentence"):
        table.add_column(heading, justify="right" if heading in ("", "cosine") else "left")
    for rank, match in enumerate(matches, 1):
        own = match.case
        table.add_row(str(rank), f"{own.cosine:.3f}", *map(escape, (own.study_id, own.path, match.sentence)))
    return table


def render(name: str, **values: Any) -> str:
    """A template with the values, all of them escaped."""
    environment = Environment(
        loader=PackageLoader("cmcgns.search", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png"] = inline
    environment.globals["style"] = Markup((resources.files("cmcgns.search") / "style.css").read_text())
    return environment.get_template(name).render(**values)


def inline(picture: Pixels | Image.Image) -> str:
    """A picture as the source of an image, PNG."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    stored = io.BytesIO()
    image.save(stored, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stored.getvalue()).decode()}"
