"""The node table: ids are public API, shared workflows depend on them."""

from .apply import ControlNeXtApply, ControlNeXtOptions
from .loaders import ControlNeXtInspect, ControlNeXtLoader, ControlNeXtSave

NODE_CLASS_MAPPINGS = {
    "ControlNeXtLoader": ControlNeXtLoader,
    "ControlNeXtApply": ControlNeXtApply,
    "ControlNeXtOptions": ControlNeXtOptions,
    "ControlNeXtInspect": ControlNeXtInspect,
    "ControlNeXtSave": ControlNeXtSave,
}
