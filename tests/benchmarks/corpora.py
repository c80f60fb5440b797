"""Corpora for benchmarks of the data path, large by repetition: few films are drawn, many are read."""

import io
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cmcgns.data.manifest import Manifest, Shard, describe_row_group, joint_hash
from cmcgns.data.record import PREPARED_SCHEMA
from cmcgns.data.reports import parse_report
from cmcgns.phantom import PhantomCorpus
from tests.s3 import running_server

GROUP = 256
DRAWN = 512
"""Different films of a repeated corpus."""
GROUPS_PER_SHARD = 8
GRAIN = 3.0
"""Standard deviation of the noise that makes a drawn film as heavy as a real one, grey levels."""


def jpeg(grey_HW: np.ndarray, quality: int = 90) -> bytes:
    file = io.BytesIO()
    Image.fromarray(grey_HW).save(file, "JPEG", quality=quality)
    return file.getvalue()


def grainy_film(number: int, height: int, width: int) -> np.ndarray:
    """A drawn film with the grain of a real one."""
    grey_HW = PhantomCorpus(DRAWN, seed=2, height=height, width=width).render(number)
    noise = np.random.default_rng(number).normal(0, GRAIN, grey_HW.shape)
    return np.clip(grey_HW + noise, 0, 255).astype(np.uint8)


def prepared_set(folder: Path, studies: int, side: int = 256) -> str:
    """A prepared set of ``studies`` one-film training studies, JPEGs of ``side`` pixels."""
    folder.mkdir(parents=True)
    corpus = PhantomCorpus(DRAWN, seed=2)
    films = [jpeg(grainy_film(number, side, side), 95) for number in range(DRAWN)]
    reports = [corpus.study(number).report for number in range(DRAWN)]
    sentences = [parse_report(report).sentences for report in reports]

    def row(number: int) -> dict[str, Any]:
        drawn = number % DRAWN
        ids = {name: f"{name[0]}{number}" for name in ("patient_id", "study_id", "group", "image_id", "source")}
        return ids | {
            "view": "PA", "split": "train", "image": films[drawn], "height": side, "width": side, "crop": [0, 0, side, side],
            "report": reports[drawn], "sentences": sentences[drawn], "labels": [],
        }  # fmt: skip

    groups = -(-studies // GROUP)
    shards = []
    for first in range(0, groups, GROUPS_PER_SHARD):
        name, row_groups = f"train-{first:05d}.parquet", []
        with pq.ParquetWriter(folder / name, PREPARED_SCHEMA, compression="none", use_dictionary=False) as writer:
            for group in range(first, min(first + GROUPS_PER_SHARD, groups)):
                numbers = range(group * GROUP, min((group + 1) * GROUP, studies))
                rows = pa.Table.from_pylist([row(number) for number in numbers], schema=PREPARED_SCHEMA)
                writer.write_table(rows, row_group_size=len(rows))
                row_groups.append(describe_row_group(group, rows, len(rows)))
        shards.append(Shard(name, "train", (folder / name).stat().st_size, row_groups))
    joint = joint_hash(group.content_hash for shard in shards for group in shard.row_groups)
    manifest = Manifest(studies, studies, joint, {"train": groups}, shards, {}, {}, 0, {})
    (folder / "manifest.json").write_text(manifest.to_json())
    return str(folder)


def _write_film(path: Path, number: int, height: int, width: int) -> None:
    path.write_bytes(jpeg(grainy_film(number, height, width)))


def write_raw_films(folder: Path, films: int, height: int = 2500, width: int = 3000, drawn: int = 24) -> None:
    """``folder/pairs.csv`` and ``films`` JPEGs, of which ``drawn`` are different."""
    (folder / "images").mkdir(parents=True)
    drawn = min(drawn, films)
    with ProcessPoolExecutor(2) as pool:
        names = [folder / "images" / f"{number}.jpg" for number in range(drawn)]
        list(pool.map(_write_film, names, range(drawn), [height] * drawn, [width] * drawn))
    for number in range(drawn, films):
        (folder / "images" / f"{number}.jpg").write_bytes((folder / "images" / f"{number % drawn}.jpg").read_bytes())
    corpus = PhantomCorpus(films, seed=2)
    reports = [json.dumps(corpus.study(number).report.replace("\n", " ").replace('"', "")) for number in range(films)]
    lines = [f"images/{number}.jpg,{report},train" for number, report in enumerate(reports)]
    (folder / "pairs.csv").write_text("\n".join(["image,report,split", *lines]) + "\n")


def many_rows(folder: Path, rows: int, films: int = 32) -> Path:
    """``folder`` with a pairs.csv of ``rows`` training studies that show ``films`` small films in turn."""
    (folder / "images").mkdir(parents=True)
    for number in range(films):
        (folder / "images" / f"{number}.jpg").write_bytes(jpeg(grainy_film(number, 64, 64)))
    lines = (f"images/{number % films}.jpg,Nodule {number} is seen.,s{number},train" for number in range(rows))
    (folder / "pairs.csv").write_text("image,report,study,split\n" + "\n".join(lines) + "\n")
    return folder


@contextmanager
def raw_films(scratch: Path, films: int) -> Iterator[str]:
    """URI of ``films`` raw films on the S3 server, which runs meanwhile; its keys are in the environment."""
    import os

    write_raw_films(scratch / "raw", films)
    with running_server(scratch / "server") as server:
        before = dict(os.environ)
        os.environ.update(server.environment)
        try:
            uri = server.make_bucket("films") + "/raw"
            server.upload(scratch / "raw", uri)
            yield uri
        finally:
            for name in server.environment.keys() - before.keys():
                del os.environ[name]
            os.environ.update(before)
