"""What lies in two splits at once: patients, groups, films, reports."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import cv2
import imagehash
import numpy as np
import pandas as pd
import pyarrow as pa
import ray
import ray.data  # before ray_session, which quiets its log
from PIL import Image

from cmcgns import storage
from cmcgns.bad_rows import BAD_ROWS
from cmcgns.cli import STATUS_FAILED
from cmcgns.cluster.session import ray_session
from cmcgns.data.manifest import MANIFEST, SHARD_SCHEMA, Manifest, Shard, content_hash, joint_hash, read_manifest
from cmcgns.data.prepare.run import summary_table, task_context
from cmcgns.data.readers.prepared import decode_prepared
from cmcgns.data.reports import as_parsed
from cmcgns.errors import UserError
from cmcgns.terminal import console, quiet_terminal

MOST_BITS = 3
"""Bits by which the perceptual hashes of one picture may differ after it was encoded anew."""
MOST_LEVELS = 4.0
"""Mean difference in grey levels of the thumbnails of one picture."""
BANDS = np.arange(0, 65, 16)
"""Two hashes that differ in at most three bits agree in one of four bands."""


@dataclass(frozen=True)
class Finding:
    """Something wrong with a prepared set."""

    kind: str
    ids: list[str]
    """Of what it is about: files, or study/film of each row."""
    what: str

    @property
    def is_fault(self) -> bool:
        """Equal reports are none: of normal films many say the same."""
        return self.kind != "report in two splits"


def leaks(facts: pd.DataFrame) -> list[Finding]:
    """Every patient, group, film and report of ``facts`` (columns of ``check.FACT_SCHEMA``) that is in two splits."""
    rows = facts.assign(row=facts["study_id"] + "/" + facts["image_id"])
    return [
        *_shared(rows, "patient_id", "patient in two splits"),
        *_shared(rows[rows["group"] != rows["patient_id"]], "group", "group in two splits"),
        *_shared_films(rows),
        *_shared(rows, "report_hash", "report in two splits"),
    ]


def _shared(rows: pd.DataFrame, column: str, kind: str) -> Iterator[Finding]:
    """A finding for each value of ``column`` that occurs in several splits, with the first row of each."""
    torn = rows.groupby(column)["split"].transform("nunique") > 1
    for value, found in rows[torn].groupby(column, sort=False):
        first = found.drop_duplicates("split")
        named = f"{column.removesuffix('_id')} {value} " if column != "report_hash" else ""
        yield Finding(kind, list(first["row"]), f"{named}in {' and '.join(first['split'])} ({len(found)} films)")


def _shared_films(rows: pd.DataFrame) -> Iterator[Finding]:
    """A finding for each pair of films in two splits that are one picture."""
    hash_N = rows["picture_hash"].to_numpy(np.uint64)
    split_N = rows["split"].to_numpy(str)
    pairs_P2 = _near(hash_N, split_N)
    thumbnails = rows["thumbnail"].to_numpy()
    names = rows["row"].to_numpy(str)
    for one, other in pairs_P2:
        levels = [np.frombuffer(thumbnails[i], np.uint8).astype(float) for i in (one, other)]
        if np.abs(levels[0] - levels[1]).mean() <= MOST_LEVELS:
            what = f"are one picture, in {split_N[one]} and {split_N[other]}"
            yield Finding("film in two splits", [names[one], names[other]], what)


def _near(hash_N: np.ndarray, split_N: np.ndarray) -> np.ndarray:
    """Pairs (P, 2) of rows in two splits whose hashes differ in at most ``MOST_BITS`` bits."""
    found = [np.zeros((0, 2), np.int64)]
    for low, high in pairwise(BANDS):
        band_N = (hash_N >> np.uint64(low)) & np.uint64(2 ** int(high - low) - 1)
        table = pd.DataFrame({"band": band_N, "row": np.arange(len(hash_N)), "split": split_N})
        for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
            pairs = table[table["split"] == one].merge(table[table["split"] == other], on="band")
            pair_P2 = pairs[["row_x", "row_y"]].to_numpy(np.int64)
            bits_P = np.bitwise_count(hash_N[pair_P2[:, 0]] ^ hash_N[pair_P2[:, 1]])
            found.append(pair_P2[bits_P <= MOST_BITS])
    return np.unique(np.concatenate(found), axis=0)


FINDINGS = "findings.jsonl"
SHOWN = 5
"""Findings of each kind on the terminal; all are in the set's ``findings.jsonl``."""
THUMBNAIL = 16
"""Side in pixels of the picture that is kept of each film."""
FACT_SCHEMA = pa.schema(
    [
        pa.field("study_id", pa.string()),
        pa.field("image_id", pa.string()),
        pa.field("patient_id", pa.string()),
        pa.field("group", pa.string()),
        pa.field("split", pa.string()),
        pa.field("report_hash", pa.int64()),
        pa.field("picture_hash", pa.uint64()),
        pa.field("thumbnail", pa.binary(THUMBNAIL**2)),
    ]
)
"""What is remembered of each row."""


