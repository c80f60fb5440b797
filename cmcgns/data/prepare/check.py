"""Check of a prepared set: damaged files, wrong counts, and what is in two splits (``leaks``)."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import islice

import imagehash
import numpy as np
import pyarrow as pa
import ray
import ray.data  # before ray_session, which quiets its log
from PIL import Image

from cmcgns import storage
from cmcgns.bad_rows import BAD_ROWS
from cmcgns.cli import STATUS_FAILED
from cmcgns.cluster.session import ray_session
from cmcgns.data.manifest import MANIFEST, Manifest, Shard, content_hash, joint_hash, part_names, read_manifest
from cmcgns.data.prepare.leaks import FACT_SCHEMA, IDS, Facts, Finding, facts_on_disk, leaks, thumbnail
from cmcgns.data.prepare.run import task_context
from cmcgns.data.prepare.summary import summary_table
from cmcgns.data.readers.prepared import decode_prepared
from cmcgns.data.record import PREPARED_SCHEMA
from cmcgns.data.reports import as_parsed
from cmcgns.data.scrub import identifiers
from cmcgns.errors import UserError
from cmcgns.storage import parquet
from cmcgns.storage.ahead import map_ahead
from cmcgns.terminal import console, quiet_terminal

FINDINGS = "findings.jsonl"
SHOWN = 5
"""Findings of each kind to print; all of them are in the set's ``findings.jsonl``."""
SHARDS_AT_ONCE = 256
"""Shards of one Ray dataset: every task gets their entries of the manifest."""
SIZE_THREADS = 16


def check_set(uri: str) -> int:
    """Check a prepared set; returns 0 if it passes, 1 if it fails. Reports in two splits are listed but do not fail it."""
    uri, terminal = storage.absolute("prepare.out", uri).rstrip("/"), console()
    if not storage.exists(storage.join(uri, MANIFEST)):
        raise UserError(f"prepare.out {uri} has no complete prepared set (no {MANIFEST}); prepare it first")
    manifest = read_manifest(uri)
    findings = check_files(uri, manifest)
    lost = {finding.ids[0] for finding in findings if finding.kind == "shard"}
    with facts_on_disk(manifest.rows) as facts:
        with quiet_terminal(), ray_session():
            of_shards = read_shards(uri, (shard for shard in manifest.shards if shard.name not in lost), facts)
        findings += of_shards + check_counts(manifest, facts, complete=not lost and not of_shards) + leaks(facts)
    terminal.print(summary_table(manifest))
    return conclude(uri, manifest, findings)


def check_files(uri: str, manifest: Manifest) -> list[Finding]:
    """Missing shards, shards of another size, and unknown files."""
    existing = set(storage.list_files(uri))
    known = {MANIFEST, BAD_ROWS, FINDINGS, *part_names(manifest)}
    findings = []

    def size(shard: Shard) -> tuple[Shard, int | None]:
        return shard, storage.file_size(storage.join(uri, shard.name)) if shard.name in existing else None

    for shard, found in map_ahead(size, manifest.shards, SIZE_THREADS):
        known.add(shard.name)
        if found is None:
            findings.append(Finding("shard", [shard.name], "is missing"))
        elif found != shard.bytes:
            findings.append(Finding("shard", [shard.name], f"has {found} bytes, not {shard.bytes}"))
    return [Finding("file", [name], "is not part of the set") for name in sorted(existing - known)] + findings


def read_shards(uri: str, shards: Iterable[Shard], facts: Facts) -> list[Finding]:
    """Findings of the shards, by one Ray Data task per shard; adds the facts of every row to ``facts``."""
    rest, findings = iter(shards), list[Finding]()
    while some := list(islice(rest, SHARDS_AT_ONCE)):
        with task_context(in_order=True):
            rows = ray.data.range(len(some), override_num_blocks=len(some)).map_batches(
                read_numbered, batch_format="pyarrow", num_cpus=1, fn_kwargs={"uri": uri, "shards": some}
            )
            for row in rows.iter_rows():
                if row["failure"]:
                    raise UserError(row["failure"])
                findings += [Finding(**each) for each in json.loads(row["findings"])]
                facts.add(pa.ipc.open_stream(row["facts"]).read_all())
    return findings


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
            {name: row[name] for name in (*IDS, "split")}
            | {
                "report_hash": as_parsed(row["sentences"]).report_hash,
                "picture_hash": int.from_bytes(np.packbits(bits).tobytes(), "big"),
                "thumbnail": thumbnail(grey_HW),
            }
        )
    return pa.Table.from_pylist(facts, schema=FACT_SCHEMA), findings


def check_counts(manifest: Manifest, facts: Facts, complete: bool) -> list[Finding]:
    """Wrong totals in the manifest; ``complete``: every shard could be read."""
    hashes = joint_hash(group.content_hash for shard in manifest.shards for group in shard.row_groups)
    findings = []
    if hashes != manifest.content_hash:
        findings.append(Finding("manifest", [MANIFEST], "has a content hash that does not match its shards"))
    counts = {"rows": len(facts), "studies": facts.distinct("study")} if complete else {}
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
