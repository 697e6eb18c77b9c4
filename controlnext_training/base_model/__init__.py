"""Base models of the host for training. Only this folder and the nodes import the host."""