def check_set(uri: str) -> int:
    """Exit status of a check: 0 sound, 1 with findings. Reports that occur in two splits are told, and no fault."""
    uri, terminal = storage.absolute("prepare.out", uri).rstrip("/"), console()
    if not storage.exists(storage.join(uri, MANIFEST)):
        raise UserError(f"prepare.out {uri} holds no complete prepared set (no {MANIFEST}); prepare it first")
    manifest = read_manifest(uri)
    findings = check_files(uri, manifest)
    lost = {finding.ids[0] for finding in findings if finding.kind == "shard"}
    with quiet_terminal(), ray_session():
        facts, of_shards = read_shards(uri, [shard for shard in manifest.shards if shard.name not in lost])
    findings += of_shards + check_counts(manifest, facts, whole=not lost and not of_shards) + leaks(facts)
    terminal.print(summary_table(manifest))
    return conclude(uri, manifest, findings)


def check_files(uri: str, manifest: Manifest) -> list[Finding]:
    """Shards that are not there or not as long as they were, and files that nobody knows."""
    there = set(storage.list_files(uri))
    known = {MANIFEST, BAD_ROWS, FINDINGS, *(shard.name for shard in manifest.shards)}
    found = [Finding("file", [name], "is no part of the set") for name in sorted(there - known)]
    for shard in manifest.shards:
        if shard.name not in there:
            found.append(Finding("shard", [shard.name], "is missing"))
        elif (size := storage.file_size(storage.join(uri, shard.name))) != shard.bytes:
            found.append(Finding("shard", [shard.name], f"is of {size} bytes, not {shard.bytes}"))
    return found


def read_shards(uri: str, shards: Sequence[Shard]) -> tuple[pd.DataFrame, list[Finding]]:
    """A row of facts for each row of the shards, and what is wrong with them, by one Ray Data task a shard."""
    if not shards:
        return FACT_SCHEMA.empty_table().to_pandas(), []
    facts: list[pa.Table] = []
    findings: list[Finding] = []
    with task_context():
        rows = ray.data.range(len(shards), override_num_blocks=len(shards)).map_batches(
            read_numbered, batch_format="pyarrow", num_cpus=1, fn_kwargs={"uri": uri, "shards": shards}
        )
        for row in rows.iter_rows():
            if row["failure"]:
                raise UserError(row["failure"])
            findings += [Finding(**each) for each in json.loads(row["findings"])]
            facts.append(pa.ipc.open_stream(row["facts"]).read_all())
    return pa.concat_tables(facts).to_pandas(), findings


def read_numbered(numbers: pa.Table, uri: str, shards: Sequence[Shard]) -> pa.Table:
    """A Ray Data task: facts and findings of the shards whose numbers come in; storage that fails goes out as a row too."""
    rows = []
    for number in numbers["id"].to_pylist():
        try:
            facts, findings = read_shard(uri, shards[number])
        except UserError as error:
            rows.append({"facts": b"", "findings": "", "failure": str(error)})
            continue
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, FACT_SCHEMA) as writer:
            writer.write_table(facts)
        said = json.dumps([asdict(finding) for finding in findings])
        rows.append({"facts": sink.getvalue().to_pybytes(), "findings": said, "failure": ""})
    return pa.Table.from_pylist(rows)


