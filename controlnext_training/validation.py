"""Validation: loss at fixed noise, pictures at control strength 0 and 1, and how well they follow their hints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..controlnext_core.fidelity import METRICS
from .base_model.controlled import Controlled
from .base_model.encode import is_out_of_memory
from .base_model.preview import sample as sample_pictures
from .config import TrainConfig
from .data.samples import BrokenSample, DatasetError
from .encoded import Encoded, Store
from .journal import Observer
from .plots import Cell, picture_grid
from .seeding import generator
from .step import DiffusionObjective, conditions_of, draw, losses

if TYPE_CHECKING:
    from PIL.Image import Image

STRENGTHS = ("without control", "with control (strength 1)")

VALIDATING = "validating"
"""First word of a validation's progress texts."""

SHOWN = 4
"""Number of rows of the grid that are shown during a run; the file has all."""

TONES, EDGES = "tone correlation", "edge F1"
METRIC_NAMES = {"mask": "mask overlap", "blur": TONES, "gray": TONES, "depth": TONES, "low_resolution": TONES}
"""Kind of hint -> name of its metric, EDGES for all other kinds; 1 is a perfect match."""

LEVELS = (0.125, 0.375, 0.625, 0.875)
"""Quantiles in (0, 1) of the noise levels at which the loss is measured."""


@dataclass(frozen=True)
class Validation:
    """Metrics of one validation pass."""

    loss: float
    """Mean loss at strength 1, over fixed samples, noise and noise levels."""
    loss_without: float
    """Mean loss at strength 0, over the same samples, noise and noise levels."""
    effect: float
    """Relative difference |loss - loss_without| / loss_without."""
    fidelity: float | None
    """Mean of the metric of the hint's kind over the pictures at strength 1; None without pictures."""
    fidelity_without: float | None
    grid: Image | None
    distance: float | None = None
    """Mean over the pictures at strength 1 of the root mean square difference between their latents and the original's,
    from the base's autoencoder; None without pictures."""
    distance_without: float | None = None
    short: Image | None = None
    """First SHOWN rows of the grid, where it has more; else None."""


@dataclass(frozen=True)
class Pictures:
    """Pictures of a validation; pairs are (at strength 0, at strength 1)."""

    grid: Image
    short: Image | None
    fidelity: tuple[float, float]
    distance: tuple[float, float]


