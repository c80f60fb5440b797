"""A page of films with their reports, to be looked at."""

import re
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cmcgns.data.phantom.corpus import PhantomCorpus

_LINE = 13  # pixels
_MOST_LINES = 14


def contact_sheet(corpus: PhantomCorpus, path: str | Path, rows: int = 6, cols: int = 6, start: int = 0) -> Path:
    """``path``, a PNG of the first films of ``rows`` x ``cols`` studies, each over its findings and impression."""
    height, width = corpus.height, corpus.width
    cell = height + _MOST_LINES * _LINE + 8
    sheet = Image.new("L", (cols * width, rows * cell), 255)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=10)
    for k in range(min(rows * cols, corpus.studies - start)):
        left, top = k % cols * width, k // cols * cell
        sheet.paste(Image.fromarray(corpus.render(start + k)), (left, top))
        text = "\n".join(_lines(corpus.study(start + k).report, int(width / 5.4)))
        pen.multiline_text((left + 4, top + height + 3), text, fill=0, font=font, spacing=2)
    sheet.save(path)
    return Path(path)


def _lines(report: str, columns: int) -> list[str]:
    """FINDINGS and IMPRESSION in lines of ``columns`` characters, cut where the cell ends."""
    body = re.search(r"(FINDINGS|IMPRESSION):.*", report, re.DOTALL)
    paragraphs = (body.group() if body else report).replace("  ", " ").split("\n")
    return [line for part in paragraphs if part for line in textwrap.wrap(part, columns)][:_MOST_LINES]