def read_shard(uri: str, shard: Shard) -> tuple[pa.Table, list[Finding]]:
    """Facts of every row of a shard, and what is not as the manifest says."""
    place = storage.join(uri, shard.name)
    facts, findings = [FACT_SCHEMA.empty_table()], []
    try:
        footer = storage.read_parquet(place, lambda file: file.metadata)
        if footer.num_row_groups != len(shard.row_groups):
            return facts[0], [Finding("shard", [shard.name], f"has {footer.num_row_groups} row groups")]
        for number, wanted in enumerate(shard.row_groups):
            name = f"{shard.name}#{number}"
            try:
                rows = storage.read_parquet(place, lambda file, number=number: file.read_row_group(number), footer)  # type: ignore[misc]
            except storage.BrokenFileError:
                findings.append(Finding("row group", [name], "is broken"))
                continue
            if len(rows) != wanted.rows or content_hash(rows.select(SHARD_SCHEMA.names)) != wanted.content_hash:
                findings.append(
                    Finding("row group", [name], f"is not what was written ({len(rows)} of {wanted.rows} rows)")
                )
            found, broken = facts_of(rows)
            facts.append(found)
            findings += broken
    except storage.BrokenFileError:
        findings.append(Finding("shard", [shard.name], "is truncated or broken"))
    return pa.concat_tables(facts), findings


def facts_of(rows: pa.Table) -> tuple[pa.Table, list[Finding]]:
    """What is remembered of ``rows``, and films that are not what the row says."""
    facts, findings = [], []
    for row in rows.to_pylist():
        grey_HW = decode_prepared(row["image"])
        if grey_HW is None or grey_HW.shape != (row["height"], row["width"]):
            findings.append(Finding("film", [row["study_id"], row["image_id"]], "cannot be decoded to its size"))
            continue
        bits = imagehash.phash(Image.fromarray(grey_HW)).hash.ravel()
        facts.append(
            {name: row[name] for name in ("study_id", "image_id", "patient_id", "group", "split")}
            | {
                "report_hash": as_parsed(row["sentences"]).report_hash,
                "picture_hash": int.from_bytes(np.packbits(bits).tobytes(), "big"),
                "thumbnail": cv2.resize(grey_HW, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).tobytes(),
            }
        )
    return pa.Table.from_pylist(facts, schema=FACT_SCHEMA), findings


def check_counts(manifest: Manifest, facts: pd.DataFrame, whole: bool) -> list[Finding]:
    """What the manifest says of the whole set and is not so; ``whole``: every shard could be read."""
    hashes = joint_hash(group.content_hash for shard in manifest.shards for group in shard.row_groups)
    found = (
        [] if hashes == manifest.content_hash else [Finding("manifest", [MANIFEST], "content hash is of other shards")]
    )
    counts = {"rows": len(facts), "studies": facts["study_id"].nunique()} if whole else {}
    for name, count in counts.items():
        if count != getattr(manifest, name):
            found.append(
                Finding("manifest", [MANIFEST], f"says {getattr(manifest, name)} {name}; the shards hold {count}")
            )
    return found


def conclude(uri: str, manifest: Manifest, findings: list[Finding]) -> int:
    """Tell and write down what was found; the exit status."""
    terminal = console()
    for kind, count in Counter(finding.kind for finding in findings).items():
        terminal.print(f"[yellow]{kind}: {count}[/yellow]", highlight=False)
        for finding in [each for each in findings if each.kind == kind][:SHOWN]:
            terminal.print(f"  {' and '.join(finding.ids)} {finding.what}", highlight=False, markup=False)
    place = storage.join(uri, FINDINGS)
    if findings:
        lines = "".join(json.dumps(asdict(finding)) + "\n" for finding in findings)
        storage.write_bytes(place, lines.encode())
        terminal.print(f"all of them, with their ids: {place}", highlight=False)
    else:
        storage.delete_file(place)
    faults = [finding for finding in findings if finding.is_fault]
    sound = (
        f"{manifest.rows} rows in {len(manifest.shards)} shards are as they were written; no patient, group or film is in "
        "two splits"
    )
    terminal.print(f"{len(faults)} faults" if faults else sound, style="red" if faults else "green", highlight=False)
    return STATUS_FAILED if faults else 0
