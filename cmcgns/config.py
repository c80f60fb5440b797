"""Typed settings of the jobs: one model per section, each key with its unit, and checks across sections.

Sizes are in studies (one image-report pair) and named for their owner; lengths in pixels, tokens or steps.
"""

from collections.abc import Iterable
from types import ModuleType
from typing import Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializeAsAny,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cmcgns.errors import UserError
from cmcgns.methods import METHODS as METHODS
from cmcgns.plugins import is_plugin, load_plugin

FORMATS = ("auto", "phantom", "pairs-csv", "mimic-cxr", "mimic-cxr-jpg", "open-i", "parquet")
"""Supported layouts of a corpus."""
MIN_BANK = 1024
"""Minimum number of rows in a bank before clustering may start, even with few clusters."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False)


class CorpusConfig(Section):
    uri: str = "phantom"
    """Location of the corpus: `phantom` (generated), a local folder, or `s3://bucket/prefix`."""
    format: str = "auto"
    """Layout of the corpus: `auto` (detected from the files), phantom, pairs-csv, mimic-cxr, mimic-cxr-jpg, open-i, parquet (the
    output of jobs/prepare.py), or your own reader as `package.module` or `path/to/file.py` (docs/data.md)."""
    views: tuple[str, ...] = ("PA", "AP")
    """Views to keep; 'AP Supine' and 'AP Erect' count as AP. In pairs-csv, films without a view are kept."""
    crop_borders: bool = True
    """Crop black borders before a film is resized. Prepared films are already cropped."""
    follow_links: bool = False
    """Read films and reports behind symbolic links that leave the corpus folder. A link of someone else's corpus may point to any
    file of yours."""
    group_studies: PositiveInt = 256
    """Studies per group (a row group of a prepared set); each epoch permutes the groups. Ignored for a prepared set, which has
    its own groups."""
    max_bad_fraction: float = Field(0.01, ge=0.0, le=1.0)
    """Largest share of studies that may be unusable before the run stops (for training: of training and validation studies)."""
    seed: int = 0
    """Seed of the order of the studies, the choice of a study's film, crops, augmentation, masks and random splits."""
    phantom_studies: PositiveInt = 4000
    """Studies of the generated corpus, over all splits."""
    phantom_size: PositiveInt = 256
    """Side in pixels at which phantom films are rendered."""

    @field_validator("format")
    @classmethod
    def format_is_known(cls, given: str) -> str:
        if given not in FORMATS and "." not in given:
            raise ValueError(f"must be {', '.join(FORMATS)}, package.module or a .py file")
        return given


class DataConfig(CorpusConfig):
    reports: bool = True
    """Films have reports. With false no report is read, so that corpora without any can be used, by methods that learn from films
    alone. A `pairs-csv` then needs no column `report`."""
    image_size: PositiveInt = 224
    """Side in pixels of the square that the image encoder sees."""
    resize: PositiveInt = 256
    """Side in pixels of the padded square to which films are resized; training takes crops of image_size from it."""
    augment_rotation: float = Field(0.0, ge=0.0, le=45.0)
    """Training turns each film by up to this many degrees either way. This and the other augmentations are drawn for each film
    and epoch, like crops, on the training device. Films are never mirrored, because reports name sides."""
    augment_scale: float = Field(0.0, ge=0.0, le=0.5)
    """Training enlarges or shrinks each film by up to this fraction: 0.1 is a factor from 1 / 1.1 to 1.1."""
    augment_brightness: float = Field(0.0, ge=0.0, le=1.0)
    """Training raises grey values, between 0 and 1, to a power from 1 / (1 + this) to 1 + this; black and white stay."""
    augment_contrast: float = Field(0.0, ge=0.0, le=0.5)
    """Training changes the contrast at mid-grey by up to this fraction: 0.2 is a factor from 0.8 to 1.2; black and white stay."""
    max_tokens: int = Field(256, ge=8)
    """Maximum length of a report in tokens, including [CLS] and [SEP]; sentences that do not fit completely are dropped."""
    max_sentences: PositiveInt = 32
    """Maximum number of sentences kept per report."""
    groups_per_window: PositiveInt = 2
    """Groups per window; studies are shuffled within a window. A task that reads a prepared set holds one window in memory."""
    window_size: PositiveInt = 64
    """Studies that one Ray Data task fetches and decodes from a raw set. From a prepared set a task reads a whole window."""
    cpus_per_task: float = Field(0.5, gt=0.0)
    """CPUs that Ray reserves for one fetch-and-decode task."""
    studies_ahead: PositiveInt | None = None
    """Decoded studies that may wait for training; limits memory. By default 8 optimizer steps, plus 4 tasks' studies (prepared
    set: one window) for each decoding task that gets a CPU."""
    validation_studies: PositiveInt | None = None
    """Validate on the first studies of the validation split, this many; by default on all."""


