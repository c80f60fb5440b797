"""Settings of `jobs/embed.py`."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from cmcgns.config import RunConfig, Section


class EmbedConfig(Section):
    run: str = ""
    """Folder of a finished pretraining run, local or `s3://`: its model, vocabulary and corpus are used."""
    split: Literal["train", "valid", "test"] = "test"
    """Studies whose sentences are embedded."""
    uri: str | None = None
    """Another corpus than the run's own, in any layout that `data.uri` of a run takes."""
    studies: PositiveInt | None = None
    """Embed that many studies of the split, the first by index; by default all."""
    batch_size: PositiveInt = 32
    """Studies of one forward."""
    workers: PositiveInt = 1
    """Ray actors that hold the model."""
    cpus_per_worker: float = Field(1.0, gt=0.0)
    """CPUs that Ray reserves for one of them; torch uses as many threads."""
    use_gpu: bool = False
    """One GPU for each of them."""


class EmbedJobConfig(Section):
    """All settings of the job."""

    embed: EmbedConfig = EmbedConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def parts_work_together(self) -> Self:
        if not self.embed.run:
            raise ValueError("embed.run is missing; name the folder of a finished pretraining run, such as runs/NAME")
        if self.run.resume is not None:
            raise ValueError("run.resume: embedding starts anew each time; give a new run.name instead")
        for complaint in self.run.complaints():
            raise ValueError(complaint)
        return self
