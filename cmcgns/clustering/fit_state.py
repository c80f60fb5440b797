"""What a fit keeps in its folder while it runs: settings, the state to go on from, one row of metrics an iteration."""

import json
import time

import numpy as np
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from cmcgns.clustering.embeddings import Embeddings
from cmcgns.clustering.job_config import KMeansConfig
from cmcgns.clustering.kmeans import Array, Fit, normalised
from cmcgns.clustering.rows import check_rows
from cmcgns.command_line import to_yaml
from cmcgns.data import storage
from cmcgns.errors import UserError, starting_with
from cmcgns.run_folder import RunFolder, name_taken

STATE, METRICS = "fit.safetensors", "metrics.jsonl"


def first_fit(config: KMeansConfig, folder: RunFolder, embeddings: Embeddings) -> Fit | None:
    """Where the fit goes on, or starts from; None where it is still to be seeded."""
    settings = config.clustering
    if folder.resumed and storage.exists(folder.file(STATE)):
        fit = from_bytes(storage.read_bytes(folder.file(STATE)))
        if fit.centroids_KD.shape[1] != embeddings.dim:
            raise UserError(
                f"run.resume {folder.name} clusters vectors of {fit.centroids_KD.shape[1]} numbers; those of "
                f"{embeddings.uri} have {embeddings.dim}"
            )
        return fit
    if settings.start_from is None:
        return None
    return Fit(read_centroids(settings.start_from, (settings.num_clusters, embeddings.dim)))


def read_centroids(uri: str, shape: tuple[int, int]) -> Array:
    """Centroids of length 1 of a fit or of a pretraining export, refused where they are not of ``shape`` (K, D)."""
    key = f"clustering.start_from {uri}"
    try:
        held = safetensors.load(storage.read_bytes(uri))
    except UserError as error:
        raise UserError(f"clustering.start_from {starting_with(uri, str(error))}") from None
    except SafetensorError as error:
        raise UserError(f"{key} is no safetensors file ({error}); name a centroids.safetensors") from None
    rows_KD = held.get("rows_KD")
    if rows_KD is None or rows_KD.shape != shape:
        given = f"has the shape {rows_KD.shape}" if rows_KD is not None else f"holds {', '.join(held)} and no rows_KD"
        raise UserError(f"{key} {given}; {shape} (K, D) is wanted here")
    check_rows(
        rows_KD, lambda row: f"{key}: row {row}"
    )  # zero where clustering never started in the run that was exported
    unit = np.allclose(np.linalg.norm(rows_KD, axis=1), 1.0, rtol=0, atol=1e-6)
    return rows_KD if unit else normalised(rows_KD)  # a second division would change their last bits


def write_start(folder: RunFolder, config: KMeansConfig) -> None:
    """Take the name, and write down the settings."""
    if storage.exists(folder.file("config.yaml")):  # another fit of that name began while this one looked around
        raise UserError(name_taken(folder))
    storage.write_bytes(folder.file("config.yaml"), to_yaml(config).encode())


def keep(folder: RunFolder, fit: Fit) -> None:
    """Write down all that it takes to go on from ``fit``."""
    storage.write_bytes(folder.file(STATE), to_bytes(fit))


def to_bytes(fit: Fit) -> bytes:
    """``fit`` as safetensors."""
    figures = np.array([fit.iteration, fit.objective, fit.reseeded, fit.near_ties, fit.converged], np.float64)
    totals = {} if fit.totals_KD is None else {"totals_KD": fit.totals_KD}
    return bytes(safetensors.save({"centroids_KD": fit.centroids_KD, "figures": figures} | totals))


def from_bytes(data: bytes) -> Fit:
    """The ``Fit`` that ``to_bytes`` wrote."""
    held = safetensors.load(data)
    iteration, objective, reseeded, near_ties, converged = held["figures"].tolist()
    return Fit(
        held["centroids_KD"],
        int(iteration),
        objective,
        int(reseeded),
        int(near_ties),
        bool(converged),
        held.get("totals_KD"),
    )


class Diary:
    """metrics.jsonl: one row for each iteration, also over a resume."""

    def __init__(self, folder: RunFolder, iteration: int) -> None:
        self.folder, self.last = folder, time.perf_counter()
        lines = storage.read_bytes(folder.file(METRICS)).decode().splitlines() if iteration else []
        self.rows = [row for row in map(json.loads, lines) if row["iteration"] <= iteration]

    def write(self, fit: Fit, actors_lost: int) -> str:
        """Write the row of ``fit``; the same in words."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self.rows.append(
            {
                "iteration": fit.iteration,
                "objective": fit.objective,
                "reseeded": fit.reseeded,
                "near_ties": fit.near_ties,
                "actors_lost": actors_lost,
                "seconds": seconds,
            }
        )
        storage.write_bytes(self.folder.file(METRICS), "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        return (
            f"iteration {fit.iteration}: mean similarity {fit.objective:.6f}, {fit.reseeded} re-seeded, "
            f"{fit.near_ties} near ties, {seconds:.2f} s"
        )