class ModelConfig(Section):
    image_encoder: str = "resnet-50"
    """A preset trained from scratch (resnet-tiny, resnet-small, resnet-50; with patches of 16 instead of 32 pixels
    resnet-tiny-16, resnet-small-16, resnet-50-16; vit-tiny, vit-small, vit-base; with patches of 8 instead of 16 pixels
    vit-tiny-8, vit-small-8), the local folder or Hugging Face name of any image model (microsoft/resnet-50,
    facebook/dinov2-base, microsoft/rad-dino; untested: with timm installed timm/densenet121.tv_in1k), or your own module as
    `package.module` or `path/to/file.py`.
    Batch normalisation uses each rank's microbatch; on GPUs `train.sync_batchnorm` shares the statistics."""
    text_encoder: str = "bert-base"
    """A preset trained from scratch (bert-tiny, bert-mini, bert-base), a local folder, or a Hugging Face name
    (emilyalsentzer/Bio_ClinicalBERT)."""
    tokenizer: str = "auto"
    """`auto`: for presets a WordPiece vocabulary trained on the corpus, otherwise the text encoder's tokenizer. Or a folder or
    Hugging Face name."""
    vocabulary_size: int = Field(8192, ge=64)
    """Entries of a vocabulary trained on the corpus."""
    vocabulary_reports: PositiveInt = 20_000
    """Training reports from which that vocabulary is trained."""
    subwords: bool = False
    """Fill that vocabulary, at least a quarter of it, with pieces of words: words without an entry are then read in pieces, not
    letter by letter. Pieces follow the same rule as words: see `vocabulary_patients`."""
    vocabulary_patients: PositiveInt = 10
    """A word is an entry of that vocabulary if the reports of so many patients have it and it has no digit, so that exports hold
    no names or numbers of single patients. 1: every word that occurs twice. Not for generated corpora."""
    embed_dim: int = Field(768, ge=8, multiple_of=8)
    """Dimension D of the shared embedding space of films, patches, reports and sentences."""
    dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """Dropout of the preset encoders."""
    fixed_batch_statistics: bool = False
    """Use the running statistics of batch normalisation also while training (for pretrained ResNets and small microbatches)."""
    channels_last: bool = False
    """Compute convolutions in the memory format channels_last, which is faster for ResNets; the last digits of losses differ."""


class MethodConfig(Section):
    name: str = Field(
        "cm-cgns",
        description=f"Pretraining method: {', '.join(METHODS)}, or your own as `package.module` or `path/to/file.py` "
        "(docs/methods.md). It defines the keys of `objective`.",
    )


class Bank(NamedTuple):
    """Features that are clustered during training."""

    name: str
    num_clusters: int
    """Centroids K."""
    dim: int
    """Dimension D."""
    setting: str
    """Name of the setting that gives K, for messages."""
    start_statistic: str | None
    """Clustering starts once this statistic of the method is at most `clustering.start_cosine`. None: as soon as the bank has
    enough rows, whatever the warm-up and `clustering.start_step` say, since nothing is learned before."""
    per_sentence: bool = True
    """Rows belong to sentences; otherwise to studies."""
    rows_each: int = 1
    """Rows of each sentence or study."""
    moves: bool = True
    """Each step moves the centroids by `clustering.momentum`; otherwise they only change with a new version."""


