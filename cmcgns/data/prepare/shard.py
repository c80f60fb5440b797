"""Shards of a prepared set: pseudonyms, rows, and the Parquet file with its account in the footer."""

import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cmcgns import storage
from cmcgns.data.image import shrink
from cmcgns.data.manifest import RowGroup, Shard, describe_row_group
from cmcgns.data.prepare.config import PrepareConfig
from cmcgns.data.readers import Reader, Source
from cmcgns.data.record import PREPARED_SCHEMA, prepared_row
from cmcgns.data.repairs import noted
from cmcgns.data.reports import parse_report
from cmcgns.data.scrub import scrub
from cmcgns.errors import BadRow, UserError
from cmcgns.storage import parquet

MIN_KEY_BYTES = 16
MIN_KEY_SYMBOLS = 6
"""Different bytes; one random key of 16 hexadecimal digits in 30,000 has fewer."""
DIGITS = 20
"""Hexadecimal digits of a pseudonym: 80 bits, no collision expected among a billion."""


@dataclass(frozen=True)
class Pseudonyms:
    """Replaces ids by keyed hashes, which only the owner of the key can link to the ids; without a key it keeps them."""

    key: bytes | None = None

    @classmethod
    def from_file(cls, path: str | None) -> "Pseudonyms":
        """Pseudonyms with the key in the file ``path``; original ids if it is None."""
        if path is None:
            return cls()
        try:
            place = Path(path).expanduser()
            key, mode = place.read_bytes().strip(), place.stat().st_mode & 0o777
        except OSError as error:
            raise UserError(f"prepare.pseudonymise_key_file {path}: {error.strerror}; give a readable file") from None
        problem = None
        if len(key) < MIN_KEY_BYTES:
            problem = f"has {len(key)} bytes; give at least {MIN_KEY_BYTES}"
        elif len(set(key)) < MIN_KEY_SYMBOLS:
            problem = f"has only {len(set(key))} different bytes and can be guessed; give a random key"
        elif mode & 0o077:
            problem = f"can be read by other users (mode {mode:03o}), who could link the hashes to ids; chmod 600 it"
        if problem:
            raise UserError(
                f"prepare.pseudonymise_key_file {path} {problem}, for instance from: (umask 077; openssl rand -hex 32 > key)"
            )
        return cls(key)

    def __call__(self, identity: str) -> str:
        """The pseudonym of ``identity``: always the same for one id and key."""
        return identity if self.key is None else self._digest(identity)[:DIGITS]

    @property
    def fingerprint(self) -> str | None:
        """Identifies the key without revealing it; None if there is no key."""
        return None if self.key is None else self._digest("fingerprint of the key")[:8]

    def _digest(self, text: str) -> str:
        assert self.key is not None
        return hmac.new(self.key, text.encode(), hashlib.sha256).hexdigest()


FETCH_THREADS = 8
"""Studies of one shard that are fetched concurrently."""
FOOTER_KEY = b"cmcgns.account"


@dataclass(frozen=True)
class ShardPlan:
    """The groups of a split that go into one shard."""

    name: str
    split: str
    first_group: int
    end_group: int


