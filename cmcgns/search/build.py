"""The build of an index: embeds the films and reports of a corpus shard by shard, and continues where it was killed.

F films of the corpus, N of one shard, D embedding.
"""

import hashlib
import json
import shlex
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import yaml
from rich.console import Console

from cmcgns import storage
from cmcgns.bad_rows import read_bad_rows, write_bad_rows
from cmcgns.cli import invocation
from cmcgns.cluster.coordinator import start_coordinator
from cmcgns.cluster.placement import bundles
from cmcgns.cluster.session import ONE_CPU
from cmcgns.data.order import Arrangement
from cmcgns.data.record import Block
from cmcgns.errors import UserError, cause
from cmcgns.evaluate.embed import EmbedRows, Split, embedded, open_split
from cmcgns.faiss_install import check_faiss
from cmcgns.job import Job, check_capacity, run
from cmcgns.library.runs import PretrainedRun, open_model
from cmcgns.run_folder import RunFolder, refuse_changes, write_config
from cmcgns.search import nearest
from cmcgns.search.config import SearchConfig, SearchJobConfig
from cmcgns.search.manifest import (
    FILMS,
    INDEX,
    PLAN,
    REPORTS,
    Manifest,
    Shard,
    read_manifest,
    shard_file,
    verified_files,
)
from cmcgns.search.shard import DONE, ShardWriter, in_shards, shard_bounds, vectors
from cmcgns.terminal import print_plan

FLAT_FILMS = 100_000
"""Most films of an index that `auto` makes flat."""
FREE_TO_CHANGE = {"search": {
    "workers", "cpus_per_worker", "use_gpu", "batch_size", "trusted", "run", "uri", "index", "film", "text", "report", "k",
    "json", "page", "serve", "host", "port", "hosts", "upload_mib",
}}  # fmt: skip
"""Settings with which a build may be continued otherwise; run and corpus are compared by their content."""


class EmbedFilms(EmbedRows):
    """Takes films with their reports, returns their rows of the index, vectors and pictures."""

    settings: SearchConfig

    def table(self, block: Block, studies: pa.Table, sentences: pa.ListArray) -> pa.Table:
        _, outputs = self.embed.outputs(block)
        pictures = (
            [cv2.imencode(".png", film_RR)[1].tobytes() for film_RR in block.images_BRR]
            if self.settings.pictures
            else []
        )
        film = studies["films"].combine_chunks().flatten()
        return pa.table(
            {
                "position": block.positions,
                "study_id": studies["study_id"],
                "path": film.field("path"),
                "view": film.field("view"),
                "split": studies["split"],
                "report_hash": block.report_hashes,
                "sentences": sentences,
                "png": pa.array(pictures or [b""] * len(block), pa.binary()),
                "film": vectors(outputs.image_BD),
                "report": vectors(outputs.report_BD),
            }
        )


def by_film(split: Split) -> Split:
    """The split with one row for each film of a study, in place of one for each study."""
    films = split.studies["films"].combine_chunks()
    study_F = np.repeat(np.arange(len(films)), pc.list_value_length(films).to_numpy())
    alone = pa.ListArray.from_arrays(pa.array(np.arange(len(study_F) + 1, dtype=np.int32)), films.flatten())
    studies = split.studies.take(study_F)
    studies = studies.set_column(studies.schema.get_field_index("films"), "films", alone).combine_chunks()
    was = split.arrangement
    return replace(
        split, studies=studies, arrangement=Arrangement(was.key_S[study_F], was.group_S[study_F], was.groups)
    )


@dataclass(frozen=True)
class Plan:
    """What a build was begun with, besides its settings."""

    model: str
    """Identity of the run."""
    digest: str
    """Hash of the films of the corpus."""
    bounds: list[int]


