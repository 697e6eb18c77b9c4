"""UNet weights that come with a control: differences or full weights, as differences of the host's tensors.

"Published" is the layout of a weight file, "host" that of the base model (see `key_maps`). Tensors are processed one at
a time: no whole model in fp32 is held beside the file. The strength is applied by the host, not here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from enum import Enum

import torch
from torch import Tensor

from .checkpoint import CheckpointError, look_at, shape_of
from .finite import check_format, peak
from .key_maps import KeyMap, Target, as_target, family_hint, resolve_names, strip_prefix

HOST_PREFIX = "diffusion_model."
"""Prefix of a UNet's tensors in the host's patches."""

BaseWeights = Callable[[str], "Tensor | None"]
"""A name -> the base model's tensor without any patch, on the file's device; None = no such tensor."""

MAX_SAMPLES = 16
SAMPLED = 1 << 15
"""Number of values of a weight, evenly spread, that decide between differences and full weights; more would not change
the decision. Few enough for torch to use one thread: more would wait for other threads, which takes longest on a busy
machine."""
KEPT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FP16_MAX = torch.finfo(torch.float16).max

# Training moves weights by a small part of their size, and fine-tunes of one base stay close to each other.
# What lies between is not guessed: the wrong kind would double the model's weights, or take them away.
SMALL, HALF, ORTHOGONAL = 0.3, 0.5, 0.3


class WeightsKind(str, Enum):
    """Kind of a weights file's tensors."""

    DIFFERENCE = "difference"
    FULL = "full"


def decide_kind(file: Mapping[str, Tensor], base: BaseWeights, source: str = "the weights file") -> WeightsKind:
    """Decide between differences and full weights by size and direction relative to the base model's weights.

    base: by the names of `file`, in the published layout (`published_base`). Medians over up to 16 of the largest
    weights (no biases, no norms) of r = |file| / |base| and c = cosine(file, base) decide. Difference: r <= 0.3, or r <
    0.5 and |c| < 0.3. Full: r >= 0.5 and r c >= 0.5 (nearer to base than to 0). Raises CheckpointError with r and c for
    any other result, and where there is no weight to compare.
    """
    shapes = {name: shape_of(file, name) for name in file if name.endswith(".weight")}
    weights = [name for name, shape in shapes.items() if len(shape) >= 2]
    weights.sort(key=lambda name: (-math.prod(shapes[name]), name))
    measured: list[tuple[float, float]] = []
    for name in weights:
        tensor = base(name)
        if tensor is not None and (pair := _ratio_and_cosine(look_at(file, name), tensor)) is not None:
            measured.append(pair)
        if len(measured) == MAX_SAMPLES:
            break
    if not measured:
        raise CheckpointError(
            f"{source}: cannot tell whether it holds differences or full weights, as none of its {len(file)} "
            "tensors is a weight of this model (biases and norms do not tell). Set weights_kind."
        )
    ratio, cosine = (statistics.median(values) for values in zip(*measured, strict=True))
    if ratio <= SMALL or (ratio < HALF and abs(cosine) < ORTHOGONAL):
        return WeightsKind.DIFFERENCE
    if ratio >= HALF and ratio * cosine >= HALF:
        return WeightsKind.FULL
    raise CheckpointError(
        f"{source}: cannot tell differences (norm ratio to the model near 0) from full weights (ratio and "
        f"cosine near 1): over {len(measured)} tensors the ratio is {ratio:.3f}, the cosine {cosine:.3f}. "
        "Check that the model is of the file's family, then set weights_kind."
    )


