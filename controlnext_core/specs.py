"""Table of every released ControlNeXt variant: its site in the base and how it is added.

A fact about a variant is stated here once, with its source; networks, detection, nodes, tests and docs read it from
here. "rel" in a source means the released inference code of that variant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from ..models.controlnext import ControlNeXtConfig, Stage


class Family(str, Enum):
    """Families of base models, recognised by the network's shape (see `comfy_adapter.bases`)."""

    SD15 = "SD1.5"
    SD21 = "SD2.1"
    SDXL = "SDXL"
    SVD = "SVD"
    SD3 = "SD3"
    FLUX = "Flux.1"
    CHROMA = "Chroma"
    QWEN_IMAGE = "Qwen-Image"
    LUMINA2 = "Lumina2"
    Z_IMAGE = "Z-Image"
    WAN = "Wan"
    WAN_5B = "Wan 2.2 5B"
    OTHER = "other"


class Site(Enum):
    """Site of the base at which a control is added. Only the adapter maps sites to the host's blocks."""

    AFTER_CONV_IN = "after the first convolution"
    AFTER_DOWN_0 = "after the first down block and its downsampler"
    BEFORE_MIDDLE = "before the middle block"
    AFTER_MIDDLE = "after the middle block"
    AFTER_JOINT_0 = "after the first joint block"


class Halves(str, Enum):
    """Halves of classifier-free guidance that get the control."""

    AUTO = "auto"
    BOTH = "both"
    POSITIVE = "positive"
    NEGATIVE = "negative"


