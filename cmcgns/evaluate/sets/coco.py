"""Boxes of a COCO JSON, by the name of the image."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from cmcgns.data import storage
from cmcgns.data.sources.base import decode_text
from cmcgns.errors import UserError


@dataclass(frozen=True)
class CocoBoxes:
    """What a COCO JSON says of boxes."""

    categories: tuple[str, ...]
    by_path: dict[str, list[tuple[str, list[float]]]]
    """Category and x, y, w, h of each box of an image, by its file_name as written."""
    path_of: dict[str, str]
    """The file_name as written, by its last part, where one image alone has it."""

    def of(self, image: str) -> list[tuple[str, list[float]]] | None:
        """The boxes of an image; None where the file does not list it."""
        if image in self.by_path:
            return self.by_path[image]
        return self.by_path.get(self.path_of.get(_last(image), ""))


def read_coco(uri: str) -> CocoBoxes:
    """The boxes in the file at ``uri``; ``UserError`` where it is no COCO JSON."""
    try:
        return _parsed(json.loads(decode_text(storage.read_bytes(uri))))
    except json.JSONDecodeError as error:
        raise UserError(f"{uri} is no readable JSON: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{uri} is no COCO file of boxes ({type(error).__name__}: {error}); it needs images (id, file_name), "
            "categories (id, name) and annotations (image_id, category_id, bbox of x, y, w, h)"
        ) from None


def _parsed(coco: dict[str, Any]) -> CocoBoxes:
    names = {each["id"]: str(each["name"]) for each in coco["categories"]}
    paths = {each["id"]: str(each["file_name"]) for each in coco["images"]}
    by_path: dict[str, list[tuple[str, list[float]]]] = {path: [] for path in paths.values()}
    for each in coco["annotations"]:
        x, y, w, h = (float(number) for number in each["bbox"])
        by_path[paths[each["image_id"]]].append((names[each["category_id"]], [x, y, w, h]))
    times = Counter(_last(path) for path in by_path)
    path_of = {_last(path): path for path in by_path if times[_last(path)] == 1}
    return CocoBoxes(tuple(dict.fromkeys(names[key] for key in sorted(names))), by_path, path_of)


def _last(path: str) -> str:
    return path.rpartition("/")[2]
