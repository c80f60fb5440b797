"""Settings of a table that lists the findings of each film in one cell. Does not import pandas, so that `--help` is fast."""

from typing import Self

from pydantic import Field, PositiveInt, model_validator

from cmcgns.config import Section


class ListedFindings(Section):
    """How a column of your own table lists the findings of each film."""

    column: str = "labels"
    """Column with the findings of a film, all in one cell. A blank cell has none."""
    separator: str = Field("|", min_length=1)
    """What stands between two findings."""
    classes: tuple[str, ...] = ()
    """Findings to classify; by default all that a training film has."""
    commonest: PositiveInt | None = None
    """Classify only this many findings, those of most training films."""
    no_finding: tuple[str, ...] = ("No Finding", "normal")
    """Entries that mean that there is none, in upper or lower case."""
    unknown: tuple[str, ...] = ()
    """Entries that mean that nobody looked: a film with one of them has no labels."""

    @model_validator(mode="after")
    def one_choice_of_classes(self) -> Self:
        if self.classes and self.commonest:
            raise ValueError(f"give either classes or commonest {self.commonest}, not both")
        return self
