"""Detection of a ControlNet-XS from a file's header, or an error that names the kind of file and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..models.controlnet_xs import HINT_CONVS, ControlNetXS, ControlNetXSConfig
from .checkpoint import Header, compare_shapes
from .detection import DetectionError, read_control_file
from .encodable import cut
from .numbers_in_names import Numbered
from .specs import Family
from .xs_key_maps import DIFFUSERS, OFFICIAL, from_ours, reduce_fused, to_ours
from .xs_specs import (
    NORM_RULES,
    NormRule,
    XSLayout,
    XSShape,
    build_config,
    heads_of,
    parse_heads,
    released_as,
)

OFFICIAL_MARK = "enc_zero_convs_in.0.0.weight"
ADAPTER_MARK = "control_to_base_for_conv_in.weight"
FUSED_MARK = "ctrl_conv_in.weight"

LEFTOVERS = ("scale_list", "control_model.label_emb.", "diffusion_model.")
"""Tensors beside the control in released and whole-engine files: not used in inference, and not part of the control."""

TYPE_C = ("control_model.output_blocks.", "middle_block_in.", "dec_zero_convs_in.")

HEADS_KEY, NORM_KEY = "controlnext.xs_num_heads", "controlnext.xs_norm_rule"
"""Metadata keys of this pack's files for facts that shapes do not give."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class XSFile:
    """ControlNet-XS file, before its network is built."""

    header: Header
    format: str
    shape: XSShape
    names: dict[str, str]
    """This pack's name -> name in the file."""

    @property
    def family(self) -> Family:
        return self.shape.family

    def norm_rule(self, chosen: str = "auto") -> NormRule:
        """Normalisation rule of a file: the user's choice, else the file's metadata, else by its origin.

        auto: the official rule for files with the released names and for the released sizes, else diffusers'. Raises
        DetectionError for a rule in the metadata that is not in the table.
        """
        said = self.header.metadata.get(NORM_KEY)
        if chosen == "auto" and said is not None and said not in NORM_RULES:
            raise DetectionError(
                f"{self.header.path}: its metadata says {NORM_KEY}={cut(repr(said))}; {', '.join(NORM_RULES)} are "
                "understood. Set norm_rule to one of these."
            )
        if chosen == "auto":
            chosen = said or (OFFICIAL if self.format == OFFICIAL or released_as(self.shape) else DIFFUSERS)
        return NORM_RULES[chosen]

    def heads(self, num_heads: str = "", beside: str = "") -> tuple[int, ...]:
        """Attention heads from the user, the file's metadata, the configuration `beside` the file or the table, in this
        order.

        Raises DetectionError where they do not divide the widths.
        """
        given = num_heads or self.header.metadata.get(HEADS_KEY, "") or beside
        try:
            return heads_of(self.shape, parse_heads(given), str(self.header.path))
        except ValueError as error:
            raise DetectionError(str(error)) from error

    def config(self, norm_rule: str = "auto", num_heads: str = "", beside: str = "") -> ControlNetXSConfig:
        """Configuration of the file's network."""
        return build_config(self.shape, self.heads(num_heads, beside), self.norm_rule(norm_rule))


def is_xs(names: Iterable[str]) -> bool:
    """True: at least one name marks a ControlNet-XS, of any format. False: none does."""
    return any(name.endswith((OFFICIAL_MARK, ADAPTER_MARK)) or name.endswith(FUSED_MARK) for name in names)


def read_xs_file(header: Header) -> XSFile:
    """Recognise a ControlNet-XS: released names under any prefix, in a whole engine, diffusers' adapter or fused model.

    Raises DetectionError for other files, and for type C, pruned and damaged files, naming the fault.
    """
    if not is_xs(header.shapes):
        raise DetectionError(f"{header.path}: is not a ControlNet-XS. {_what_else(header)}")
    format, given = _part(header)
    shapes = {name: header.shapes[stored] for name, stored in given.items()}
    layout = _layout(shapes, format, header)
    ours = to_ours(shapes, layout, format)
    unknown = [name for name in shapes.keys() - ours.values() if not name.startswith(LEFTOVERS)]
    shape = _shape({name: shapes[theirs] for name, theirs in ours.items()}, layout, format, header)
    problems = _problems(shape, {name: shapes[theirs] for name, theirs in ours.items()}, layout, format)
    if problems or unknown:
        more = compare_shapes({}, dict.fromkeys(sorted(unknown), ())) if unknown else ""
        raise DetectionError(
            f"{header.path}: looks like a ControlNet-XS for {shape.family.value}, but does not match it: "
            f"{'; '.join(filter(None, (problems, more)))}. The file is damaged, pruned or of an unknown "
            "kind: download it again."
        )
    return XSFile(header, format, shape, {name: given[theirs] for name, theirs in ours.items()})


def _part(header: Header) -> tuple[str, dict[str, str]]:
    """Format of the file, and the control's names in it -> names in the file."""
    for mark, format in ((OFFICIAL_MARK, OFFICIAL), (ADAPTER_MARK, DIFFUSERS)):
        found = min((name for name in header.shapes if name.endswith(mark)), key=len, default=None)
        if found is None:
            continue
        prefix = found.removesuffix(mark)
        part = {name[len(prefix) :]: name for name in header.shapes if name.startswith(prefix)}
        if prefix + FUSED_MARK in header.shapes:
            part = {name: part[fused] for name, fused in reduce_fused(part).items()}
        return format, part
    raise DetectionError(
        f"{header.path}: is a ControlNet-XS fused with its base model, without {ADAPTER_MARK}: it is incomplete. "
        "Download it again."
    )