class BuildJob(Job):
    """Builds an index; repeated, it continues."""

    script = "search"
    resume_key = ""
    packages = ("cmcgns", "ray", "torch", "transformers", "pyarrow", "numpy")

    def __init__(self, config: SearchJobConfig) -> None:
        check_faiss("cpu")
        own = config.search
        self.model_run = open_model("search.run", own.run, own.trusted)
        if self.model_run.alone and own.uri is None:
            raise UserError(
                f"search.run {own.run} is an export, which does not say where its corpus is; give search.uri"
            )
        self.split = by_film(open_split(self.model_run, own, "search"))
        paths = {"run": self.model_run.uri, "index": storage.absolute("search.index", own.index).rstrip("/")}
        if own.uri is not None:
            paths["uri"] = self.split.config.data.uri
        self.settings: SearchConfig = own.model_copy(update=paths)
        self.config = config.model_copy(update={"search": self.settings})
        uri, films = self.settings.index, len(self.split.studies)
        self.kind: nearest.Kind = own.kind if own.kind != "auto" else "ivf" if films > FLAT_FILMS else "flat"
        begun = storage.exists(storage.join(uri, "config.yaml"))
        self.folder = RunFolder(*uri.rpartition("/")[::2], resumed=begun)
        self.begun_with = Plan(
            self.model_run.identity(), digest(self.split), shard_bounds(self.split.studies, own.shard_films)
        )
        if begun:
            self.refuse_another()
        self.coordinator: Any = None

    def refuse_another(self) -> None:
        """Raise ``UserError`` if the folder has an index by another run, of another corpus or with other settings."""
        uri = self.settings.index
        if "search" not in yaml.safe_load(storage.read_bytes(storage.join(uri, "config.yaml"))):
            raise UserError(f"search.index {uri} is the folder of another job; give a new folder")
        refuse_changes(self.config, self.folder, FREE_TO_CHANGE)
        if self.is_complete():
            known = read_manifest(uri)
            model, corpus = known.model["identity"], known.corpus["digest"]
        elif storage.exists(storage.join(uri, PLAN)):
            began = json.loads(storage.read_bytes(storage.join(uri, PLAN)))
            model, corpus = began["model"], began["digest"]
        else:  # killed before it began
            return
        if model != self.begun_with.model:
            raise UserError(f"search.index {uri} was begun by another run than {self.model_run.uri}; give a new folder")
        if corpus != self.begun_with.digest:
            raise UserError(
                f"search.index {uri} was begun with other films than {self.split.source.uri} has now; give a new folder"
            )

    def is_complete(self) -> bool:
        """Whether the index exists."""
        return storage.exists(storage.join(self.settings.index, INDEX))

    def needed(self) -> list[dict[str, float]]:
        own = self.settings
        return [*bundles(own.workers, own.cpus_per_worker, own.use_gpu), ONE_CPU]

    def check_cluster(self, cpus: float) -> None:
        own = self.settings
        check_capacity("search", "worker", own.workers, own.cpus_per_worker, own.use_gpu, kept=1)

    def plan(self, cpus: float) -> dict[str, str]:
        own, films = self.settings, len(self.split.studies)
        return {
            "index": f"{own.index} ({self.kind}), {len(self.done())} of {len(self.begun_with.bounds) - 1} shards are finished",
            "model": self.model_run.export,
            "films": f"{films} of {self.split.source.uri} ({own.split}); {'with' if own.pictures else 'without'} pictures",
            "workers": f"{own.workers} x {own.cpus_per_worker:g} CPU{' + GPU' if own.use_gpu else ''}, "
            f"{own.batch_size} films a forward; the cluster has {cpus:g} CPUs",
        }

    def done(self) -> list[Shard]:
        """The finished shards; they are the first ones."""
        shards = list[Shard]()
        while storage.exists(path := storage.join(self.settings.index, shard_file(len(shards), DONE))):
            shards.append(Shard(**json.loads(storage.read_bytes(path))))
        return shards

    def run(self, terminal: Console) -> dict[str, Any]:
        own, began = self.settings, time.perf_counter()
        write_config(self.folder, self.config)
        storage.clear_leftovers(own.index)
        self.folder.write_json(PLAN, asdict(self.begun_with))
        shards, bounds = self.done(), self.begun_with.bounds
        known_bad = read_bad_rows(own.index)
        self.coordinator = start_coordinator(
            len(self.split.studies), self.split.config.data.max_bad_fraction, known_bad
        )
        if len(shards) < len(bounds) - 1:
            shards += self.make_shards(terminal, len(shards))
        if not any(shard.films for shard in shards):
            raise UserError(f"search.index {own.index}: no film of the corpus can be used; its bad_rows.jsonl says why")
        complete(own.index, self.model_run, self.begun_with.model, self.corpus(), self.kind, own.recall, shards)
        return {"seconds": round(time.perf_counter() - began, 1)}

    def corpus(self) -> dict[str, Any]:
        """What index.json says of the corpus."""
        source = self.split.source
        return {
            "uri": source.uri,
            "format": source.format,
            "split": self.settings.split,
            "digest": self.begun_with.digest,
        }

    def make_shards(self, terminal: Console, first: int) -> list[Shard]:
        """Embed and write the shards from ``first`` on."""
        own, bounds, shards = self.settings, self.begun_with.bounds, list[Shard]()
        dim = self.model_run.config.model.embed_dim
        columns = self.split.studies.select(["study_id", "films", "split"])
        open_shard = lambda number: ShardWriter(own.index, number, self.kind, dim, own.pictures)
        with (
            embedded(EmbedFilms, self.model_run, own, self.split, self.coordinator, columns, bounds[first]) as rows,
            ExitStack() as stack,
        ):
            writer = stack.enter_context(open_shard(first))
            tables = rows.iter_batches(batch_size=None, batch_format="pyarrow")
            for number, table in in_shards(tables, bounds[first:]):
                if table is not None:
                    writer.add(table)
                    continue
                write_bad_rows(own.index, ray.get(self.coordinator.account.remote())["bad_rows"])
                shards.append(writer.finish())
                terminal.print(
                    f"shard {first + number + 1}/{len(bounds) - 1}: {shards[-1].films} films, {shards[-1].reports} reports",
                    highlight=False,
                )
                stack.close()
                if first + number + 2 < len(bounds):
                    writer = stack.enter_context(open_shard(first + number + 1))
        return shards

    def reason(self, error: Exception) -> str:
        failure = None if self.coordinator is None else ray.get(self.coordinator.failure.remote())
        return failure or cause(error)

    def write_result(self, result: dict[str, Any]) -> None:
        """Nothing: index.json makes the index complete."""

    def report(self, terminal: Console, result: dict[str, Any]) -> None:
        super().report(terminal, result)
        if result["status"] != "finished":
            terminal.print("finished shards are kept; run the same command again to make the others", highlight=False)

    def summary(self, result: dict[str, Any]) -> dict[str, str]:
        return describe(self.settings.index) | {"finished": f"{result['seconds']} s", "query": self.query_command()}

    def query_command(self) -> str:
        """A first query of the index."""
        return f"{' '.join(invocation('search'))} --search.index={shlex.quote(self.settings.index)} --search.text='No effusion.'"


