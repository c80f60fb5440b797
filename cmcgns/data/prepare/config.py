"""Settings of `jobs/prepare.py`."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from cmcgns.config import CorpusConfig, Section


class PrepareConfig(Section):
    out: str = ""
    """Folder of the prepared set, local or `s3://`: a new one, or one from an interrupted prepare with the same settings."""
    image_size: PositiveInt = 512
    """Shorter side of a prepared film in pixels; smaller films are not enlarged."""
    encoding: Literal["jpeg", "png"] = "jpeg"
    """How films are stored: `png` is lossless and about three times as large."""
    quality: int = Field(95, ge=1, le=100)
    """JPEG quality."""
    shard_mb: PositiveInt = 256
    """Approximate size of a shard in MB."""
    least_shards: PositiveInt = 16
    """A small set is cut into at least this many shards, so that several tasks can work on it."""
    cpus_per_task: float = Field(1.0, gt=0.0)
    """CPUs that Ray reserves for each task; a task makes one shard."""
    pseudonymise_key_file: str | None = None
    """File with a secret of at least 16 bytes that only you can read: ids of patients, studies and films are replaced by hashes
    keyed with it. The text of reports stays as it is, see `scrub_reports`; what is burnt into films always stays."""
    scrub_reports: bool = False
    """Remove dates, long numbers, names after titles and addresses from reports. Rules, which find no names without a title:
    docs/security.md."""
    check: bool = False
    """Check the prepared set at `out` instead: counts, hashes, leaks between splits, identifiers; or an export, or the run that
    has it: damage and identifiers. `--check` is short for this."""


class PrepareJobConfig(Section):
    """All settings of the job."""

    data: CorpusConfig = CorpusConfig()
    prepare: PrepareConfig = PrepareConfig()

    @model_validator(mode="after")
    def parts_work_together(self) -> Self:
        if not self.prepare.out:
            raise ValueError("prepare.out is missing; give a folder for the prepared set, such as s3://bucket/prepared")
        if self.prepare.scrub_reports and not self.data.reports:
            raise ValueError("prepare.scrub_reports true: data.reports false reads no reports; remove one of the two")
        if self.data.format == "parquet":
            raise ValueError("data.format parquet: that set is already prepared; give the raw one")
        return self
