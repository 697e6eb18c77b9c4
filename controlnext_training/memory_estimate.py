"""Memory estimate of a step on a transformer, in four terms, and the setting to change where it does not fit.

    most = frozen weights + 16 B * trained numbers + max(blocks, encoder) + copies
    blocks = rows * tokens * width * bytes * (number of blocks + inside)      tokens of text and picture
    encoder = rows * pixels * bytes * ENCODER
    encoder of clips = bytes * max(pixels * frames of a pass * CLIP_ENCODER, rows * tokens * width * CLIP_WIDENED)

With checkpointing each block keeps its input, once; `inside` is what one block keeps while it is computed again. Both
and ENCODER were counted on torch's meta device at published widths, in bf16, at 512 and 1024 pixels, with 2 and 4
blocks (Lumina2 and Chroma with 2 alone): they are the same to 6 %. Of Wan at the widths of 1.3B, 14B and 5B, clips of
17 to 81 frames and 256 x 256 to 480 x 832, attention without a table of all pairs: the same to 4 % for at least 1280
tokens. Its text, which cross attention alone reads, is not among them: 3 numbers a token and channel. In fp32
a step needs a quarter less of it, since norms and modulations, which compute in fp32, make no copies. Optimizer: AdamW.
No GPU has run it, and its allocator adds its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

ENCODER = 360
"""Numbers of the compute dtype for each pixel of a hint, gradients included, the encoder being checkpointed."""
CLIP_ENCODER = 477
"""Numbers for each pixel of the frames in one pass, which is computed again as one part: 460 to 494 were counted."""
CLIP_WIDENED = 15
"""Numbers for each token and channel while the maps of clips get the base's width, gradients included."""
TRAINED = 16
"""Bytes per trained value: itself, its gradient and AdamW's two moments, in fp32."""
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """Sizes of a step."""

    rows: int
    tokens: int
    """Number of tokens that go through the blocks, of text and picture together, or of all frames of a clip."""
    width: int
    blocks: int
    inside: float
    """Number of values per token and channel that one block stores while it is recomputed; a constant of the family."""
    pixels: int
    """Number of pixels of one hint."""
    itemsize: int
    """Bytes per value in the compute dtype."""
    frozen: int
    """Bytes of the frozen weights on the device."""
    largest: int
    """Number of values in the largest weight, of which widening makes copies."""
    trained: int
    """Numbers that train."""
    frames_in_pass: int = 0
    """Frames of a clip's hint that the encoder takes at once; 0: a hint is one picture."""


@dataclass(frozen=True, slots=True)
class Need:
    """Memory need of a step in bytes, by term."""

    weights: int
    trained: int
    blocks: int
    encoder: int
    copies: int

    @property
    def total(self) -> int:
        """Peak memory in bytes: the encoder computes before the blocks and after them."""
        return self.weights + self.trained + max(self.blocks, self.encoder) + self.copies

    def __str__(self) -> str:
        parts = {
            "frozen weights": self.weights,
            "trained weights": self.trained,
            "activations": max(self.blocks, self.encoder),
            "copies": self.copies,
        }
        return f"{self.total / GIB:.1f} GiB: " + ", ".join(f"{name} {n / GIB:.1f}" for name, n in parts.items())


def needed(step: StepShape) -> Need:
    """Memory of a step by the formula of this module, in bytes.

    copies: the largest weight in the compute dtype and, before it is scaled, in fp32.
    """
    numbers = step.rows * step.tokens * step.width * (step.blocks + step.inside)
    return Need(
        weights=step.frozen,
        trained=TRAINED * step.trained,
        blocks=round(numbers * step.itemsize),
        encoder=_encoder_numbers(step) * step.itemsize,
        copies=step.largest * (step.itemsize + 4),
    )


def _encoder_numbers(step: StepShape) -> int:
    if not step.frames_in_pass:
        return ENCODER * step.rows * step.pixels
    widened = CLIP_WIDENED * step.rows * step.tokens * step.width
    return max(CLIP_ENCODER * step.pixels * step.frames_in_pass, widened)


def offloaded(frozen: int, blocks: int) -> int:
    """Bytes on the device when `frozen` bytes are offloaded to host memory: two blocks out of `blocks`."""
    return 2 * frozen // max(blocks, 1)


def advice(step: StepShape, offload: bool, available: int) -> str:
    """First setting, as text, that makes a step fit into `available` bytes; "" where it already fits."""
    if needed(step).total <= available:
        return ""
    settings: list[tuple[str, StepShape]] = []
    if not offload:
        settings.append(("offload = true", replace(step, frozen=offloaded(step.frozen, step.blocks))))
    if step.rows > 1:
        settings.append((f"batch_size = 1 with accumulation = {step.rows}", replace(step, rows=1)))
    both = settings[-1][1] if settings else step
    if len(settings) == 2:
        both = replace(settings[0][1], rows=1)
        settings.append((f"{settings[0][0]} and {settings[1][0]}", both))
    fits = [words for words, changed in settings if needed(changed).total <= available]
    return (
        f"Set {fits[0]}."
        if fits
        else "Take a smaller resolution, or a base in fp8, besides offload and batch_size = 1."
    )
