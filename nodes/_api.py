"""The host's node API, imported here alone, so that pinning a version is one line."""

from comfy_api.latest import io, ui

__all__ = ["io", "ui"]
