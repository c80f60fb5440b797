"""The sections of settings of the jobs, each key with its unit.

Sizes are in studies (one image-report pair) and named for their owner; lengths in pixels, tokens or steps.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, field_validator

from cmcgns.methods import METHODS

FORMATS = (
    "auto", "phantom", "pairs-csv", "mimic-cxr", "mimic-cxr-jpg", "open-i", "open-i-csv", "padchest", "chexpert-plus",
    "brax", "vindr-cxr", "parquet",
)  # fmt: skip
"""Supported layouts of a corpus."""
PAIRS_COLUMNS = ("image", "report", "patient", "group", "study", "split", "view")
"""Columns of a `pairs-csv` that another may stand for."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False)


def is_generated(uri: str, format: str = "auto") -> bool:
    """Whether a corpus is the phantom, whose films are of no patient; another format reads a folder of that name."""
    return format in ("auto", "phantom") and (uri == "phantom" or uri.startswith("phantom:"))


def _known_columns(given: Any) -> Any:
    if not isinstance(given, dict):
        raise ValueError("must be a map such as {image: File, report: ReportText}")
    unknown = [str(name) for name in given if name not in PAIRS_COLUMNS]
    if unknown:
        known = ", ".join(PAIRS_COLUMNS)
        raise ValueError(f"must map {known} to the table's own names; {', '.join(unknown)} is none of them")
    if not all(isinstance(name, str) and name.strip() for name in given.values()):
        raise ValueError("must give the name of one column for each, in quotes if it is a number")
    return given


Columns = Annotated[dict[str, str], BeforeValidator(_known_columns)]
"""A table's own names for `PAIRS_COLUMNS`."""


class CorpusConfig(Section):
    uri: str = "phantom"
    """Location of the corpus: `phantom` (generated), a local folder, or `s3://bucket/prefix`."""
    format: str = "auto"
    """Layout of the corpus: `auto` (detected from the files), phantom, pairs-csv, mimic-cxr, mimic-cxr-jpg, open-i, open-i-csv,
    padchest, chexpert-plus, brax, vindr-cxr, parquet (the output of jobs/prepare.py), or your own reader as `package.module` or
    `path/to/file.py` (docs/data.md)."""
    reports: bool = True
    """Films have reports. With false no report is read, so that corpora without any can be used, by methods that learn from films
    alone. A `pairs-csv` then needs no column `report`."""
    columns: Columns = {}
    """Names of the columns of a `pairs-csv` that has other names, as `{image: File, report: ReportText, patient: PatientID,
    study: Accession}`. Possible are image, report, patient, group, study, split, view."""
    films: str | None = None
    """Folder of the films that a `pairs-csv` names; relative to the folder of the table. By default that folder."""
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
    min_workers: PositiveInt | None = None
    """Go on with as few workers as this where machines are lost or not there yet, and with up to `num_workers` where there are
    more; with numbers alone that divide `global_batch_size` evenly. Each rank then accumulates more microbatches; without
    `contrast: global_batch` fewer studies are compared. By default always `num_workers`."""
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
    """What DeepSpeed partitions: 0 nothing (plain torch), 1 optimizer state, 2 also gradients, 3 also parameters."""
    overlap_comm: bool | None = None
    """Reduce gradients during the backward pass. By default on GPUs, and with ZeRO-3."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of encoders and heads, and of the features that ranks send each other; losses are always fp32 (see `tf32`). fp16
    needs a GPU, and scales the loss; with bf16 and ZeRO most gradients of weights are summed over ranks in bf16, those of
    features in fp32."""
    tf32: bool = True
    """On GPUs, multiply fp32 matrices and convolve in TF32: as wide a range, 10 bits of mantissa, losses included. No effect on
    a CPU."""
    compile: bool = False
    """Compile both backbones with torch.compile; the first steps take minutes. Weights and exports stay the same."""
    microbatch_size: PositiveInt = 16
    """Studies of one forward on one rank."""
    global_batch_size: PositiveInt = 128
    """Studies per optimizer step, over all ranks and accumulation."""
    contrast: Literal["microbatch", "global_batch"] = "microbatch"
    """Studies that are compared with each other: those of one microbatch of all ranks, or all of `global_batch_size`, whatever
    fits into memory, for one more forward of each microbatch (docs/pretraining.md)."""
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
    """Peak learning rate, at the end of the warm-up; see `schedule`."""
    schedule: Literal["cosine", "wave"] = "cosine"
    """`cosine`: after the warm-up the learning rate decays to 0 along a half cosine in each stage. `wave`: it does so in one
    epoch, rises to its peak in the next, and so on (published for LoVT)."""
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
    checkpoint_minutes: float | None = Field(None, gt=0.0)
    """Also write a checkpoint at the first step that ends this many minutes after the last one."""
    keep_checkpoints: PositiveInt = 2
    """Number of checkpoints to keep; older ones are deleted."""
    keep_best: bool = False
    """Also write a checkpoint after each validation that is the best of its stage so far, and keep the last of these as
    `best_checkpoint_*`, besides `keep_checkpoints`."""
    max_failures: int = Field(3, ge=-1)
    """How often lost workers are replaced before the run fails; -1 for no limit. With `min_workers`: how often in a row without a
    new checkpoint between."""
    hang_timeout_s: float = Field(600.0, ge=5.0, le=1800.0)
    """Seconds without progress of any worker after which one that does not answer, or keeps the others waiting, is killed and
    replaced as a lost one. Waiting for films, the clustering pool or storage is no hang."""
    seed: int = 0
    """Seed of initial weights and dropout."""
    deterministic: bool = False
    """Two runs on the same machines, workers and threads give the same bits: torch takes deterministic algorithms, which are
    slower on GPUs, and raises for an operation that has none."""

    @property
    def accumulation(self) -> int:
        """Microbatches that each rank accumulates per optimizer step."""
        return self.global_batch_size // (self.microbatch_size * self.num_workers)

    @property
    def least_workers(self) -> int:
        """The fewest workers that the run may have."""
        return self.num_workers if self.min_workers is None else self.min_workers

    @property
    def numbers_of_workers(self) -> list[int]:
        """The numbers of workers with which accumulation comes out even."""
        every = range(self.least_workers, self.num_workers + 1)
        return [number for number in every if self.global_batch_size % (self.microbatch_size * number) == 0]

    @property
    def compared(self) -> int:
        """The fewest studies that a loss compares with each other."""
        return self.global_batch_size if self.contrast == "global_batch" else self.microbatch_size * self.least_workers


RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""A folder directly in `run.storage`: no path."""


class RunConfig(Section):
    name: str | None = Field(None, pattern=RUN_NAME)
    """Name of the run's folder under `storage`; must be new. By default <job>-<date>-<time>-<random>."""
    storage: str = "runs"
    """Location of run folders: a local folder or `s3://bucket/prefix`."""
    resume: str | None = Field(None, pattern=RUN_NAME)
    """Name of a run under `storage` to resume from its last checkpoint."""

    def complaints(self) -> Iterable[str]:
        """Settings that conflict."""
        if self.resume and self.name and self.resume != self.name:
            yield f"run.resume {self.resume} keeps the name of that run; remove run.name {self.name}"


class PretrainRunConfig(RunConfig):
    loggers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Also send the numbers of metrics.jsonl and the settings to Weights & Biases or MLflow (docs/pretraining.md). No films, no
    reports, no pictures. Keys come from the environment."""
