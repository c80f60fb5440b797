"""CLIP: InfoNCE of films and texts with equal weights and a learned temperature that starts at 0.07 (Radford et al. 2021).

The loss of ConVIRT with other defaults. With them it is also that of `infonce`, whose temperature starts at 0.1 and which has no
choice of heads, pooling, captions and equal texts.
"""

from pydantic import Field

from cmcgns.methods import convirt


class Settings(convirt.Settings):
    film_weight: float = Field(0.5, ge=0.0, le=1.0)
    """Share of the direction in which each film has to find its text; the other direction has the rest."""
    temperature: float = Field(0.07, ge=0.01, le=1.0)
    """Temperature of the loss; the initial value if it is learned."""
    learn_temperature: bool = True
    """Learn the temperature; a sweep over `temperature` sets it to false."""


METHOD = convirt.ConVIRT
