"""The plan of a prepared set: which groups go into which shard, written before the first shard."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from cmcgns import storage
from cmcgns.config import CorpusConfig
from cmcgns.data.manifest import PLAN, SPLITS, VERSION, content_hash, read_manifest, well_formed
from cmcgns.data.order import Arrangement, arranged
from cmcgns.data.prepare.config import PrepareConfig, PrepareJobConfig
from cmcgns.data.prepare.shard import Maker, Pseudonyms, ShardPlan
from cmcgns.data.readers import Source
from cmcgns.data.record import StudyIndex
from cmcgns.errors import UserError
from cmcgns.lease import is_lease

SAMPLE_STUDIES = 16
"""Studies prepared in advance to estimate how many fit into a shard."""
DEFAULT_IMAGE_BYTES = 100_000
"""Assumed size of a film if no film of the sample can be used."""
FREE_SETTINGS = ("out", "cpus_per_task", "pseudonymise_key_file", "check")
"""Settings that may change when a prepare is resumed, because they do not affect the content."""


@dataclass(frozen=True)
class Split:
    """One split of a raw corpus, in the order of the prepared set."""

    studies: pa.Table
    arrangement: Arrangement

    def group(self, number: int) -> list[dict[str, Any]]:
        """The studies of one group."""
        first, end = self.arrangement.group_S.searchsorted([number, number + 1])
        studies: list[dict[str, Any]] = self.studies.slice(first, end - first).to_pylist()
        return studies


@dataclass(frozen=True)
class Plan:
    """What a prepare will make; the same when it is resumed."""

    source: dict[str, Any]
    settings: dict[str, Any]
    groups: dict[str, int]
    shards: list[ShardPlan]
    version: int = VERSION


def arrange_splits(index: StudyIndex, group_studies: int, pseudonyms: Pseudonyms) -> dict[str, Split]:
    """Train, valid and test of a raw corpus, sorted by the ids that the set will contain: sorted by the original ids, the
    pseudonyms could be matched with a list of these."""
    return {name: Split(*arranged(index.split(name), group_studies, pseudonyms)) for name in SPLITS}


def make_plan(config: PrepareJobConfig, source: Source, splits: dict[str, Split], pseudonyms: Pseudonyms) -> Plan:
    """The plan of a new set."""
    groups = {name: split.arrangement.groups for name, split in splits.items()}
    per_shard = _groups_per_shard(
        config, splits, Maker(source, config.prepare, pseudonyms, config.data.reports), sum(groups.values())
    )
    shards = []
    for split, count in groups.items():
        files = -(-count // per_shard)
        shards += [
            ShardPlan(
                f"{split}-{file:05d}-of-{files:05d}.parquet",
                split,
                file * per_shard,
                min((file + 1) * per_shard, count),
            )
            for file in range(files)
        ]
    return Plan(describe_source(source, splits, pseudonyms), settings_of(config, pseudonyms), groups, shards)


def describe_source(source: Source, splits: dict[str, Split], pseudonyms: Pseudonyms) -> dict[str, Any]:
    """Description of the raw corpus for the manifest; the digest of its whole index shows whether it has changed.

    The path may name a hospital or project, so a pseudonymised set has its hash.
    """
    digest = hashlib.blake2b(digest_size=16)
    if source.format == "phantom":
        digest.update(repr(source).encode())  # includes the size of its films
    for name, split in splits.items():
        digest.update(f"{name} {content_hash(split.studies)}".encode())
    studies = sum(len(split.studies) for split in splits.values())
    return {"uri": pseudonyms(source.uri), "format": source.format, "studies": studies, "digest": digest.hexdigest()}


def settings_of(config: PrepareJobConfig, pseudonyms: Pseudonyms) -> dict[str, Any]:
    """The settings that affect the content of a set."""
    prepare = config.prepare.model_dump(mode="json", exclude=set(FREE_SETTINGS))
    return prepare | {
        "reports": config.data.reports,
        "views": list(config.data.views),
        "crop_borders": config.data.crop_borders,
        "group_studies": config.data.group_studies,
        "seed": config.data.seed,
        "pseudonym_key": pseudonyms.fingerprint,
    }


def _groups_per_shard(config: PrepareJobConfig, splits: dict[str, Split], maker: Maker, groups: int) -> int:
    """Groups whose films take about ``shard_mb``, or fewer if that would make too few shards."""
    fitting = config.prepare.shard_mb * 1_000_000 / max(_bytes_per_study(splits, maker) * config.data.group_studies, 1)
    return max(1, min(round(fitting), groups // config.prepare.least_shards))


def _bytes_per_study(splits: dict[str, Split], maker: Maker) -> float:
    """Mean size in bytes of the films of a study, from a few studies spread evenly over the largest split."""
    studies = max((split.studies for split in splits.values()), key=len)
    step = max(len(studies) // SAMPLE_STUDIES, 1)
    rows, _, _ = maker.rows(studies.take(list(range(0, len(studies), step))[:SAMPLE_STUDIES]).to_pylist())
    sizes = [len(image) for image in rows["image"].to_pylist()]
    return sum(sizes) / max(len(rows["study_id"].unique()), 1) if sizes else DEFAULT_IMAGE_BYTES


def open_plan(config: PrepareJobConfig, source: Source, splits: dict[str, Split], pseudonyms: Pseudonyms) -> Plan:
    """The plan stored at ``prepare.out``, checked for the same corpus and settings; otherwise a new one, stored there."""
    out = config.prepare.out
    path = storage.join(out, PLAN)
    if storage.exists(path):
        plan = read_plan(path)
        _check_unchanged(
            f"prepare.out {out} was started", plan.source, plan.settings, config, source, splits, pseudonyms
        )
        return plan
    # a leftover is from a prepare killed while it wrote its plan
    others = [name for name in _files(out) if not (storage.is_leftover(name) or is_lease(name))]
    if others:
        raise UserError(
            f"prepare.out {out} is not empty ({len(others)} files such as {others[0]}) and has no {PLAN} to resume; "
            "give a new folder"
        )
    plan = make_plan(config, source, splits, pseudonyms)
    if not storage.write_bytes(path, (json.dumps(asdict(plan), indent=1) + "\n").encode(), if_absent=True):
        return open_plan(config, source, splits, pseudonyms)  # another prepare was faster
    return plan


def read_plan(uri: str) -> Plan:
    """The plan at ``uri``."""
    with well_formed(uri, "plan of a prepared set", "delete the folder, or give a new one"):
        fields = json.loads(storage.read_bytes(uri))
        shards = [ShardPlan(**shard) for shard in fields.pop("shards")]
        return Plan(shards=shards, **fields)


def check_complete_set(
    config: PrepareJobConfig, source: Source, splits: dict[str, Split], pseudonyms: Pseudonyms
) -> None:
    """Raise if the complete set at ``prepare.out`` is of another corpus or has other settings."""
    manifest = read_manifest(config.prepare.out)
    state = f"prepare.out {config.prepare.out} is a complete set"
    _check_unchanged(state, manifest.source, manifest.settings, config, source, splits, pseudonyms)


def _check_unchanged(
    state: str,
    known_source: dict[str, Any],
    known: dict[str, Any],
    config: PrepareJobConfig,
    source: Source,
    splits: dict[str, Split],
    pseudonyms: Pseudonyms,
) -> None:
    for name, value in settings_of(config, pseudonyms).items():
        # a set of an earlier version lacks newer settings
        was = known.get(name, getattr(PrepareConfig(), name, getattr(CorpusConfig(), name, None)))
        if was != value:
            raise UserError(f"{state} with {name} {was!r}, not {value!r}; give the same value, or a new folder")
    now = describe_source(source, splits, pseudonyms)
    if known_source["digest"] != now["digest"]:
        raise UserError(
            f"{state} from {known_source['studies']} studies of {known_source['uri']}, but data.uri {source.uri} now has "
            f"{now['studies']} studies, or their content changed; give a new folder"
        )


def _files(uri: str) -> list[str]:
    try:
        return storage.list_files(uri)
    except storage.MissingFileError:
        return []
