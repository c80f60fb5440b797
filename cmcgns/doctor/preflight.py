"""The few looks that every job takes at a cluster before it begins: what would cost hours, in seconds."""

from collections.abc import Sequence

from cmcgns.data import storage
from cmcgns.doctor import cluster
from cmcgns.errors import UserError

PATIENCE_S = 120.0
"""Longer than storage is tried again for, so that it is storage that says what is wrong."""


def check_nodes(uris: Sequence[str]) -> None:
    """Refuse a cluster on which a node has other versions than the driver, or does not reach one of ``uris``.

    Raises:
        UserError: the first node that would fail, and the way out.
    """
    nodes = cluster.living_nodes()
    lines = list(cluster.version_lines(nodes, PATIENCE_S))
    for uri in filter(storage.is_s3, uris):
        lines += cluster.reach_lines(nodes, uri, PATIENCE_S)
    failed = [line for line in lines if line.level == "failed"]
    if failed:
        others = f" ({len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(
            f"node {failed[0].where}, {failed[0].subject}: {failed[0].found}{others}. {failed[0].way_out}. "
            "`python -m cmcgns.doctor` looks at all"
        )
