"""Evaluation beside the obvious: features of a ResNet-50 through Ray Data beside a bare forward loop, and linear probes of size.

Run alone: python -m tests.benchmarks.evaluating
"""

import sys
import time
from statistics import median

import numpy as np
import ray
import torch

from cmcgns.cluster.session import ray_session
from cmcgns.data.labelled.corpus import phantom_set
from cmcgns.data.readers import PhantomSource
from cmcgns.evaluate.config import EvaluateConfig
from cmcgns.evaluate.encoders import RANDOM, EncoderSpec
from cmcgns.evaluate.features import stream_features
from cmcgns.evaluate.tasks.classification import linear_probe
from cmcgns.library.runs import PretrainedRun
from tests.benchmarks.measure import Line, where
from tests.small import small_config

FILMS, SIDE, BATCH, ROUNDS = 320, 224, 32, 3
IMAGES, CHANNELS, CLASSES = 50_000, 768, 14


def streamed(encoder: EncoderSpec, settings: EvaluateConfig) -> float:
    """Films a second from the first batch of features to the last: what Ray's processes take to start is left out."""
    images = phantom_set(PhantomSource(FILMS, 0, SIDE, SIDE))
    began, films = 0.0, 0
    for part in stream_features([encoder], images, SIDE, settings):
        films += len(part) if began else 0
        began = began or time.perf_counter()
    return films / (time.perf_counter() - began)


def bare(encoder: EncoderSpec) -> float:
    """Films a second of the same model over a batch that lies ready, on one thread."""
    torch.set_num_threads(1)
    model, film_B1HW = encoder.load(), torch.rand(BATCH, 1, SIDE, SIDE) * 2 - 1
    seconds = []
    with torch.inference_mode():
        for number in range(FILMS // BATCH):
            before = time.perf_counter()
            model(film_B1HW)
            if number:
                seconds.append(time.perf_counter() - before)
    return BATCH * len(seconds) / sum(seconds)


def probe_seconds() -> float:
    """A probe of ``CLASSES`` on ``IMAGES`` features, its penalty chosen on a tenth as many, on one thread."""
    random = np.random.default_rng(0)
    direction = random.normal(size=(CHANNELS, CLASSES))
    parts = [random.normal(size=(number, CHANNELS)) for number in (IMAGES, IMAGES // 10, IMAGES // 10)]
    labels = [(part @ direction + 20 * random.normal(size=(len(part), CLASSES)) > 0).astype(float) for part in parts]
    before = time.perf_counter()
    linear_probe(parts[0], labels[0], parts[1], labels[1], parts[2], exclusive=False)
    return time.perf_counter() - before


def lines() -> list[Line]:
    """The table."""
    config = small_config(
        model__image_encoder="resnet-50", data__image_size=SIDE, data__resize=SIDE, data__phantom_size=SIDE
    )
    encoder = EncoderSpec(RANDOM, PretrainedRun("nowhere", config, None), RANDOM)
    settings, ours, theirs = EvaluateConfig(run="nowhere", batch_size=BATCH), [], []
    with ray_session():
        for _ in range(ROUNDS):
            ours.append(streamed(encoder, settings))
            theirs.append(bare(encoder))
    assert not ray.is_initialized()
    ratio, seconds = median(ours) / median(theirs), probe_seconds()
    return [
        Line(
            f"features of a ResNet-50 at {SIDE} beside a bare forward loop",
            f"{ratio:.2f} ({median(ours):.1f} and {median(theirs):.1f} films/s)",
            ">= 0.90",
            ratio >= 0.9,
        ),
        Line(
            f"linear probes: {CLASSES} classes on {IMAGES} x {CHANNELS}, one thread",
            f"{seconds:.1f} s",
            "< 60 s",
            seconds < 60,
        ),
    ]


if __name__ == "__main__":
    print(where())
    table = lines()
    print(*table, sep="\n")
    sys.exit(any(line.good is False for line in table))