def _ratio_and_cosine(tensor: Tensor, base: Tensor) -> tuple[float, float] | None:
    """(ratio of norms, cosine); None where the base is all zero or has another shape."""
    if tensor.shape != base.shape:
        return None
    step = -(-tensor.numel() // SAMPLED) or 1
    ours, theirs = (part.flatten()[::step].float() for part in (tensor, base))
    size, base_size = ours.norm().item(), theirs.norm().item()
    if base_size == 0:
        return None
    cosine = (ours * theirs).sum().item() / (size * base_size) if size else 0.0
    return size / base_size, cosine


def published_base(
    file: Mapping[str, Tensor], key_map: KeyMap, base: BaseWeights, source: str = "the weights file"
) -> BaseWeights:
    """Lookup of the base model's weights by the file's names and in its layout, for `decide_kind`.

    base: by host names with `diffusion_model.`. Raises CheckpointError where a name is not the model's.
    """
    targets = resolve_names(file, key_map, source)

    def read(name: str) -> Tensor | None:
        whole = base(HOST_PREFIX + targets[name].name)
        return None if whole is None else _to_published(whole, targets[name])

    return read


def host_differences(
    file: Mapping[str, Tensor],
    key_map: KeyMap,
    base: BaseWeights,
    kind: WeightsKind,
    source: str = "the weights file",
) -> dict[str, Tensor]:
    """Differences to add to the host's tensors, by host name with `diffusion_model.`.

    file: published or host names; a subset of the model's is fine. Differences keep the file's dtype (fp32
    where it is not fp16, bf16 or fp32), so that a trained file acts bit for bit as it was saved. Full weights
    give file - base, formed in fp32, held in fp16: the rounding, 2^-11 of the difference, is far below that of
    the fp16 weights it is added to, and fp32 would double the memory of a full model; beyond fp16's range it
    is held in fp32. Zero differences are left out: the host reserves memory for each one.
    Raises CheckpointError, returning no part of the file: unknown names, another shape than the model's, NaN,
    nothing left to apply.
    """
    targets = resolve_names(file, key_map, source)
    found: dict[str, Tensor] = {}
    for name, tensor in file.items():
        check_format(name, tensor, source)
        target = targets[name]
        host_name = HOST_PREFIX + target.name
        whole = base(host_name)
        if whole is None:
            raise CheckpointError(
                f"{source}: the connected model cannot give its tensor '{host_name}' for '{name}'. "
                "Load the model from an ordinary checkpoint."
            )
        current = _to_published(whole, target)
        if tensor.shape != current.shape:
            raise _shape_error(source, name, file, current)
        difference = _difference(tensor, current, kind, f"{source}: '{name}'")
        if difference is not None:
            _place(found, host_name, target, difference, whole)
    if not found:
        why = (
            "every tensor equals the connected model's, which holds these weights already"
            if kind is WeightsKind.FULL and file
            else "every difference in it is zero"
        )
        raise CheckpointError(f"{source}: nothing to apply, {why}. Set weights_name to none.")
    return found


def full_from_differences(
    differences: Mapping[str, Tensor], base: BaseWeights, dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """Full weights (base + difference, formed in fp32) by host name, for a file that holds full weights.

    differences, base: by host names with `diffusion_model.`. Raises CheckpointError where the model lacks the tensor,
    has another shape, or the sum does not fit `dtype`.
    """
    full = {}
    for name, difference in differences.items():
        current = base(name)
        if current is None or current.shape != difference.shape:
            shape = None if current is None else list(current.shape)
            raise CheckpointError(
                f"the difference for '{name}' has shape {list(difference.shape)}, the model {shape}. "
                "Connect the model that the control was loaded or trained on."
            )
        total = current.float() + difference.float()
        if not peak(total) <= torch.finfo(dtype).max:
            raise CheckpointError(f"'{name}': base + difference does not fit {dtype}. Save in fp32.")
        full[name] = total.to(dtype)
    return full


def published_names(tensors: Mapping[str, Tensor], key_map: KeyMap) -> dict[str, Tensor]:
    """Tensors under published names and in published layout, with fused ones split.

    tensors: by host name, with or without `diffusion_model.`. Raises CheckpointError for unknown names.
    """
    published: dict[str, list[tuple[str, Target]]] = {}
    for name, entry in key_map.items():
        target = as_target(entry)
        published.setdefault(target.name, []).append((name, target))
    found = {}
    for name, bare in strip_prefix(tensors).items():
        if bare not in published:
            raise CheckpointError(
                f"'{name}' has no published name in this model's family. {family_hint({bare: ()})}"
                "Save with the model that the control was loaded on."
            )
        for published_name, target in published[bare]:
            part = _to_published(tensors[name], target)
            # a file must not hold two views of one storage
            found[published_name] = part if target.slice is None else part.clone()
    return found


def _to_published(whole: Tensor, target: Target) -> Tensor:
    part = whole if target.slice is None else whole.narrow(*target.slice)
    return _swap_halves(part) if target.swap_halves else part


def _place(found: dict[str, Tensor], name: str, target: Target, difference: Tensor, whole: Tensor) -> None:
    """Write a published difference into `found` in the host's layout; the rest of a fused tensor stays 0."""
    if target.swap_halves:
        difference = _swap_halves(difference)
    if target.slice is None:
        found[name] = difference
        return
    fused = found.get(name)
    if fused is None:
        fused = difference.new_zeros(whole.shape)
    fused = fused.to(torch.promote_types(fused.dtype, difference.dtype))
    fused.narrow(*target.slice).copy_(difference)
    found[name] = fused


def _swap_halves(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat((second, first))


def _difference(tensor: Tensor, current: Tensor, kind: WeightsKind, what: str) -> Tensor | None:
    """Difference in its storage dtype; None where it is zero."""
    if kind is WeightsKind.FULL:
        difference = tensor.to(torch.float32, copy=True).sub_(current.float())
    else:
        difference = tensor if tensor.dtype in KEPT_DTYPES else tensor.float()
    most = peak(difference)
    if not math.isfinite(most):
        raise CheckpointError(f"{what} holds NaN or infinite values. The file is damaged: download it again.")
    if kind is WeightsKind.FULL and most <= FP16_MAX:
        difference = difference.half()
        most = torch.tensor(most).half().item()
    return difference if most > 0 else None


def _shape_error(source: str, name: str, file: Mapping[str, Tensor], current: Tensor) -> CheckpointError:
    bare = strip_prefix(file)
    hint = family_hint({bare[n]: shape_of(file, n) for n in file})
    return CheckpointError(
        f"{source}: '{name}' has shape {list(shape_of(file, name))}, the connected model {list(current.shape)}. "
        f"{hint}Nothing was loaded."
    )
