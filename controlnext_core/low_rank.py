"""Weight differences under host names: full, or as the product of two factors of low rank; also of a slice.

In a file a low-rank difference is `NAME.up` (out, rank) and `NAME.down` (rank, in): difference = up @ down, without
further scaling. A full difference has the plain name. Where the host fuses several layers into one weight, `slices`
gives the part that the difference applies to, as (dim, start, length).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .checkpoint import CheckpointError, listed

LOW_RANK = "low_rank"
"""Kind of weights in a file, as its metadata states it."""
UP, DOWN = ".up", ".down"
LORA_UP, LORA_DOWN, LORA_WHOLE = ".lora_B.weight", ".lora_A.weight", ".diff"
"""Suffixes of the host's LoRA form, after the name of a layer."""
HOST_PREFIX = "diffusion_model."
KEPT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Slice = tuple[int, int, int]
"""Part of a tensor: (dim, start, length)."""
Key = str | tuple[str, Slice]
"""Weight by its host name, or a slice of it, in the form of the host's `add_patches`."""
Part = Callable[[torch.Size], Slice]
"""(shape of a fused weight) -> the slice of it that is one of its layers."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """Low-rank difference of a weight: up @ down."""

    up: Tensor
    """Factor (out, rank)."""
    down: Tensor
    """Factor (rank, in)."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.up.shape[0], self.down.shape[1]))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def whole(self) -> Tensor:
        """Difference as one matrix, (out, in) in fp32."""
        return self.up.float() @ self.down.float()


Difference = Tensor | LowRank
Differences = Mapping[Key, Difference]


def name_of(key: Key) -> str:
    """Name of the weight of a key."""
    return key if isinstance(key, str) else key[0]


def slice_of(key: Key) -> Slice | None:
    """Slice of the weight of a key; None: the whole weight."""
    return None if isinstance(key, str) else key[1]


def in_host(key: Key) -> Key:
    """Key with the host's prefix, in the form of `add_patches`, from a key without it."""
    return HOST_PREFIX + key if isinstance(key, str) else (HOST_PREFIX + key[0], key[1])


def sliced(shape: torch.Size, part: Slice | None) -> torch.Size:
    """Shape of a slice of a tensor of this shape; part: None means the whole tensor."""
    if part is None:
        return shape
    dim, _, length = part
    return torch.Size(length if i == dim else side for i, side in enumerate(shape))


def whole(difference: Difference) -> Tensor:
    """Difference as one tensor in fp32."""
    return difference.whole() if isinstance(difference, LowRank) else difference.float()


def read_differences(
    tensors: Mapping[str, Tensor],
    slices: Mapping[str, Slice],
    shape_of: Callable[[str], torch.Size | None],
    source: str,
) -> dict[Key, Difference]:
    """Differences of a file by the keys of the host's patches (`diffusion_model.*`); zero ones are left out.

    tensors: host names without prefix, with or without `.up` and `.down`; slices: by the names of weights; shape_of:
    shape of the base's weight by its full host name, None for a missing weight. Raises CheckpointError for a factor
    without the other, unknown names, another shape than the base's, NaN, and where every difference is zero.
    """
    found: dict[Key, Difference] = {}
    unknown = [name for name in _weights_of(tensors) if shape_of(HOST_PREFIX + name) is None]
    if unknown:
        raise CheckpointError(
            f"{source}: {listed('names that the connected model does not have', unknown)}. Connect the base that this "
            "control was made for. Nothing was loaded."
        )
    for name in _weights_of(tensors):
        difference = _difference_of(name, tensors, source)
        shape = _checked_slice(shape_of(HOST_PREFIX + name), slices.get(name), f"{source}: '{name}'")
        if difference.shape != shape:
            raise CheckpointError(
                f"{source}: the difference for '{name}' has shape {list(difference.shape)}, the connected model "
                f"{list(shape)}. Connect the base that this control was made for. Nothing was loaded."
            )
        if not _is_zero(difference, f"{source}: '{name}'"):
            part = slices.get(name)
            found[in_host(name if part is None else (name, part))] = difference
    if not found:
        raise CheckpointError(f"{source}: nothing to apply, every difference in it is zero. Set weights_name to none.")
    return found