@dataclass(frozen=True)
class ShardAccount:
    """Result for the studies of a shard; stored in its footer, so that a resumed prepare needs only the shard."""

    row_groups: list[RowGroup]
    bad_rows: dict[str, str]
    """Reason by study, or by study/film if other films of the study can be used."""
    lost: int = 0
    """Studies without any usable film."""
    views: dict[str, int] = field(default_factory=dict)
    sentences: dict[int, int] = field(default_factory=dict)
    """Rows by number of sentences."""
    words: dict[int, int] = field(default_factory=dict)
    """Rows by number of words."""
    sides: dict[int, int] = field(default_factory=dict)
    """Rows by longer side in pixels."""
    repaired: dict[str, int] = field(default_factory=dict)
    """Rows by the rule by which their film or report was read, where it was not read as it stands."""

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.row_groups)

    def to_json(self) -> str:
        """The account as stored in the footer."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "ShardAccount":
        """The account from the result of ``to_json``."""
        fields = json.loads(text)
        row_groups = [RowGroup(**group) for group in fields["row_groups"]]
        sentences, words, sides = (
            {int(key): count for key, count in fields[name].items()} for name in ("sentences", "words", "sides")
        )
        repaired = fields.get("repaired", {})  # shards of earlier versions have none
        return cls(row_groups, fields["bad_rows"], fields["lost"], fields["views"], sentences, words, sides, repaired)


@dataclass(frozen=True)
class MadeShard:
    """A finished shard of the set."""

    plan: ShardPlan
    account: ShardAccount
    bytes: int

    def entry(self) -> Shard:
        """Its entry in the manifest."""
        return Shard(self.plan.name, self.plan.split, self.bytes, self.account.row_groups)


@dataclass(frozen=True)
class Maker:
    """Makes the shards of one corpus; pickled into Ray tasks."""

    source: Source
    settings: PrepareConfig
    pseudonyms: Pseudonyms
    reports: bool = True
    """Studies have reports; otherwise rows have an empty text and no sentences."""

    def write(self, plan: ShardPlan, groups: Iterator[list[dict[str, Any]]]) -> MadeShard:
        """Make the shard of ``plan`` from the studies of each of its groups, and commit it."""
        uri = storage.join(self.settings.out, plan.name)
        with storage.scratch_file(uri) as local:
            account = self._write_local(local, plan, groups)
            size = local.stat().st_size
            storage.put_file(local, uri, if_absent=True)
        return MadeShard(plan, account, size)

    def _write_local(self, path: Path, plan: ShardPlan, groups: Iterator[list[dict[str, Any]]]) -> ShardAccount:
        row_groups: list[RowGroup] = []
        bad_rows: dict[str, str] = {}
        lost = 0
        counters = {name: Counter[Any]() for name in ("views", "sentences", "words", "sides", "repaired")}
        with pq.ParquetWriter(path, PREPARED_SCHEMA, **_PARQUET) as writer:
            for number, studies in enumerate(groups, start=plan.first_group):
                rows, bad, repaired = self.rows(studies)
                bad_rows |= bad
                counters["repaired"].update(repaired)
                usable = len(rows["study_id"].unique())
                lost += len(studies) - usable
                if len(rows):
                    writer.write_table(rows, row_group_size=len(rows))
                    row_groups.append(describe_row_group(number, rows, usable))
                _count(counters, rows)
            counts = {name: dict(sorted(counter.items())) for name, counter in counters.items()}
            account = ShardAccount(row_groups, bad_rows, lost, **counts)
            writer.add_key_value_metadata({FOOTER_KEY: account.to_json()})
        return account

    def rows(self, studies: Sequence[dict[str, Any]]) -> tuple[pa.Table, dict[str, str], Counter[str]]:
        """Rows of ``PREPARED_SCHEMA``, the reason for each film or study that cannot be used, and rows by the rule that repaired
        them."""
        reader = self.source.reader([film["path"] for study in studies for film in study["films"]])
        with ThreadPoolExecutor(FETCH_THREADS if reader.io_bound else 1) as threads:
            made = list(threads.map(partial(self._study_rows, reader), studies))
        good = [row for rows, _, _ in made for row in rows]
        bad = {source: reason for _, reasons, _ in made for source, reason in reasons.items()}
        repaired = sum((counts for _, _, counts in made), Counter[str]())
        return pa.Table.from_pylist(good, schema=PREPARED_SCHEMA), bad, repaired

    def _study_rows(
        self, reader: Reader, study: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, str], Counter[str]]:
        """One row per usable film, the reason for each of the others or for the whole study, and rows by rule."""
        study_id = self.pseudonyms(study["study_id"])
        try:
            with noted() as of_report:
                text = self._text(study)
        except BadRow as reason:
            return [], {study_id: str(reason)}, Counter()
        rows, bad, repaired = [], {}, Counter[str]()
        for film in study["films"]:
            try:
                with noted() as of_film:
                    image = self._image(reader, film["path"])
                rows.append(prepared_row(study, film, self.pseudonyms, **text, **image))
                repaired.update({*of_report, *of_film})
            except BadRow as reason:
                bad[f"{study_id}/{self.pseudonyms(film['image_id'])}"] = str(reason)
        return rows, bad, repaired

    def _text(self, study: dict[str, Any]) -> dict[str, Any]:
        if not self.reports:
            return {"report": "", "sentences": []}
        report = self.source.read_report(study)
        report = scrub(report) if self.settings.scrub_reports else report
        return {"report": report, "sentences": parse_report(report).sentences}

    def _image(self, reader: Reader, path: str) -> dict[str, Any]:
        image = reader.read_image(path)
        # after the crop it may be smaller than image_size; it is not enlarged
        grey_HW = shrink(image.grey_HW, self.settings.image_size)
        height, width = grey_HW.shape
        return {"image": encode(grey_HW, self.settings), "height": height, "width": width, "crop": list(image.frame)}


_PARQUET: dict[str, Any] = {
    # images are already compressed; statistics of images and reports would copy their content
    "compression": {name: "none" if name == "image" else "zstd" for name in PREPARED_SCHEMA.names},
    "use_dictionary": ["patient_id", "group", "view", "split"],
    "write_statistics": ["study_id", "split"],
    "write_page_checksum": True,
}


def encode(grey_HW: NDArray[np.uint8], settings: PrepareConfig) -> bytes:
    """``grey_HW`` as PNG or JPEG; ``BadRow`` if the format cannot store it."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, settings.quality] if settings.encoding == "jpeg" else []
    encoded, data_N = cv2.imencode(f".{settings.encoding}", grey_HW, quality)
    if not encoded:
        raise BadRow(f"film of {grey_HW.shape[1]} x {grey_HW.shape[0]} pixels is too large for {settings.encoding}")
    return data_N.tobytes()


def _count(counters: dict[str, Counter[Any]], rows: pa.Table) -> None:
    """Add ``rows`` to the counts of the summary."""
    sentences = rows["sentences"].to_pylist()
    counters["views"].update(rows["view"].to_pylist())
    counters["sentences"].update(len(each) for each in sentences)
    counters["words"].update(sum(len(sentence.split(" ")) for sentence in each) for each in sentences)
    counters["sides"].update(map(max, zip(rows["height"].to_pylist(), rows["width"].to_pylist(), strict=True)))


def read_made(plan: ShardPlan, out: str) -> MadeShard:
    """The existing shard of ``plan``, with the account in its footer."""
    uri = storage.join(out, plan.name)
    metadata = parquet.read(uri, lambda file: file.metadata, PREPARED_SCHEMA)
    return MadeShard(plan, ShardAccount.from_json(metadata.metadata[FOOTER_KEY]), storage.file_size(uri))