class Validator:
    """Validator of a run on fixed samples."""

    def __init__(
        self,
        store: Store,
        indices: Sequence[int],
        config: TrainConfig,
        objective: DiffusionObjective,
        observer: Observer,
    ) -> None:
        self.store, self.config, self.objective, self.observer = store, config, objective, observer
        self.indices = list(indices)[: config.validation_samples]
        self.pictures = len(self.indices)
        """Number of pictures to make; halved after a lack of memory."""

    def run(self, controlled: Controlled, tell: Callable[[str], None] = lambda text: None) -> Validation:
        """Measure losses and draw pictures with the current weights; training state and random numbers do not change.

        tell: called with a text about each coming part.
        """
        tell("loss with and without the control")
        samples = self._readable()
        with torch.no_grad(), _training_off(controlled):
            loss, without = (self._loss(controlled, samples, strength) for strength in (1.0, 0.0))
            seen = self._pictures_that_fit(controlled, samples, tell)
        return Validation(
            loss=loss,
            loss_without=without,
            effect=abs(loss - without) / max(without, 1e-12),
            fidelity=seen.fidelity[1] if seen else None,
            fidelity_without=seen.fidelity[0] if seen else None,
            grid=seen.grid if seen else None,
            distance=seen.distance[1] if seen else None,
            distance_without=seen.distance[0] if seen else None,
            short=seen.short if seen else None,
        )

    def _readable(self) -> list[Encoded]:
        """Samples that can still be read; others are left out from now on. Raises DatasetError if none is left."""
        found: dict[int, Encoded] = {}
        for index in self.indices:
            try:
                found[index] = self.store.sample(index, index, dropout=False)
            except BrokenSample as error:
                self.observer.say(f"from now on left out of the validation: {error}")
        self.indices = list(found)
        if not found:
            raise DatasetError("None of the validation's samples can be read any more. Check the files.")
        return list(found.values())

    def _loss(self, controlled: Controlled, samples: Sequence[Encoded], strength: float) -> float:
        found = []
        for index, sample in zip(self.indices, samples, strict=True):
            for place, level in enumerate(LEVELS):
                position = index * len(LEVELS) + place
                batch = draw([sample], [position], self.objective, self.config, controlled, [level], " of validation")
                found.append(losses(controlled, batch, self.objective, self.config, strength))
        return float(torch.cat(found).mean())

    def _pictures_that_fit(
        self, controlled: Controlled, samples: Sequence[Encoded], tell: Callable[[str], None]
    ) -> Pictures | None:
        """Draw as many pictures as memory allows; None where not even one fits."""
        while self.pictures:
            try:
                return self._pictures(controlled, samples[: self.pictures], tell)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            self.pictures //= 2
            what = f"{self.pictures} pictures" if self.pictures else "no more pictures, only the loss"
            self.observer.say(f"validation: not enough memory; from now on {what}. Training continues.")
            if controlled.device.type == "cuda":
                torch.cuda.empty_cache()
        return None

    def _pictures(self, controlled: Controlled, samples: Sequence[Encoded], tell: Callable[[str], None]) -> Pictures:
        metric = METRICS[self.config.hint]
        rows, scores, distances = [], [], []
        for number, sample in enumerate(samples):
            tell(f"picture {number + 1} of {len(samples)}")
            hint, original = _middle(sample.hint)[0].movedim(0, -1), _shown(sample.latent)
            target = _middle(self.store.base.picture(original))[0]
            clips = [self._pictures_of(controlled, sample, number, strength) for strength in (0.0, 1.0)]
            pair = [_middle(clip)[0] for clip in clips]
            followed = [metric(picture.numpy(), hint.numpy()) for picture in pair]
            again = [self.store.base.latent(clip) for clip in clips]
            away = [float((latent - original).square().mean().sqrt()) for latent in again]
            scores.append(followed)
            distances.append(away)
            rows.append([*_given(hint, target, sample.caption), *map(self._drawn, STRENGTHS, pair, followed, away)])
        return Pictures(
            grid=picture_grid(rows),
            short=picture_grid(rows[:SHOWN]) if len(rows) > SHOWN else None,
            fidelity=_means(scores),
            distance=_means(distances),
        )

    def _drawn(self, name: str, picture: Tensor, followed: float, away: float) -> Cell:
        """Cell of a picture of the model, with its figures by name."""
        return Cell(picture, name, f"{METRIC_NAMES.get(self.config.hint, EDGES)} {followed:.2f}, distance {away:.2f}")

    def _pictures_of(self, controlled: Controlled, sample: Encoded, number: int, strength: float) -> Tensor:
        """Pictures (n, H, W, 3) in [0, 1]: one, or all frames of a clip in one latent, or the middle one of another
        clip.
        """
        noise = torch.randn(
            sample.latent.shape, generator=generator(self.config.seed, "validation picture", number)
        ).to(controlled.device)
        latents = sample_pictures(
            controlled,
            noise,
            [conditions_of(sample, sample.given, controlled, self.config.validation_guidance)],
            [conditions_of(sample, self.store.empty(sample), controlled, self.config.validation_guidance)],
            sample.hint.to(controlled.device),
            steps=self.config.validation_steps,
            cfg=self.config.validation_cfg,
            strength=strength,
        )
        return self.store.base.picture(_shown(latents))


def _middle(rows: Tensor) -> Tensor:
    """Middle row of a tensor, with its first dimension."""
    return rows[len(rows) // 2 : len(rows) // 2 + 1]


def _shown(latents: Tensor) -> Tensor:
    """Latents of a sample that are decoded: all of a clip in one latent, else the middle frame."""
    return latents if latents.ndim == 5 else _middle(latents)


def _given(hint: Tensor, target: Tensor, caption: str) -> tuple[Cell, Cell]:
    """Cells of a sample's hint and picture, with its prompt under the hint."""
    return Cell(hint, f"hint, prompt: {caption}" if caption else "hint, no prompt"), Cell(target, "original")


def _means(pairs: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Means over the pictures, at strength 0 and at strength 1."""
    without, at_full = torch.tensor(pairs).mean(dim=0).tolist()
    return without, at_full


@contextmanager
def _training_off(controlled: Controlled) -> Iterator[None]:
    was = controlled.training
    try:
        controlled.eval()
        yield
    finally:
        controlled.train(was)