class MethodSettings(Section):
    """The section `objective` of one method. Its module exports a subclass as `Settings` (see ``cmcgns.methods.base``)."""

    stages: ClassVar[int] = 1
    """Number of training stages, 1 to 3."""

    def banks(self, model: ModelConfig) -> tuple[Bank, ...]:
        """The banks that the method clusters; without banks no clustering actor starts."""
        return ()

    def complaints(self) -> Iterable[str]:
        """Settings that conflict, one sentence each, with the fix."""
        return ()

    def needs_reports(self) -> str | None:
        """The setting because of which the method learns from reports; None if it learns from films alone."""
        return "method.name"

    def sweep_space(self, sentences: int) -> dict[str, Any]:
        """Default search space of a sweep, in the form of `sweep.space`, for a corpus with ``sentences`` training sentences."""
        return {"objective.temperature": {"log_uniform": [0.02, 0.5]}} if hasattr(self, "temperature") else {}


def foreign_modules(settings: dict[str, Any]) -> dict[str, str]:
    """Modules that unvalidated ``settings`` would execute and that are not ours, by setting."""
    value = lambda section, key: (settings[section] if isinstance(settings.get(section), dict) else {}).get(key)
    named = {
        "method.name": (value("method", "name"), METHODS),
        "data.format": (value("data", "format"), FORMATS),
        "clustering.clusterer": (value("clustering", "clusterer"), ("kmeans",)),
    }
    found = {key: name for key, (name, ours) in named.items() if isinstance(name, str) and name not in ours}
    encoder = value("model", "image_encoder")
    return found | ({"model.image_encoder": encoder} if isinstance(encoder, str) and is_plugin(encoder) else {})


def method_module(name: str) -> ModuleType:
    """The module of a method, with ``Settings`` and ``METHOD``."""
    module = load_plugin("method.name", name, METHODS)
    settings = getattr(module, "Settings", None)  # not METHOD: reading it may import torch
    if not (isinstance(settings, type) and issubclass(settings, MethodSettings)):
        raise UserError(
            f"method.name {name} defines no method: it needs `Settings`, a MethodSettings, and `METHOD` (docs/methods.md)"
        )
    return module


def method_settings(name: str) -> type[MethodSettings]:
    """The settings class of a method, the type of section ``objective``."""
    settings: type[MethodSettings] = method_module(name).Settings
    return settings


class PoolConfig(Section):
    """Actors on which k-means runs, in pretraining and in jobs/kmeans.py."""

    actors: PositiveInt = 2
    """Ray actors that hold the rows and run the FAISS passes."""
    cpus_per_actor: float = Field(1.0, ge=0.0)
    """CPUs that Ray reserves for one actor; FAISS uses the same number of threads."""
    gpus_per_actor: float = Field(0.0, ge=0.0)
    """GPUs, or a fraction of one, that Ray reserves for one actor (with `device: gpu`)."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Device of FAISS; gpu needs the extra `gpu`."""

    def complaints(self) -> Iterable[str]:
        """Settings that conflict."""
        if (self.device == "gpu") != (self.gpus_per_actor > 0):
            yield (
                f"clustering.device {self.device} conflicts with clustering.gpus_per_actor "
                f"{self.gpus_per_actor}; gpu needs a value above 0, cpu needs 0"
            )


