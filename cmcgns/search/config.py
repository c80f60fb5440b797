"""Settings of `jobs/search.py`."""

import warnings
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from cmcgns.config import Section
from cmcgns.evaluate.config import EmbedConfig

TOKEN_VARIABLE = "CMCGNS_SEARCH_TOKEN"
"""Environment variable with the token of the web page."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # pydantic's models have a deprecated method `json`

    class SearchConfig(EmbedConfig):
        index: str = ""
        """Folder of the index, local or `s3://`. Without a query and `serve` it is built by `run`, or completed."""
        run: str = ""
        """Folder of a finished pretraining run or its export, local or `s3://`: it embeds the corpus. For a query by default the
        run that built the index, from where it was then."""
        split: Literal["train", "valid", "test", "all"] = "all"
        """Studies in the index."""
        uri: str | None = None
        """Corpus of the index, in any layout that `data.uri` of a run supports; by default the run's own."""
        kind: Literal["auto", "flat", "ivf"] = "auto"
        """`flat` compares every vector; `ivf` looks into some of about sqrt(N) lists of each shard. `auto`: flat up to
        100,000 films."""
        recall: float = Field(0.95, gt=0.0, le=1.0)
        """Least share of the 10 nearest vectors that `ivf` must find; it looks into as many lists as that takes on a sample."""
        shard_films: PositiveInt = 100_000
        """Films of one shard, about: a shard is built in memory, is what a killed build keeps, and is searched in one piece."""
        pictures: bool = True
        """Store each film as the model reads it, PNG, for the pictures and heat maps of answers."""
        film: str | None = None
        """Query: a film (JPEG, PNG, TIFF, BMP, WebP, DICOM), a path or `s3://` URI."""
        text: str | None = None
        """Query: a sentence or a report."""
        report: str | None = None
        """Query: a text file with a report, a path or `s3://` URI; other users of the machine do not see its words."""
        k: int = Field(10, ge=1, le=1000)
        """Nearest films, and nearest reports, of an answer."""
        json: str | None = None  # type: ignore[assignment]
        """File for the answer as JSON, local or `s3://`."""
        page: str | None = None
        """File for the answer as a self-contained HTML page with pictures and heat maps, local or `s3://`."""
        serve: bool = False
        """Serve a web page for queries, until Ctrl-C; needs the extra `search`."""
        host: str = "127.0.0.1"
        """Address on which the page is served. Anything but this machine itself demands a token: that of the environment variable
        CMCGNS_SEARCH_TOKEN, or a new one, printed once."""
        port: int = Field(8421, ge=0, le=65535)
        """Port of the page; 0 takes a free one."""
        hosts: tuple[str, ...] = ()
        """Further names by which browsers may address the page; IP addresses and this machine's own names always work."""
        upload_mib: PositiveInt = 64
        """Largest film that the page takes, in MiB."""

        @property
        def query(self) -> dict[str, str]:
            """The query by its kind; empty without one."""
            given = {"film": self.film, "text": self.text, "report": self.report}
            return {kind: value for kind, value in given.items() if value is not None}


class SearchJobConfig(Section):
    """All settings of the job."""

    search: SearchConfig = SearchConfig()

    @model_validator(mode="after")
    def parts_work_together(self) -> Self:
        own = self.search
        query = list(own.query)
        if not own.index:
            raise ValueError("search.index is missing; give the folder of an index, such as indexes/NAME")
        if len(query) > 1:
            raise ValueError(f"search.{query[0]} and search.{query[1]}: give one query")
        if query and own.serve:
            raise ValueError(f"search.serve answers queries of the page; remove search.{query[0]}")
        if not query and not own.serve and not own.run:
            raise ValueError(
                "search.run is missing; name a finished run to build the index with, or a query: search.film, search.text, "
                "search.report or search.serve"
            )
        if not query and (own.json or own.page):
            raise ValueError(f"search.{'json' if own.json else 'page'} is for the answer to a query; give one")
        return self
