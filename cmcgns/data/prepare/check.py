"""Check of a prepared set: damaged files, wrong counts, and patients, groups, films or reports in two splits."""

# N rows, P pairs of rows

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
from cmcgns.data.manifest import MANIFEST, Manifest, Shard, content_hash, joint_hash, read_manifest
from cmcgns.data.prepare.run import summary_table, task_context
from cmcgns.data.readers.prepared import decode_prepared
from cmcgns.data.record import PREPARED_SCHEMA
from cmcgns.data.reports import as_parsed
from cmcgns.data.scrub import identifiers
from cmcgns.errors import UserError
from cmcgns.storage import parquet
from cmcgns.terminal import console, quiet_terminal

MAX_BITS = 3
"""Bits by which the perceptual hashes of two copies of an image may differ, as after another encoding."""
MAX_LEVELS = 4.0
"""Mean difference in grey levels between thumbnails of two copies of an image."""
NO_REPORT = as_parsed([]).report_hash
BANDS = np.arange(0, 65, 16)
"""Bits of four bands: two hashes that differ in at most three bits agree in at least one band."""


@dataclass(frozen=True)
class Finding:
    """A problem of a prepared set."""

    kind: str
    ids: list[str]
    """Ids of the affected files, or study/film of the affected rows."""
    what: str

    @property
    def is_fault(self) -> bool:
        """Whether it fails the check; equal reports do not, because many reports of normal films are equal, nor do names and
        dates, which a set may keep on purpose."""
        return self.kind not in ("report in two splits", "identifier in report", "identifier in export")


def leaks(facts: pd.DataFrame) -> list[Finding]:
    """Every patient, group, film and report of ``facts`` (``FACT_SCHEMA``) that is in two splits."""
    rows = facts.assign(row=facts["study_id"] + "/" + facts["image_id"])
    return [
        *_shared(rows, "patient_id", "patient in two splits"),
        *_shared(rows[rows["group"] != rows["patient_id"]], "group", "group in two splits"),
        *_shared_films(rows),
        *_shared(rows[rows["report_hash"] != NO_REPORT], "report_hash", "report in two splits"),
    ]


def _shared(rows: pd.DataFrame, column: str, kind: str) -> Iterator[Finding]:
    """A finding for each value of ``column`` that occurs in several splits, with the first row of each."""
    shared = rows.groupby(column)["split"].transform("nunique") > 1
    for value, group in rows[shared].groupby(column, sort=False):
        first = group.drop_duplicates("split")
        name = f"{column.removesuffix('_id')} {value} " if column != "report_hash" else ""
        yield Finding(kind, list(first["row"]), f"{name}in {' and '.join(first['split'])} ({len(group)} films)")


def _shared_films(rows: pd.DataFrame) -> Iterator[Finding]:
    """A finding for each pair of films in two splits that show the same image."""
    hash_N = rows["picture_hash"].to_numpy(np.uint64)
    split_N = rows["split"].to_numpy(str)
    pair_P2 = _near(hash_N, split_N)
    thumbnails = rows["thumbnail"].to_numpy()
    names = rows["row"].to_numpy(str)
    for one, other in pair_P2:
        levels = [np.frombuffer(thumbnails[i], np.uint8).astype(float) for i in (one, other)]
        if np.abs(levels[0] - levels[1]).mean() <= MAX_LEVELS:
            what = f"are the same image, in {split_N[one]} and {split_N[other]}"
            yield Finding("film in two splits", [names[one], names[other]], what)


def _near(hash_N: np.ndarray, split_N: np.ndarray) -> np.ndarray:
    """Pairs (P, 2) of rows in two splits whose hashes differ in at most ``MAX_BITS`` bits."""
    near = [np.zeros((0, 2), np.int64)]
    for low, high in pairwise(BANDS):
        band_N = (hash_N >> np.uint64(low)) & np.uint64(2 ** int(high - low) - 1)
        table = pd.DataFrame({"band": band_N, "row": np.arange(len(hash_N)), "split": split_N})
        for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
            pairs = table[table["split"] == one].merge(table[table["split"] == other], on="band")
            pair_P2 = pairs[["row_x", "row_y"]].to_numpy(np.int64)
            bits_P = np.bitwise_count(hash_N[pair_P2[:, 0]] ^ hash_N[pair_P2[:, 1]])
            near.append(pair_P2[bits_P <= MAX_BITS])
    return np.unique(np.concatenate(near), axis=0)


