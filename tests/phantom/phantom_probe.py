"""Two probes of the phantom's films: a linear model on thumbnails and a small ResNet on films."""

import cv2
import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from cmcgns.phantom import FINDINGS, PhantomCorpus

Films = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.float32]


def films_and_labels(corpus: PhantomCorpus) -> tuple[Films, Labels]:
    """The first film of every study (studies, height, width) and its labels (studies, findings)."""
    films = np.stack([corpus.render(i) for i in range(corpus.studies)])
    labels = [[corpus.study(i).labels[name] for name in FINDINGS] for i in range(corpus.studies)]
    return films, np.array(labels, np.float32)


def linear_auc(films: Films, labels: Labels, train: int, penalty: float = 1.0) -> dict[str, float]:
    """AUC of each finding on the studies after the first ``train``, by a linear model on 32 x 32 thumbnails."""
    small = [cv2.resize(film, (32, 32), interpolation=cv2.INTER_AREA) for film in films]
    flat = np.stack(small).reshape(len(films), -1).astype(np.float64)
    flat = StandardScaler().fit(flat[:train]).transform(flat)
    scores = {}
    for k, name in enumerate(FINDINGS):
        probe = LogisticRegression(C=1 / penalty, max_iter=1000).fit(flat[:train], labels[:train, k])
        scores[name] = float(roc_auc_score(labels[train:, k], probe.decision_function(flat[train:])))
    return scores


class Block(nn.Module):
    """Two convolutions and a skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.around = nn.Identity() if stride == 1 and inputs == outputs else around

    def forward(self, x: Tensor) -> Tensor:
        """Features at the block's stride."""
        return torch.relu(self.second(torch.relu(self.first(x))) + self.around(x))


class SmallResNet(nn.Module):
    """One logit per finding; a tenth of the width of a ResNet-18."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(1, width, 5, 2, 2, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks = Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)
        self.features = nn.Sequential(stem, *blocks, Block(4 * width, 6 * width, 2))
        self.head = nn.Linear(12 * width, len(FINDINGS))

    def forward(self, x: Tensor) -> Tensor:
        """Logits from the mean and the maximum over positions."""
        z = self.features(x)
        return self.head(torch.cat([z.mean((2, 3)), z.amax((2, 3))], 1))


def small_resnet_auc(films: Films, labels: Labels, train: int, epochs: int, batch: int = 32) -> dict[str, float]:
    """AUC of each finding on the studies after the first ``train``, by a ResNet trained on the others' labels."""
    torch.manual_seed(0)
    net = SmallResNet().to(memory_format=torch.channels_last)
    images, targets = torch.from_numpy(films)[:, None], torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(net.parameters(), lr=6e-3, weight_decay=0.02)
    steps = epochs * (train // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps, pct_start=0.25)
    for _ in range(epochs):
        for rows in torch.randperm(train)[: train // batch * batch].split(batch):
            loss = nn.functional.binary_cross_entropy_with_logits(net(_jittered(images[rows])), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        logits = torch.cat([net(_scaled(part)) for part in images[train:].split(100)]).numpy()
    return {name: float(roc_auc_score(labels[train:, k], logits[:, k])) for k, name in enumerate(FINDINGS)}


def _scaled(images: Tensor) -> Tensor:
    return (images.float() - 128) / 64


def _jittered(images: Tensor) -> Tensor:
    """Films shifted by up to 6 pixels, with another contrast and brightness; not mirrored, because sides matter."""
    down, across = torch.randint(-6, 7, (2,)).tolist()
    gain, lift = 0.8 + 0.4 * torch.rand(len(images), 1, 1, 1), 0.4 * (torch.rand(len(images), 1, 1, 1) - 0.5)
    return torch.roll(_scaled(images), (down, across), (2, 3)) * gain + lift
