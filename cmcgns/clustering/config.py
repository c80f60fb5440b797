"""Settings of `jobs/kmeans.py`."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from cmcgns.clustering.kmeans import BLOCK_ROWS
from cmcgns.config import PoolConfig, RunConfig, Section


class EmbeddingsConfig(Section):
    uri: str = ""
    """Where the embeddings lie: a `.parquet` file, a local folder of them, or `s3://bucket/prefix`."""
    id_column: str = "id"
    """Column that names a row; written beside its centroids."""
    vector_column: str = "vector"
    """Column of float lists of one length; rows are scaled to length 1."""
    weight_column: str | None = None
    """Column of positive weights; by default every row counts alike."""
    text_column: str | None = None
    """Column with the sentence, shown with the rows nearest to each centroid."""


class FitConfig(PoolConfig):
    num_clusters: PositiveInt = 128
    """Centroids K."""
    seeding: Literal["parallel", "farthest", "random"] = "parallel"
    """First centroids: k-means|| (for large sets), farthest points (K passes over the rows), or random rows."""
    start_from: str | None = None
    """A `centroids.safetensors` to start from instead; centroid numbers then keep their meaning."""
    iterations: int = Field(20, ge=0)
    """Most passes over the rows; 0 with `start_from` assigns rows to given centroids."""
    tolerance: float = Field(1e-4, ge=0.0)
    """Relative change of the mean similarity under which the fit stops."""
    batch_rows: int | None = Field(None, ge=BLOCK_ROWS)
    """Rows of one mini-batch, in blocks of 4,096 neighbours; read anew each time, so that no set is too large. Without
    it every iteration sees all rows."""
    memory_gib: float = Field(2.0, ge=0.0)
    """GiB of rows that one actor holds in memory; with more it keeps all its rows in a file on its node's disk."""
    scratch: str | None = None
    """Folder on each node for such files; by default the system's for temporary files."""
    nearest: PositiveInt = 5
    """Rows nearest to each centroid in statistics.json."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Decides the first centroids and the mini-batches."""

    @property
    def streamed(self) -> bool:
        """Rows are not kept: a mini-batch, or a single assignment, reads them from their files."""
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
            raise ValueError("clustering.iterations 0 fits nothing; name given centroids with clustering.start_from")
        if self.clustering.batch_rows is not None and self.data.weight_column is not None:
            raise ValueError("clustering.batch_rows does not go with data.weight_column; leave one of them out")
        return self
