"""The contract between model and objective: everything learnable has happened by the time this exists."""

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """What the model makes of one microbatch (a NamedTuple for ZeRO-3's hooks).

    B studies, P patches, S sentences (padded), D embedding.
    """

    image_BD: Tensor
    """Normalised film embeddings."""
    report_BD: Tensor
    """Normalised report embeddings."""
    patches_BPD: Tensor
    """Normalised patch embeddings."""
    sentences_BSD: Tensor
    """Sentence embeddings: means of normalised tokens, not normalised themselves."""
    image_to_text_BSD: Tensor
    """Each sentence's attention over its study's patches, raw."""
    text_to_image_BPD: Tensor
    """Each patch's attention over its study's sentences, raw."""
    predicted_patches_BPD: Tensor
    """SimSiam prediction from the patches."""
    predicted_attended_BPD: Tensor
    """SimSiam prediction from the attended sentences."""
    scale: Tensor
    """Inverse temperature of the global loss, shape (1,)."""
    reconstruction_B1HW: Tensor | None
    """Films rebuilt from unmasked patches and reports (stage 2)."""