FINDINGS = "findings.jsonl"
SHOWN = 5
"""Findings of each kind to print; all of them are in the set's ``findings.jsonl``."""
THUMBNAIL = 16
"""Side in pixels of the thumbnail of each film."""
FACT_IDS = ("study_id", "image_id", "patient_id", "group", "split")
FACT_SCHEMA = pa.schema(
    [
        *(PREPARED_SCHEMA.field(name) for name in FACT_IDS),
        pa.field("report_hash", pa.int64()),
        pa.field("picture_hash", pa.uint64()),
        pa.field("thumbnail", pa.binary(THUMBNAIL**2)),
    ]
)
"""What the search for leaks needs of each row."""


def check_set(uri: str) -> int:
    """Check a prepared set; returns 0 if it passes, 1 if it fails. Reports in two splits are listed but do not fail it."""
    uri, terminal = storage.absolute("prepare.out", uri).rstrip("/"), console()
    if not storage.exists(storage.join(uri, MANIFEST)):
        raise UserError(f"prepare.out {uri} has no complete prepared set (no {MANIFEST}); prepare it first")
    manifest = read_manifest(uri)
    findings = check_files(uri, manifest)
    lost = {finding.ids[0] for finding in findings if finding.kind == "shard"}
    with quiet_terminal(), ray_session():
        facts, of_shards = read_shards(uri, [shard for shard in manifest.shards if shard.name not in lost])
    findings += of_shards + check_counts(manifest, facts, complete=not lost and not of_shards) + leaks(facts)
    terminal.print(summary_table(manifest))
    return conclude(uri, manifest, findings)


def check_files(uri: str, manifest: Manifest) -> list[Finding]:
    """Missing shards, shards of another size, and unknown files."""
    existing = set(storage.list_files(uri))
    known = {MANIFEST, BAD_ROWS, FINDINGS, *(shard.name for shard in manifest.shards)}
    findings = [Finding("file", [name], "is not part of the set") for name in sorted(existing - known)]
    for shard in manifest.shards:
        if shard.name not in existing:
            findings.append(Finding("shard", [shard.name], "is missing"))
        elif (size := storage.file_size(storage.join(uri, shard.name))) != shard.bytes:
            findings.append(Finding("shard", [shard.name], f"has {size} bytes, not {shard.bytes}"))
    return findings


def read_shards(uri: str, shards: Sequence[Shard]) -> tuple[pd.DataFrame, list[Finding]]:
    """Facts of every row of the shards, and findings, by one Ray Data task per shard."""
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
    """A Ray Data task: facts and findings of the shards of these ``numbers``; an error of storage is returned as a row."""
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
        as_json = json.dumps([asdict(finding) for finding in findings])
        rows.append({"facts": sink.getvalue().to_pybytes(), "findings": as_json, "failure": ""})
    return pa.Table.from_pylist(rows)