def _what_else(header: Header) -> str:
    """Kind of a file that is not a ControlNet-XS, as a sentence."""
    try:
        file = read_control_file(header)
    except DetectionError as error:
        return "It " + str(error).removeprefix(f"{header.path}: ")
    return f"It is a ControlNeXt ({file.candidates[0].title}): load it with Load ControlNeXt."


def _layout(shapes: Shapes, format: str, header: Header) -> XSLayout:
    numbered = Numbered(shapes, str(header.path))
    levels, middle = (_official_levels if format == OFFICIAL else _adapter_levels)(shapes, numbered)
    depth = numbered.count(f"{middle}.transformer_blocks")
    numbered.check_layers(depth + sum(1 + blocks for level in levels for blocks in level))
    time, out = (
        ("control_model.time_embed.", "enc_zero_convs_out.")
        if format == OFFICIAL
        else ("time_embedding.", "control_to_base_for_conv_in.")
    )
    if any(name.startswith(TYPE_C) for name in shapes):
        raise DetectionError(
            f"{header.path}: is a ControlNet-XS of type C, which has a decoder of its own. Types A and B are "
            "supported, and all published files are of type B: choose one of those."
        )
    if not depth or not all(levels):
        raise DetectionError(
            f"{header.path}: is a pruned or incomplete ControlNet-XS: its control stream has no middle block, or a "
            "level without blocks. A whole one is needed."
        )
    return XSLayout(
        levels=tuple(levels),
        middle_depth=depth,
        own_time=any(name.startswith(time) for name in shapes),
        adds_in_encoder=any(name.startswith(out) for name in shapes),
    )


def _official_levels(shapes: Shapes, numbered: Numbered) -> tuple[list[tuple[int, ...]], str]:
    levels: list[list[int]] = [[]]
    for i in range(1, numbered.count("control_model.input_blocks")):
        block = f"control_model.input_blocks.{i}"
        if f"{block}.0.op.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append(numbered.count(f"{block}.1.transformer_blocks"))
    return [tuple(level) for level in levels], "control_model.middle_block.1"


def _adapter_levels(shapes: Shapes, numbered: Numbered) -> tuple[list[tuple[int, ...]], str]:
    levels = []
    for level in range(numbered.count("down_blocks")):
        down = f"down_blocks.{level}"
        levels.append(
            tuple(
                numbered.count(f"{down}.attentions.{i}.transformer_blocks")
                for i in range(numbered.count(f"{down}.resnets"))
            )
        )
    return levels, "mid_block.midblock.attentions.0"


def _shape(shapes: Shapes, layout: XSLayout, format: str, header: Header) -> XSShape:
    """Shape read from tensors in this pack's names; it is checked afterwards, by building the network."""
    out_layer = {"conv": "conv", "res": "res.conv2", "down": "down.conv"}

    def dim(name: str, axis: int) -> int:
        if len(shapes.get(f"{name}.weight", ())) <= axis:
            (theirs,) = from_ours([f"{name}.weight"], layout, format).values()
            raise DetectionError(
                f"{header.path}: is a pruned or incomplete ControlNet-XS: it has no {theirs}, with {len(layout.kinds)} "
                "blocks in its control stream. A whole one is needed: download it again."
            )
        return shapes[f"{name}.weight"][axis]

    blocks = range(len(layout.kinds))
    transformers = [f"encoder.{i}.transformer" if layout.kinds[i][2] else "" for i in blocks] + ["middle.0.transformer"]
    attn2 = f"{transformers[-1]}.transformer_blocks.0.attn2"
    time_dim = dim("middle.0.res.time_emb_proj", 1)
    return XSShape(
        layout=layout,
        widths=tuple(dim(f"encoder.{i}.{out_layer[layout.kinds[i][0]]}", 0) for i in blocks),
        base_widths=tuple(dim(f"base_to_control.{i}", 0) for i in blocks),
        decoder_widths=tuple(dim(f"decoder_to_base.{j}", 0) for j in range(sum(len(d) + 1 for d in layout.levels))),
        inner=tuple(dim(f"{name}.proj_in", 0) if name else 0 for name in transformers),
        context_dim=dim(f"{attn2}.to_k", 1),
        time_dim=time_dim,
        time_in=dim("time_embedding.linear_1", 1) if layout.own_time else time_dim // 4,
        linear=len(shapes[f"{transformers[-1]}.proj_in.weight"]) == 2,
        hint=(dim("hint_encoder.0", 1), *(dim(f"hint_encoder.{k}", 0) for k in range(HINT_CONVS))),
        in_channels=dim("encoder.0.conv", 1),
    )


def _problems(shape: XSShape, found: Shapes, layout: XSLayout, format: str) -> str:
    """Differences between the file and the network of its shape, in the file's names; empty for none."""
    if len(shape.decoder_widths) != len(shape.widths):
        return f"{len(shape.widths)} encoder blocks and {len(shape.decoder_widths)} connections to the decoder"
    one_head = tuple(min(1, inner) for inner in shape.inner)
    net = ControlNetXS(build_config(shape, one_head, NORM_RULES[OFFICIAL]), device="meta")
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    names = from_ours(wanted.keys() | found.keys(), layout, format)
    return compare_shapes({names[n]: s for n, s in wanted.items()}, {names[n]: s for n, s in found.items()})
