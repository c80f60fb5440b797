"""A Dockerfile's instructions, and the shell lines of its RUNs."""

import re
from pathlib import Path


def instructions(file: Path) -> list[tuple[str, str]]:
    """Each instruction with its argument; continued lines joined, no comments."""
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(words[0], words[1]) for line in joined.splitlines() if (words := line.split(maxsplit=1))]


def arguments(file: Path, instruction: str) -> list[str]:
    """Arguments of all instructions of a kind, in order."""
    return [argument for name, argument in instructions(file) if name == instruction]