class ClusteringConfig(PoolConfig):
    clusterer: str = "kmeans"
    """What clusters a bank: `kmeans` (spherical, from farthest points), or a module of your own as `package.module` or
    `path/to/file.py`, which every node must have (docs/clustering.md)."""
    bank_size: PositiveInt = 65_536
    """Number of recent rows (sentence or study features) of each bank kept in the pool, over all actors."""
    start_step: int = Field(0, ge=0)
    """First step at which clustering may start."""
    start_cosine: float = 0.4
    """Clustering starts once the mean cosine between all sentences and all attended features is at most this."""
    refresh_every: PositiveInt = 100
    """Steps between global re-clusterings; new centroids are adopted one interval after they are requested."""
    iterations: PositiveInt = 20
    """Maximum number of k-means iterations per re-clustering."""
    tolerance: float = Field(1e-4, ge=0.0)
    """k-means stops if the relative change of its objective is below this."""
    momentum: float = Field(0.001, ge=0.0, le=1.0)
    """Weight of its members' mean in the update of a centroid at each step."""


class TrainConfig(Section):
    num_workers: PositiveInt = 2
    """Ray Train workers (ranks)."""
    cpus_per_worker: float = Field(1.0, gt=0.0)
    """CPUs that Ray reserves for one worker."""
    placement: Literal["pack", "spread"] = "pack"
    """`pack` workers on as few nodes as possible, or `spread` them over all nodes (to use their CPUs or memory)."""
    threads_per_worker: PositiveInt | None = None
    """Torch threads of one worker; by default the machine's cores divided by its workers."""
    use_gpu: bool = False
    """One GPU per worker."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """DeepSpeed ZeRO, or plain torch with the same losses (only zero_stage 0)."""
    zero_stage: int = Field(1, ge=0, le=3)
    """What DeepSpeed partitions: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters."""
    overlap_comm: bool | None = None
    """Reduce gradients during the backward pass (GPUs; needs memory for two more buckets). By default only with ZeRO-3,
    like DeepSpeed."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of encoders and heads; losses are always fp32. fp16 needs a GPU."""
    microbatch_size: PositiveInt = 16
    """Studies of one forward on one rank."""
    global_batch_size: PositiveInt = 128
    """Studies per optimizer step, over all ranks and accumulation."""
    stage1_steps: PositiveInt | None = None
    """Optimizer steps of stage 1 (alignment)."""
    stage1_epochs: float | None = Field(None, gt=0.0)
    """Length of stage 1 in epochs; give exactly one of the two."""
    stage2_steps: int | None = Field(None, ge=0)
    """Optimizer steps of stage 2 (alignment and reconstruction); 0 skips it."""
    stage2_epochs: float | None = Field(None, ge=0.0)
    """Length of stage 2 in epochs; give exactly one of the two."""
    stage3_steps: int | None = Field(None, ge=0)
    """Optimizer steps of stage 3, of methods that have one; 0 skips it."""
    stage3_epochs: float | None = Field(None, ge=0.0)
    """Length of stage 3 in epochs; give exactly one of the two."""
    warmup_steps: int | None = Field(None, ge=0)
    """Linear warm-up at the start of each stage, in steps."""
    warmup_epochs: float | None = Field(None, ge=0.0)
    """Warm-up in epochs; give exactly one of the two."""
    optimizer: Literal["adam", "adamw"] = "adamw"
    """Adam with weight decay in the gradient (published), or AdamW. Norms and biases have no weight decay."""
    learning_rate: float = Field(1e-4, gt=0.0)
    """Peak learning rate; after the warm-up it decays to 0 along a half cosine in each stage."""
    stage2_learning_rate: float | None = Field(None, gt=0.0)
    """Peak learning rate of stage 2, which warms up again; by default `learning_rate`."""
    stage3_learning_rate: float | None = Field(None, gt=0.0)
    """Peak learning rate of stage 3; by default that of stage 2."""
    stage2_learned_rate: float = Field(1.0, ge=0.0)
    """Factor on the learning rate of stage 2 for all that stage 1 has trained; new parts, such as a decoder, keep factor 1.
    0 freezes what stage 1 has trained."""
    image_encoder_rate: float = Field(1.0, ge=0.0)
    """Factor on `learning_rate`, warm-up included, for the image encoder: below 1 for a pretrained one. 0 freezes it: no
    gradient, no optimizer state, no dropout, fixed statistics of batch normalisation. Pooling and projection keep factor 1."""
    text_encoder_rate: float = Field(1.0, ge=0.0)
    """The same for the text encoder."""
    warmup_learning_rate: float = Field(1e-7, ge=0.0)
    """Learning rate at the first step of the warm-up."""
    weight_decay: float = Field(1e-6, ge=0.0)
    """Weight decay of matrices and convolutions."""
    gradient_clip: float = Field(1.0, ge=0.0)
    """Maximum norm of the whole gradient; 0 disables clipping."""
    activation_checkpointing: bool = False
    """Recompute encoder activations in the backward pass instead of storing them."""
    sync_batchnorm: bool = False
    """Share batch-normalisation statistics over ranks (GPUs only). Without it each rank normalises with its own
    microbatch, so that results depend on microbatch_size."""
    log_every: PositiveInt = 10
    """Steps between writes to metrics.jsonl, which has a row for every step; values stay on the device until then."""
    log_term_gradients: bool = False
    """Also log the norm of each weighted loss term's gradient and the cosines between them, every `log_every` steps. Each term
    costs a backward pass of its own. Only with `engine` torch."""
    validate_every: PositiveInt | None = None
    """Steps between validations; each stage always ends with one."""
    checkpoint_every: PositiveInt = 500
    """Steps between checkpoints; each stage always ends with one."""
    keep_checkpoints: PositiveInt = 2
    """Number of checkpoints to keep; older ones are deleted."""
    max_failures: int = Field(3, ge=-1)
    """How often lost workers are replaced before the run fails; -1 for no limit."""
    seed: int = 0
    """Seed of initial weights and dropout."""

    @property
    def accumulation(self) -> int:
        """Microbatches that each rank accumulates per optimizer step."""
        return self.global_batch_size // (self.microbatch_size * self.num_workers)


RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""A folder directly in `run.storage`: no path."""


class RunConfig(Section):
    name: str | None = Field(None, pattern=RUN_NAME)
    """Name of the run's folder under `storage`; must be new. By default <job>-<date>-<time>."""
    storage: str = "runs"
    """Location of run folders: a local folder or `s3://bucket/prefix`."""
    resume: str | None = Field(None, pattern=RUN_NAME)
    """Name of a run under `storage` to resume from its last checkpoint."""

    def complaints(self) -> Iterable[str]:
        """Settings that conflict."""
        if self.resume and self.name and self.resume != self.name:
            yield f"run.resume {self.resume} keeps the name of that run; remove run.name {self.name}"


class RunSections(Section):
    """The sections of a pretraining run, each validated separately."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    objective: SerializeAsAny[MethodSettings] = Field(default_factory=dict, validate_default=True)
    clustering: ClusteringConfig = ClusteringConfig()
    train: TrainConfig = TrainConfig()
    run: RunConfig = RunConfig()

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
        block = train.microbatch_size * train.num_workers
        if train.global_batch_size % block:
            below = train.global_batch_size // block * block
            near = [str(size) for size in (below, below + block) if size]
            yield (
                f"train.global_batch_size {train.global_batch_size} is not a multiple of microbatch_size x num_workers "
                f"({train.microbatch_size} x {train.num_workers} = {block}); nearest: {' and '.join(near)}"
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
        if train.overlap_comm and not train.zero_stage:
            yield "train.overlap_comm needs ZeRO: set train.zero_stage to 1, 2 or 3, or remove train.overlap_comm"
        if train.log_term_gradients and train.engine != "torch":
            # DeepSpeed's hooks take every backward pass for one of the step
            yield "train.log_term_gradients needs train.engine=torch and train.zero_stage=0, not DeepSpeed"
        if train.engine == "torch" and (train.zero_stage or train.precision == "fp16"):
            yield (
                "train.engine torch supports neither ZeRO nor fp16: set train.zero_stage=0 and train.precision to fp32 or bf16"
            )
        yield from self.objective.complaints()
        yield from clustering.complaints()
        yield from self.run.complaints()

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
