"""What a fit shows on the terminal: its plan, and its largest clusters."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cmcgns.clustering.embeddings import Embeddings
from cmcgns.clustering.job_config import KMeansConfig
from cmcgns.clustering.kmeans import Fit
from cmcgns.run_folder import RunFolder

SHOWN_CLUSTERS = 5


def describe_plan(config: KMeansConfig, folder: RunFolder, embeddings: Embeddings, start: Fit | None) -> dict[str, str]:
    """What is about to run, where, and on how much."""
    settings = config.clustering
    files = len({group.uri for group in embeddings.groups})
    share = embeddings.rows / settings.actors * embeddings.dim * 4 / 2**30
    held = (
        "in memory" if share <= settings.memory_gib else f"on disk (clustering.memory_gib is {settings.memory_gib:g})"
    )
    if settings.streamed:
        held = "read anew for each pass"
    fit = f"K = {settings.num_clusters}, at most {settings.iterations} iterations"
    if settings.batch_rows is not None:
        fit += f" of about {settings.batch_rows} rows"
    begin = f"{settings.seeding} seeding" if start is None else settings.start_from or "k-means"
    if folder.resumed and start is not None:
        begin = f"iteration {start.iteration} of {folder.name}"
    return {
        "data": f"{embeddings.uri}: {embeddings.rows} rows of {embeddings.dim} in {files} files",
        "fit": f"{fit}, from {begin}",
        "pool": f"{settings.actors} actors of {settings.cpus_per_actor:g} CPUs and {settings.gpus_per_actor:g} GPUs "
        f"({settings.device}); {share:.2f} GiB of rows each, {held}",
        "folder": folder.uri,
    }


def show_clusters(terminal: Console, found: dict[str, Any]) -> None:
    """The largest clusters, with the rows nearest to their centroids."""
    largest = sorted(found["clusters"], key=lambda cluster: -cluster["size"])[:SHOWN_CLUSTERS]
    table = Table("cluster", "size", "cohesion", "nearest", box=None, pad_edge=False)
    for cluster in largest:
        nearest = " | ".join(str(row.get("text") or row["id"]) for row in cluster["nearest"])
        cohesion = f"{cluster['cohesion']:.3f}" if cluster["size"] else "-"
        table.add_row(str(cluster["cluster"]), str(cluster["size"]), cohesion, escape(nearest))
    terminal.print(table)