def written(differences: Differences) -> tuple[dict[str, Tensor], dict[str, Slice]]:
    """Tensors and slices for a file of differences, which `read_differences` reads back.

    Raises CheckpointError for two slices of one weight, which a file cannot hold.
    """
    tensors: dict[str, Tensor] = {}
    slices: dict[str, Slice] = {}
    for key, difference in differences.items():
        name, part = name_of(key).removeprefix(HOST_PREFIX), slice_of(key)
        if name in tensors or name + UP in tensors:
            raise CheckpointError(f"'{name}': differences of two parts of one weight do not fit into one file.")
        if part is not None:
            slices[name] = part
        if isinstance(difference, LowRank):
            tensors[name + UP], tensors[name + DOWN] = difference.up, difference.down
        else:
            tensors[name] = difference
    return tensors, slices


def as_lora(differences: Differences, shape_of: Callable[[str], torch.Size | None]) -> dict[str, Tensor]:
    """LoRA form of the differences, as the host and other programs read it: no alpha, so that A and B are the factors.

    A slice becomes a difference of the whole weight that is zero elsewhere. shape_of: as for `read_differences`.
    """
    found: dict[str, Tensor] = {}
    for key, difference in differences.items():
        name, part = name_of(key), slice_of(key)
        if part is not None:
            shape = shape_of(name)
            assert shape is not None, name
            difference = _embedded(difference, part, shape)
        layer = name.removesuffix(".weight")
        if isinstance(difference, LowRank):
            found[layer + LORA_UP], found[layer + LORA_DOWN] = difference.up, difference.down
        else:
            found[layer + LORA_WHOLE] = difference
    return found


def from_lora(tensors: Mapping[str, Tensor], shape_of: Callable[[str], torch.Size | None]) -> dict[str, Tensor]:
    """Tensors of a file of `as_lora` under the names that `read_differences` accepts; other names are unchanged.

    A whole difference (`NAME.diff`) is that of the parameter NAME, such as a bias, or of the weight of the layer NAME,
    whichever the base has. shape_of: as for `read_differences`.
    """
    endings = {LORA_UP: ".weight" + UP, LORA_DOWN: ".weight" + DOWN, LORA_WHOLE: ".weight"}
    found = {}
    for name, tensor in tensors.items():
        ending = next((e for e in endings if name.endswith(e)), "")
        bare = name.removeprefix(HOST_PREFIX).removesuffix(ending)
        parameter = ending == LORA_WHOLE and shape_of(HOST_PREFIX + bare) is not None
        found[bare if parameter else bare + endings.get(ending, "")] = tensor
    return found


def is_lora(names: Iterable[str]) -> bool:
    """True: every name is of a layer of the base, in the host's LoRA form. False: at least one is not."""
    names = list(names)
    endings = (LORA_UP, LORA_DOWN, LORA_WHOLE)
    return bool(names) and all(name.startswith(HOST_PREFIX) and name.endswith(endings) for name in names)


def summed(parts: Iterable[tuple[Differences, float]]) -> dict[Key, Difference]:
    """Sum of strength * differences. The low-rank ones of one weight become one whose rank is the sum of theirs."""
    total: dict[Key, Difference] = {}
    for differences, strength in parts:
        for key, difference in differences.items():
            scaled = _scaled(difference, strength)
            total[key] = _sum(total[key], scaled) if key in total else scaled
    return total


def chosen_names(names: Iterable[str], pattern: str, blocks: int | None) -> list[str]:
    """Names of weights in which the pattern is found, of the first `blocks` blocks; the first number is the block's."""
    matching = [name for name in names if re.search(pattern, name)]
    if blocks is None:
        return matching
    return [name for name in matching if int(re.findall(r"\d+", name)[0]) < blocks]


