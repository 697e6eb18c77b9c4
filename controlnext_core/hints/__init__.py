"""Hint images made without a neural network: numpy, and OpenCV where something is drawn."""
