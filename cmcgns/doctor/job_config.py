"""Settings of `python -m cmcgns.doctor`: those of the pretraining run that is to come, and how closely to look."""

from pydantic import Field, PositiveInt

from cmcgns.config import RunSections, Section


class DoctorConfig(Section):
    nodes: PositiveInt | None = None
    """Nodes that the cluster should have; a node that could not join can only be missed by number."""
    megabytes: PositiveInt = 64
    """MiB that each node writes to and reads from run.storage, and that each pair of nodes reduces."""
    timeout_s: float = Field(60.0, gt=0.0)
    """Seconds after which a node, a pair or a bucket that does not answer has failed."""
    pairs: PositiveInt = 512
    """Most pairs of nodes that are measured, in rounds in which each node has one partner."""


class DoctorJobConfig(RunSections):
    """All settings: a pretraining run's, so that its own file and keys can be given, and the doctor's."""

    doctor: DoctorConfig = DoctorConfig()