def chosen_slices(
    shapes: Mapping[str, torch.Size], names: Iterable[str], fused: Mapping[str, Part]
) -> dict[str, Slice]:
    """Slices of those of these weights that are fused. fused: regular expression searched in names -> the part."""
    return {name: part(shapes[name]) for name in names for pattern, part in fused.items() if re.search(pattern, name)}


def low_rank_parameters(shapes: Iterable[torch.Size], rank: int) -> int:
    """Number of values in the factors of weights of these (out, in) shapes; rank 0: in full differences."""
    return sum(rank * (out + inner) if rank else out * inner for out, inner in shapes)


def _weights_of(names: Iterable[str]) -> list[str]:
    """Names of the weights to which a file's tensors belong, each once."""
    return list(dict.fromkeys(name.removesuffix(UP).removesuffix(DOWN) for name in names))


def _difference_of(name: str, tensors: Mapping[str, Tensor], source: str) -> Difference:
    kept = {n: tensors[n] for n in (name, name + UP, name + DOWN) if n in tensors}
    kept = {n: t if t.dtype in KEPT_DTYPES else t.float() for n, t in kept.items()}
    if kept.keys() == {name}:
        return kept[name]
    if kept.keys() != {name + UP, name + DOWN}:
        raise CheckpointError(
            f"{source}: '{name}' needs either a whole difference or both {UP} and {DOWN}; found {', '.join(kept)}. "
            "The file is damaged: download or save it again."
        )
    up, down = kept[name + UP], kept[name + DOWN]
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        raise CheckpointError(
            f"{source}: '{name}' has factors {list(up.shape)} and {list(down.shape)}; (out, rank) and (rank, in) are "
            "needed. The file is damaged: download or save it again."
        )
    return LowRank(up, down)


def _checked_slice(shape: torch.Size | None, part: Slice | None, what: str) -> torch.Size:
    assert shape is not None, what
    if part is None:
        return shape
    dim, start, length = part
    if not (0 <= dim < len(shape) and start >= 0 and length > 0 and start + length <= shape[dim]):
        raise CheckpointError(
            f"{what}: its slice {list(part)} (dim, start, length) is not inside the connected model's {list(shape)}. "
            "Connect the base that this control was made for. Nothing was loaded."
        )
    return sliced(shape, part)


def _is_zero(difference: Difference, what: str) -> bool:
    """Raises CheckpointError for NaN and infinite numbers."""
    parts = (difference.up, difference.down) if isinstance(difference, LowRank) else (difference,)
    if not all(bool(part.isfinite().all()) for part in parts):
        raise CheckpointError(f"{what} holds NaN or infinite values. The file is damaged: download it again.")
    return not all(bool(part.any()) for part in parts)


def _embedded(difference: Difference, part: Slice, shape: torch.Size) -> Difference:
    """Difference of a slice as one of the whole weight."""
    dim, start, length = part
    if isinstance(difference, LowRank):
        thin, along = (difference.up, 0) if dim == 0 else (difference.down, 1)
        wide = list(thin.shape)
        wide[along] = shape[dim]
        padded = thin.new_zeros(wide)
        padded.narrow(along, start, length).copy_(thin)
        return LowRank(padded, difference.down) if dim == 0 else LowRank(difference.up, padded)
    padded = difference.new_zeros(shape)
    padded.narrow(dim, start, length).copy_(difference)
    return padded


def _scaled(difference: Difference, strength: float) -> Difference:
    if isinstance(difference, LowRank):
        return difference if strength == 1 else LowRank(difference.up.float() * strength, difference.down)
    return difference.float() * strength


def _sum(one: Difference, other: Difference) -> Difference:
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        up = torch.cat([one.up.float(), other.up.float()], dim=1)
        return LowRank(up, torch.cat([one.down.float(), other.down.float()], dim=0))
    return whole(one) + whole(other)