def describe(uri: str) -> dict[str, str]:
    """What the index at ``uri`` holds, for the terminal."""
    found = read_manifest(uri)
    recalls = {f"{of} by {by}": value for of, ways in found.recall_at_10.items() for by, value in ways.items()}
    return {
        "index": uri,
        "content": f"{found.films} films and {found.reports} reports in {len(found.shards)} shards, {found.bad_rows} bad rows",
        "search": found.kind
        if found.kind == "flat"
        else f"ivf, recall@10 against flat: {', '.join(f'{name} {value:.3f}' for name, value in recalls.items())}",
    }


def complete(
    uri: str,
    run: PretrainedRun,
    identity: str,
    corpus: dict[str, Any],
    kind: nearest.Kind,
    least_recall: float,
    shards: list[Shard],
) -> None:
    """Measure the recall of an approximate index and write index.json, which makes the index at ``uri`` complete."""
    share, found = {"films": 1.0, "reports": 1.0}, dict[str, dict[str, float]]()
    if kind == "ivf":
        share, found = measured(uri, shards, least_recall)
    manifest = Manifest(
        model={"uri": run.uri, "identity": identity, "method": run.config.method.name},
        dim=run.config.model.embed_dim,
        resize=run.config.data.resize,
        corpus=corpus,
        kind=kind,
        share=share,
        recall_at_10=found,
        shards=shards,
        bad_rows=len(read_bad_rows(uri)),
        versions={name: metadata.version(name) for name in BuildJob.packages},
    )
    storage.write_bytes(storage.join(uri, INDEX), manifest.to_json())
    clear(uri, len(shards))


def clear(uri: str, shards: int) -> None:
    """Delete the files that only an incomplete index needs."""
    storage.delete_file(storage.join(uri, PLAN))
    for number in range(shards):
        storage.delete_file(storage.join(uri, shard_file(number, DONE)))
    storage.clear_leftovers(uri)


def measured(uri: str, shards: list[Shard], least: float) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Shares of lists to look into, and recall by kind of query, of the films and the reports of ``shards``."""
    share, found = dict[str, float](), dict[str, dict[str, float]]()
    with storage.scratch_folder() as scratch:
        folder = verified_files(uri, shards, [FILMS, REPORTS], scratch)
        read = lambda name: nearest.Shards(
            [nearest.read(folder / (file := shard_file(number, name)), file) for number in range(len(shards))]
        )
        sets = {"films": read(FILMS), "reports": read(REPORTS)}
        queries = {name: each.sample(nearest.SAMPLE) for name, each in sets.items()}
        for name, each in sets.items():
            share[name], found[name] = nearest.tune(each, queries, least, own=name)
    return share, found


def digest(split: Split) -> str:
    """Hash of the films and their studies, in order."""
    films = split.studies["films"].combine_chunks().flatten().field("path")
    text = "\n".join([*split.studies["study_id"].to_pylist(), *films.to_pylist()])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def build_index(config: SearchJobConfig, terminal: Console) -> int:
    """Exit status of a build: 0 complete, 1 failed, 130 stopped by the user. Finished shards are kept."""
    job = BuildJob(config)
    if job.is_complete():
        clear(job.settings.index, len(read_manifest(job.settings.index).shards))
        done = {"finished": "before; nothing was built. Another index needs a new folder", "query": job.query_command()}
        print_plan(terminal, describe(job.settings.index) | done)
        return 0
    return run(job)
