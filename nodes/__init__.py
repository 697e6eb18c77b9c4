"""Node table of the pack: ids are public API, shared workflows depend on them."""

from .apply import ControlNeXtApply, ControlNeXtOptions
from .hint_images import (
    ControlNeXtHintBlur,
    ControlNeXtHintCanny,
    ControlNeXtHintGray,
    ControlNeXtHintLines,
    ControlNeXtHintMask,
    ControlNeXtHintSoftEdge,
)
from .hints import ControlNeXtPoseAlign, ControlNeXtSampleInputs
from .loaders import ControlNeXtInspect, ControlNeXtLoader, ControlNeXtSave
from .tiling import ControlNeXtMergeTiles, ControlNeXtSplitTiles
from .video import ControlNeXtUNetLoader, ControlNeXtVideoWindows
from .xs_loader import ControlNetXSLoader, ControlNetXSOptions

NODE_CLASS_MAPPINGS = {
    "ControlNeXtLoader": ControlNeXtLoader,
    "ControlNetXSLoader": ControlNetXSLoader,
    "ControlNeXtApply": ControlNeXtApply,
    "ControlNeXtOptions": ControlNeXtOptions,
    "ControlNetXSOptions": ControlNetXSOptions,
    "ControlNeXtInspect": ControlNeXtInspect,
    "ControlNeXtSave": ControlNeXtSave,
    "ControlNeXtUNetLoader": ControlNeXtUNetLoader,
    "ControlNeXtVideoWindows": ControlNeXtVideoWindows,
    "ControlNeXtSplitTiles": ControlNeXtSplitTiles,
    "ControlNeXtMergeTiles": ControlNeXtMergeTiles,
    "ControlNeXtPoseAlign": ControlNeXtPoseAlign,
    "ControlNeXtSampleInputs": ControlNeXtSampleInputs,
    "ControlNeXtHintCanny": ControlNeXtHintCanny,
    "ControlNeXtHintSoftEdge": ControlNeXtHintSoftEdge,
    "ControlNeXtHintLines": ControlNeXtHintLines,
    "ControlNeXtHintBlur": ControlNeXtHintBlur,
    "ControlNeXtHintMask": ControlNeXtHintMask,
    "ControlNeXtHintGray": ControlNeXtHintGray,
}
