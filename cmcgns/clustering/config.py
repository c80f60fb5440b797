"""Settings of `jobs/kmeans.py`."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from cmcgns.clustering.kmeans import BLOCK_ROWS
from cmcgns.config import PoolConfig, RunConfig, Section


class EmbeddingsConfig(Section):
    uri: str = ""
    """Location of the embeddings: a `.parquet` file, a local folder of them, or `s3://bucket/prefix`."""
    id_column: str = "id"
    """Column that identifies a row; written with its centroids."""
    vector_column: str = "vector"
    """Column of float lists of equal length; rows are scaled to length 1."""
    weight_column: str | None = None
    """Column of positive weights; by default all rows weigh the same."""
    text_column: str | None = None
    """Column with the sentence, shown for the rows nearest to each centroid."""


class FitConfig(PoolConfig):
    num_clusters: PositiveInt = 128
    """Centroids K."""
    seeding: Literal["parallel", "farthest", "random"] = "parallel"
    """First centroids: k-means|| (for large sets), farthest points (K passes over the rows), or random rows."""
    start_from: str | None = None
    """A `centroids.safetensors` to start from instead; centroids keep their numbers."""
    iterations: int = Field(20, ge=0)
    """Most passes over the rows; 0 with `start_from` only assigns rows to the given centroids."""
    tolerance: float = Field(1e-4, ge=0.0)
    """The fit stops at a smaller relative change of the mean similarity."""
    batch_rows: int | None = Field(None, ge=BLOCK_ROWS)
    """Rows of a mini-batch, in blocks of 4,096 consecutive rows. Each is read from storage, so the set may have any size. By
    default every iteration reads all rows."""
    memory_gib: float = Field(2.0, ge=0.0)
    """GiB of rows that one actor keeps in memory; if it has more, all its rows go to a file on its node's disk."""
    scratch: str | None = None
    """Folder on each node for that file; by default the system's folder for temporary files."""
    nearest: PositiveInt = 5
    """Rows nearest to each centroid that statistics.json lists."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the first centroids and the mini-batches."""

    @property
    def streamed(self) -> bool:
        """Rows are read from their files for each pass and not stored: for mini-batches, or a single assignment."""
        return self.batch_rows is not None or self.iterations == 0


class KMeansConfig(Section):
    """All settings of a fit."""

    data: EmbeddingsConfig = EmbeddingsConfig()
    clustering: FitConfig = FitConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def parts_work_together(self) -> Self:
        if not self.data.uri:
            raise ValueError("data.uri is missing; name the Parquet file, folder or s3://bucket/prefix of embeddings")
        for complaint in (*self.clustering.complaints(), *self.run.complaints()):
            raise ValueError(complaint)
        if self.clustering.iterations == 0 and self.clustering.start_from is None:
            raise ValueError("clustering.iterations 0 fits nothing; give centroids with clustering.start_from")
        if self.clustering.batch_rows is not None and self.data.weight_column is not None:
            raise ValueError("clustering.batch_rows cannot be combined with data.weight_column; leave one of them out")
        return self
