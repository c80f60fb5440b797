"""Typed settings of the jobs: a model for each section, and the checks across sections."""

from collections.abc import Iterable
from typing import Any, Self

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from cmcgns.config.method import Bank, MethodSettings, foreign_modules, method_module, method_settings
from cmcgns.config.sections import (
    FORMATS,
    RUN_NAME,
    ClusteringConfig,
    CorpusConfig,
    DataConfig,
    MethodConfig,
    ModelConfig,
    PoolConfig,
    PretrainRunConfig,
    RunConfig,
    Section,
    TrainConfig,
)
from cmcgns.methods import METHODS

__all__ = [
    "FORMATS",
    "METHODS",
    "MIN_BANK",
    "RUN_NAME",
    "Bank",
    "ClusteringConfig",
    "Config",
    "CorpusConfig",
    "DataConfig",
    "MethodConfig",
    "MethodSettings",
    "ModelConfig",
    "PoolConfig",
    "PretrainRunConfig",
    "RunConfig",
    "RunSections",
    "Section",
    "TrainConfig",
    "foreign_modules",
    "method_module",
    "method_settings",
]

MIN_BANK = 1024
"""Minimum number of rows in a bank before clustering may start, even with few clusters."""


class RunSections(Section):
    """The sections of a pretraining run, each validated separately."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    objective: SerializeAsAny[MethodSettings] = Field(default_factory=dict, validate_default=True)
    clustering: ClusteringConfig = ClusteringConfig()
    train: TrainConfig = TrainConfig()
    run: PretrainRunConfig = PretrainRunConfig()

    @field_validator("objective", mode="before")
    @classmethod
    def settings_of_the_method(cls, given: Any, info: ValidationInfo) -> MethodSettings:
        if "method" not in info.data:
            return MethodSettings()  # method.name has already been refused
        settings = method_settings(info.data["method"].name)
        return settings.model_validate(given if isinstance(given, dict) else given.model_dump())

    @property
    def banks(self) -> tuple[Bank, ...]:
        """The banks that the method clusters."""
        return self.objective.banks(self.model)

    @property
    def pool_actors(self) -> int:
        """Clustering actors of the run, which all banks share."""
        return self.clustering.actors if self.banks else 0


class Config(RunSections):
    """All settings of a pretraining run."""

    @model_validator(mode="after")
    def parts_work_together(self) -> Self:
        for complaint in self._complaints():
            raise ValueError(complaint)
        return self

    def _complaints(self) -> Iterable[str]:
        data, train, clustering = self.data, self.train, self.clustering
        if train.least_workers > train.num_workers:
            yield f"train.min_workers {train.min_workers} is more than train.num_workers {train.num_workers}; lower it"
        for name, workers in (("num_workers", train.num_workers), ("min_workers", train.least_workers)):
            block = train.microbatch_size * workers
            if train.global_batch_size % block:
                below = train.global_batch_size // block * block
                near = [str(size) for size in (below, below + block) if size]
                yield (
                    f"train.global_batch_size {train.global_batch_size} is not a multiple of microbatch_size x {name} "
                    f"({train.microbatch_size} x {workers} = {block}); nearest: {' and '.join(near)}"
                )
        if train.compared == 1 and self.objective.compares_studies:
            fewest = "num_workers" if train.min_workers is None else "min_workers"
            yield (
                f"train.microbatch_size 1 x {fewest} 1: {self.method.name} compares the studies of a microbatch over all "
                "workers, and one has nothing to be compared with; accumulation adds nothing. Set train.microbatch_size to 2 or "
                "more, as many as fit into memory, or train.contrast=global_batch with a larger train.global_batch_size"
            )
        if data.image_size > data.resize:
            yield (
                f"data.image_size {data.image_size} is larger than data.resize {data.resize}; lower data.image_size or raise "
                "data.resize"
            )
        needs = self.objective.needs_reports()
        if not data.reports and needs is not None:
            section, _, key = needs.partition(".")
            given = getattr(getattr(self, section), key)
            yield (
                f"data.reports false: {needs} {given} learns from reports; set data.reports=true, or choose one that learns from "
                "films alone"
            )
        least_ahead = max(8 * block, 2 * train.global_batch_size, 2 * data.window_size)
        if data.studies_ahead is not None and data.studies_ahead < least_ahead:
            yield (
                f"data.studies_ahead {data.studies_ahead} starves training; give at least {least_ahead}, the largest of 8 "
                f"microbatches of each worker (8 x {block}), 2 global batches (2 x {train.global_batch_size}) and 2 windows "
                f"(2 x {data.window_size})"
            )
        for bank in self.banks:
            clusters, rows = bank.num_clusters, max(4 * bank.num_clusters, MIN_BANK)
            if rows > clustering.bank_size:
                yield (
                    f"{bank.setting} {clusters} needs clustering.bank_size of at least "
                    f"max(4 x {clusters}, {MIN_BANK}) = {rows}, not {clustering.bank_size}"
                )
        yield from self._stage_complaints()
        if train.precision == "fp16" and not train.use_gpu:
            yield "train.precision fp16 needs train.use_gpu=true; on a CPU use fp32 or bf16"
        if train.sync_batchnorm and not train.use_gpu:
            yield "train.sync_batchnorm needs train.use_gpu=true; on a CPU use model.fixed_batch_statistics"
        if train.compile and (found := self._not_compiled()):
            yield f"train.compile does not work with {found}; remove train.compile"
        if train.overlap_comm and not train.zero_stage:
            yield "train.overlap_comm needs ZeRO: set train.zero_stage to 1, 2 or 3, or remove train.overlap_comm"
        if train.log_term_gradients and train.engine != "torch":
            # DeepSpeed's hooks take every backward pass for one of the step
            yield "train.log_term_gradients needs train.engine=torch and train.zero_stage=0, not DeepSpeed"
        if train.log_term_gradients and train.contrast == "global_batch":
            yield "train.log_term_gradients needs train.contrast=microbatch: with global_batch no term reaches the encoders alone"
        if train.engine == "torch" and train.zero_stage:
            yield "train.engine torch does not support ZeRO: set train.zero_stage=0, or train.engine=deepspeed"
        yield from self.objective.complaints()
        yield from clustering.complaints()
        yield from self.run.complaints()

    def _not_compiled(self) -> str:
        """The settings that are on and cannot be combined with train.compile, as text."""
        train = self.train
        refused = {
            "train.zero_stage 3 (it gathers weights within the backbones)": train.zero_stage == 3,
            "train.contrast global_batch (its second forward needs the dropout of the first)": train.contrast
            == "global_batch",
            "train.sync_batchnorm (ranks exchange statistics within the backbones)": train.sync_batchnorm,
            "train.log_term_gradients (it goes backwards through a graph twice)": train.log_term_gradients,
        }
        return ", ".join(name for name, is_on in refused.items() if is_on)

    def _stage_complaints(self) -> Iterable[str]:
        train = self.train
        stages = self.objective.stages
        for stage in range(stages + 1, 4):
            steps, epochs = (getattr(train, f"stage{stage}_{unit}") for unit in ("steps", "epochs"))
            if steps or epochs:
                given, has = f"steps {steps}" if steps else f"epochs {epochs}", ("one stage", "two stages")[stages - 1]
                yield (
                    f"method {self.method.name} has {has}, so train.stage{stage}_{given} does not apply; set "
                    f"train.stage{stage}_steps=0"
                )
        pairs = (*(f"stage{stage}" for stage in range(1, stages + 1)), "warmup")
        for pair in pairs:
            steps, epochs = getattr(train, f"{pair}_steps"), getattr(train, f"{pair}_epochs")
            if (steps is None) == (epochs is None):
                given = "neither" if steps is None else f"{steps} and {epochs}"
                yield f"give exactly one of train.{pair}_steps and train.{pair}_epochs, not {given}"
