"""The host's base models as something to train. Only these files and the nodes know of the host."""
