"""Training of ControlNeXt and ControlNet-XS in ComfyUI, over its API and from the command line."""
