"""Models on the Hugging Face hub, or on the mirror that HF_ENDPOINT names."""

import logging
import os
import re
from pathlib import Path
from typing import Any

from cmcgns.errors import UserError, first_line

logger = logging.getLogger(__name__)

NAME = re.compile(r"(?P<owner>[A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*")
RUNS = "runs"
"""Where runs are by default: never an owner on the hub."""


def is_hub_name(where: str | os.PathLike[str]) -> bool:
    """Whether ``where`` is OWNER/NAME, and there is no folder OWNER here that it could be in; a path never is."""
    found = NAME.fullmatch(where) if isinstance(where, str) else None
    return found is not None and found["owner"] != RUNS and not Path(found["owner"]).exists()


def download(key: str, name: str, revision: str | None = None, progress: bool = True) -> str:
    """The folder of the local copy of the hub's model ``name``, the value of ``key``, as huggingface_hub keeps it.

    ``revision``: branch, tag or commit; None: the newest commit of `main`. ``progress``: show a bar in a terminal or notebook.

    Raises:
        UserError: there is no such model or revision, or it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download  # only where it is needed
    from huggingface_hub.utils.tqdm import tqdm

    class Hidden(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})

    try:
        folder = snapshot_download(name, revision=revision, tqdm_class=None if progress else Hidden)
    except Exception as error:  # errors of its HTTP library derive from Exception alone
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{key} {name} is no folder here, and cannot be had{at} from the Hugging Face hub ({first_line(error)}); give the "
            "folder of a finished run, such as runs/NAME, or its export"
        ) from None
    logger.info("%s of the Hugging Face hub is at %s", name, folder)  # the folder is named after the commit
    return folder
