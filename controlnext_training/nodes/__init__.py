"""Node table of the training pack: ids are public API."""

from .datasets import ControlDatasetFolder, ControlDatasetImages
from .trainer import ControlNeXtTrain

NODE_CLASS_MAPPINGS = {
    "ControlDatasetFolder": ControlDatasetFolder,
    "ControlDatasetImages": ControlDatasetImages,
    "ControlNeXtTrain": ControlNeXtTrain,
}