def read_shard(uri: str, shard: Shard) -> tuple[pa.Table, list[Finding]]:
    """Facts of every row of a shard, and differences from the manifest."""
    path = storage.join(uri, shard.name)
    facts, findings = [FACT_SCHEMA.empty_table()], []
    try:
        footer = parquet.read(path, lambda file: file.metadata, PREPARED_SCHEMA)
        if footer.num_row_groups != len(shard.row_groups):
            return facts[0], [Finding("shard", [shard.name], f"has {footer.num_row_groups} row groups")]
        for number, expected in enumerate(shard.row_groups):
            name = f"{shard.name}#{number}"
            try:
                rows = parquet.read(path, lambda file, number=number: file.read_row_group(number), footer=footer)  # type: ignore[misc]
            except storage.BrokenFileError:
                findings.append(Finding("row group", [name], "is broken"))
                continue
            if len(rows) != expected.rows or content_hash(rows.select(PREPARED_SCHEMA.names)) != expected.content_hash:
                findings.append(
                    Finding("row group", [name], f"is not what was written ({len(rows)} of {expected.rows} rows)")
                )
            group_facts, group_findings = facts_of(rows)
            facts.append(group_facts)
            findings += group_findings
    except storage.BrokenFileError:
        findings.append(Finding("shard", [shard.name], "is truncated or broken"))
    return pa.concat_tables(facts), findings


def facts_of(rows: pa.Table) -> tuple[pa.Table, list[Finding]]:
    """Facts of ``rows``, and findings about films that cannot be decoded to the size in the row."""
    facts, findings = [], []
    for row in rows.to_pylist():
        grey_HW = decode_prepared(row["image"])
        if grey_HW is None or grey_HW.shape != (row["height"], row["width"]):
            findings.append(Finding("film", [row["study_id"], row["image_id"]], "cannot be decoded to its size"))
            continue
        kinds = sorted(set(identifiers(row["report"])))
        if kinds:
            findings.append(
                Finding("identifier in report", [row["study_id"], row["image_id"]], f"has {' and '.join(kinds)}")
            )
        bits = imagehash.phash(Image.fromarray(grey_HW)).hash.ravel()
        facts.append(
            {name: row[name] for name in FACT_IDS}
            | {
                "report_hash": as_parsed(row["sentences"]).report_hash,
                "picture_hash": int.from_bytes(np.packbits(bits).tobytes(), "big"),
                "thumbnail": cv2.resize(grey_HW, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).tobytes(),
            }
        )
    return pa.Table.from_pylist(facts, schema=FACT_SCHEMA), findings


def check_counts(manifest: Manifest, facts: pd.DataFrame, complete: bool) -> list[Finding]:
    """Wrong totals in the manifest; ``complete``: every shard could be read."""
    hashes = joint_hash(group.content_hash for shard in manifest.shards for group in shard.row_groups)
    findings = []
    if hashes != manifest.content_hash:
        findings.append(Finding("manifest", [MANIFEST], "has a content hash that does not match its shards"))
    counts = {"rows": len(facts), "studies": facts["study_id"].nunique()} if complete else {}
    for name, count in counts.items():
        if count != getattr(manifest, name):
            text = f"says {getattr(manifest, name)} {name}, the shards have {count}"
            findings.append(Finding("manifest", [MANIFEST], text))
    return findings


def print_findings(findings: list[Finding]) -> None:
    """Print the first findings of each kind, and the number of all."""
    terminal = console()
    for kind, count in Counter(finding.kind for finding in findings).items():
        terminal.print(f"[yellow]{kind}: {count}[/yellow]", highlight=False)
        for finding in [each for each in findings if each.kind == kind][:SHOWN]:
            terminal.print(f"  {' and '.join(finding.ids)} {finding.what}", highlight=False, markup=False)


def conclude(uri: str, manifest: Manifest, findings: list[Finding]) -> int:
    """Print and store the findings; returns the exit status."""
    terminal = console()
    print_findings(findings)
    path = storage.join(uri, FINDINGS)
    if findings:
        lines = "".join(json.dumps(asdict(finding)) + "\n" for finding in findings)
        storage.write_bytes(path, lines.encode())
        terminal.print(f"all findings with their ids: {path}", highlight=False, markup=False)
    else:
        storage.delete_file(path)
    faults = [finding for finding in findings if finding.is_fault]
    passed = f"{manifest.rows} rows in {len(manifest.shards)} shards are unchanged; no patient, group or film is in two splits"
    terminal.print(f"{len(faults)} faults" if faults else passed, style="red" if faults else "green", highlight=False)
    return STATUS_FAILED if faults else 0
