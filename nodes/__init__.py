"""The node table: ids are public API, shared workflows depend on them."""

from .apply import ControlNeXtApply, ControlNeXtOptions
from .controlnet_xs import ControlNetXSLoader
from .hints import ControlNeXtPoseAlign
from .loaders import ControlNeXtInspect, ControlNeXtLoader, ControlNeXtSave
from .video import ControlNeXtUNetLoader, ControlNeXtVideoWindows

NODE_CLASS_MAPPINGS = {
    "ControlNeXtLoader": ControlNeXtLoader,
    "ControlNetXSLoader": ControlNetXSLoader,
    "ControlNeXtApply": ControlNeXtApply,
    "ControlNeXtOptions": ControlNeXtOptions,
    "ControlNeXtInspect": ControlNeXtInspect,
    "ControlNeXtSave": ControlNeXtSave,
    "ControlNeXtUNetLoader": ControlNeXtUNetLoader,
    "ControlNeXtVideoWindows": ControlNeXtVideoWindows,
    "ControlNeXtPoseAlign": ControlNeXtPoseAlign,
}
