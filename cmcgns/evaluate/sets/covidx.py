"""``covidx``: train.txt and test.txt of COVIDx, `patient file class source`, where files may have blanks in their names."""

import re
from collections import Counter

import numpy as np
import pandas as pd

from cmcgns.data.sources import FileSource
from cmcgns.errors import UserError
from cmcgns.evaluate.sets.base import ImageSet, image_table
from cmcgns.evaluate.sets.lookup import Folder, split_by_hash

LINE = re.compile(r"(\S+)\s+(.+?)\s+(\S+)\s+(\S+)")
CLASSES = (("normal", "pneumonia", "COVID-19"), ("negative", "positive"))
"""Of versions up to 7, and from 8 on."""
IN_TEST = "patient is in the test set"


def read_covidx(source: FileSource) -> ImageSet:
    """Films of one class each: normal, pneumonia or COVID-19; or COVID-19 negative or positive."""
    folder = Folder.of(source)
    train, test = (covidx_films(folder, folder.label_file(f"{split}.txt")) for split in ("train", "test"))
    classes = _classes(folder, [*train["class"], *test["class"]])
    shared = train["group"].isin(test["group"])
    train = train[~shared]
    train = train.assign(split=split_by_hash(train["group"], source.seed, {"train": 90, "valid": 10}))
    parts, filtered = [], Counter({IN_TEST: int(shared.sum())} if shared.any() else {})
    for split, films in (("train", train), ("test", test.assign(split="test"))):
        films["path"] = [folder.first(f"{split}/{name}", name) for name in films["image_id"]]
        present, missing = folder.present(films, f"{split}.txt")
        parts.append(present)
        filtered.update(missing)
    films = pd.concat(parts)
    place = {name.lower(): k for k, name in enumerate(classes)}
    films["labels"] = list(np.eye(len(classes), dtype=np.float32)[films["class"].map(place).to_numpy(int)])
    return ImageSet(
        name=source.format,
        source=source,
        table=image_table(films.to_dict("records")),
        rule=f"test.txt is test; a tenth of the other patients of train.txt, drawn with seed {source.seed}, are valid",
        classes=classes,
        exclusive=True,
        filtered=dict(filtered),
    )


def covidx_films(folder: Folder, name: str) -> pd.DataFrame:
    """group, image_id and class (in small letters) of each line that is not blank."""
    rows = []
    for number, line in enumerate(folder.lines(name), start=1):
        fields = LINE.fullmatch(line)
        if fields is not None:
            rows.append({"group": fields[1], "image_id": fields[2], "class": fields[3].lower()})
        elif line:
            raise UserError(f"{folder.uri}/{name}: line {number} is not `patient file class source`; fetch it again")
    return pd.DataFrame(rows, columns=["group", "image_id", "class"])


def _classes(folder: Folder, words: list[str]) -> tuple[str, ...]:
    """The classes of the version that these words are of."""
    known = [classes for classes in CLASSES if set(words) <= {name.lower() for name in classes}]
    if not known:
        raise UserError(
            f"{folder.uri}: train.txt and test.txt name the classes {', '.join(sorted(set(words))[:6])}; COVIDx has "
            f"{' or '.join(', '.join(classes) for classes in CLASSES)}; take both files of one version"
        )
    return known[0]