class GainFormula(Enum):
    """Formula of the injection's gain, from the encoder's learned `scale` and the `factor` of `Gain`."""

    CONSTANT = "factor"
    LEARNED = "factor * scale"
    SIGMOID = "factor * sigmoid(scale)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Gain at strength 1 with which a variant was released."""

    formula: GainFormula = GainFormula.CONSTANT
    factor: float = 1.0
    uncond: float | None = None
    """Gain of the negative half under `auto`; None: the same as the positive half."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """Rule by which a control is added at its site."""

    site: Site
    pool_first: bool
    """True: pool to the site's size, then normalise. False: normalise, then pool."""
    eps: float
    """Constant added to the standard deviation of the control, not to its variance."""
    gain: Gain = Gain()
    normalization: str = "released"
    """Name of the normalisation, a key of `injection.NORMALIZATIONS`."""
    project_last: bool = False
    """True: the encoder's last convolution runs on the pooled map, after the cache; equal, as both are linear, and
    cheaper where the base has many more channels than the encoder. False: it runs in the encoder's pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultDifferences:
    """Weight differences of a variant that are trained by default."""

    subset: str = "to_out"
    """Named subset of the family's base (`Base.trainable`)."""
    rank: int = 16
    """Rank of the two factors of a difference; 0: full differences."""
    blocks: int | None = None
    """Number of blocks that have differences, from the first on; None: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """Variant of ControlNeXt: one row of the table."""

    name: str
    family: Family
    build: str
    """Build of the encoder: a key of BUILDS."""
    fusion: Fusion
    title: str
    source: str
    differences: DefaultDifferences | None = None
    """Default differences; None for variants of UNets, whose differences are full (see the trainer's recipes)."""

    @property
    def on_transformer(self) -> bool:
        """True: the base is a transformer, which decides the encoder's output channels. False: a UNet."""
        return self.fusion.site is Site.AFTER_JOINT_0


BUILDS: dict[str, ControlNeXtConfig] = {
    # SD15-L, 5,352,327 parameters: no stem, no norms in the middle
    "gen1a": ControlNeXtConfig(
        stages=(Stage(3, 128, 1), Stage(128, 256, 8), Stage(256, 256, 8)),
        stem=False,
        mid_norm=False,
        mid_skip=False,
        out_channels=1280,
        learned_scale=True,
    ),
    # SDXL-0, June 2024, 5,353,351 parameters: as gen1a, norms in the middle
    "gen1a_norm": ControlNeXtConfig(
        stages=(Stage(3, 128, 1), Stage(128, 256, 8), Stage(256, 256, 8)),
        stem=False,
        mid_skip=False,
        out_channels=1280,
        learned_scale=True,
    ),
    # SDXL-1, July 2024, 5,610,176 parameters
    "gen1b": ControlNeXtConfig(
        stages=(Stage(128, 128, 4), Stage(128, 256, 8), Stage(256, 256, 8)),
        stem=True,
        stem_padded=False,
        stem_pool=True,
        out_channels=1280,
    ),
    # SVD-v1, 5,610,177 parameters
    "gen1b_scale": ControlNeXtConfig(
        stages=(Stage(128, 128, 4), Stage(128, 256, 8), Stage(256, 256, 8)),
        stem=True,
        stem_padded=False,
        stem_pool=True,
        out_channels=1280,
        learned_scale=True,
    ),
    # SD15-T, SDXL-2, SVD-v2-T, 3,526,400 parameters
    "gen2": ControlNeXtConfig(stages=(Stage(128, 128, 4), Stage(128, 256, 8)), stem=True),
    # SVD-v2 as published: the same keys, stem convolutions two and three without padding
    "gen2_unpadded": ControlNeXtConfig(stages=(Stage(128, 128, 4), Stage(128, 256, 8)), stem=True, stem_padded=False),
    # ours: gen2 with a third stage, to a 16th of the hint, for bases of 32 pixels a token
    "gen2_deep": ControlNeXtConfig(
        stages=(Stage(128, 128, 4), Stage(128, 256, 8), Stage(256, 256, 8)), stem=True, out_channels=2048
    ),
}

TOKENS = Fusion(site=Site.AFTER_JOINT_0, pool_first=True, eps=1e-12, project_last=True)
"""Fusion of `sd15` with the picture's tokens in place of pixels; every transformer has it."""


def _on_transformer(
    name: str, family: Family, title: str, source: str, blocks: int | None = None, build: str = "gen2"
) -> Spec:
    return Spec(
        name=name,
        family=family,
        build=build,
        fusion=TOKENS,
        title=title,
        source=source,
        differences=DefaultDifferences(blocks=blocks),
    )


SPECS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        Spec(
            name="sd15",
            family=Family.SD15,
            build="gen2",
            fusion=Fusion(site=Site.AFTER_DOWN_0, pool_first=True, eps=1e-12),
            title="ControlNeXt SD1.5 (second generation, August 2024)",
            source="rel ControlNeXt-SD1.5-Training; the gain is a training flag that its files do not hold",
        ),
        Spec(
            name="sd15_legacy",
            family=Family.SD15,
            build="gen1a",
            fusion=Fusion(site=Site.AFTER_MIDDLE, pool_first=True, eps=1e-12, gain=Gain(formula=GainFormula.LEARNED)),
            title="ControlNeXt SD1.5 (first generation, the published files)",
            source="rel ControlNeXt-SD1.5",
        ),
        Spec(
            name="sdxl",
            family=Family.SDXL,
            build="gen2",
            fusion=Fusion(site=Site.AFTER_CONV_IN, pool_first=False, eps=1e-12),
            title="ControlNeXt SDXL (August 2024 on)",
            source="rel ControlNeXt-SDXL, models/unet.py, since commit 0f97c42",
        ),
        Spec(
            name="sdxl_july",
            family=Family.SDXL,
            build="gen1b",
            fusion=Fusion(site=Site.AFTER_MIDDLE, pool_first=True, eps=1e-12),
            title="ControlNeXt SDXL (July 2024)",
            source="rel ControlNeXt-SDXL, commit d1d16da",
        ),
        Spec(
            name="sdxl_june",
            family=Family.SDXL,
            build="gen1a_norm",
            fusion=Fusion(site=Site.AFTER_MIDDLE, pool_first=True, eps=1e-12, gain=Gain(formula=GainFormula.LEARNED)),
            title="ControlNeXt SDXL (June 2024)",
            source="rel ControlNeXt-SDXL, commit 5b52496",
        ),
        Spec(
            name="svd_v1",
            family=Family.SVD,
            build="gen1b_scale",
            fusion=Fusion(
                site=Site.BEFORE_MIDDLE,
                pool_first=False,
                eps=1e-5,
                gain=Gain(formula=GainFormula.SIGMOID, factor=1.3, uncond=0.65),
            ),
            title="ControlNeXt SVD v1",
            source="rel ControlNeXt-SVD; the sigmoid follows the zeroing, hence 1.3 * sigmoid(0) = 0.65",
        ),
        Spec(
            name="svd_v2",
            family=Family.SVD,
            build="gen2_unpadded",
            fusion=Fusion(site=Site.AFTER_DOWN_0, pool_first=False, eps=1e-5, gain=Gain(factor=0.2, uncond=0.0)),
            title="ControlNeXt SVD v2 (as published, unpadded stem)",
            source="rel ControlNeXt-SVD-v2",
        ),
        Spec(
            name="svd_v2_padded",
            family=Family.SVD,
            build="gen2",
            fusion=Fusion(site=Site.AFTER_DOWN_0, pool_first=False, eps=1e-5, gain=Gain(factor=0.2, uncond=0.0)),
            title="ControlNeXt SVD v2 (padded stem, as the released trainer makes it)",
            source="rel ControlNeXt-SVD-v2-Training",
        ),
        _on_transformer(
            "sd3",
            Family.SD3,
            "ControlNeXt SD3 and SD3.5",
            "ours: the paper runs on SD3, and released neither code nor weights of it",
        ),
        _on_transformer("flux", Family.FLUX, "ControlNeXt Flux.1", "ours: the rule of `sd3`"),
        _on_transformer("chroma", Family.CHROMA, "ControlNeXt Chroma", "ours: the rule of `sd3`"),
        _on_transformer(
            "qwen_image", Family.QWEN_IMAGE, "ControlNeXt Qwen-Image", "ours: the rule of `sd3`", blocks=30
        ),
        _on_transformer("lumina2", Family.LUMINA2, "ControlNeXt Lumina2", "ours: the rule of `sd3`"),
        _on_transformer("z_image", Family.Z_IMAGE, "ControlNeXt Z-Image", "ours: the rule of `sd3`"),
        _on_transformer(
            "wan",
            Family.WAN,
            "ControlNeXt Wan 2.1 and 2.2",
            "ours: the rule of `sd3`, over all frames of a clip; the paper ran on another video transformer",
            blocks=20,
        ),
        _on_transformer(
            "wan_5b",
            Family.WAN_5B,
            "ControlNeXt Wan 2.2 5B",
            "ours: the rule of `wan`, with a third stage for tokens of 32 pixels",
            blocks=15,
            build="gen2_deep",
        ),
    )
}

PAPER_FUSION = "paper"
"""Name of the normalisation in the paper's equation 10, for any row: `with_normalization(spec, PAPER_FUSION)`."""


def with_normalization(spec: Spec, normalization: str) -> Spec:
    """Copy of the variant with another key of `injection.NORMALIZATIONS`."""
    return replace(spec, fusion=replace(spec.fusion, normalization=normalization))


def with_trained_gain(spec: Spec, gain: float) -> Spec:
    """Copy of the variant with its trained gain in place of the row's constant factor."""
    return replace(spec, fusion=replace(spec.fusion, gain=replace(spec.fusion.gain, factor=gain)))


def config_of(spec: Spec, out_channels: int | None = None) -> ControlNeXtConfig:
    """Configuration of a variant's encoder; out_channels: those of the file, None: those of the variant."""
    config = BUILDS[spec.build]
    return config if out_channels is None else replace(config, out_channels=out_channels)
