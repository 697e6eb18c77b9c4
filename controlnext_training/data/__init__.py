"""Training data: pictures and clips with their hints, captions and masks, from files or from the graph."""

from __future__ import annotations

from .cache import Cache
from .contact_sheet import contact_sheet
from .dataset import FileDataset, Subset, open_dataset
from .order import Order, order
from .report import report
from .samples import PAIRED, Broken, BrokenSample, ControlDataset, DatasetError, Sample
from .tensors import TensorDataset

__all__ = [
    "PAIRED",
    "Broken",
    "BrokenSample",
    "Cache",
    "ControlDataset",
    "DatasetError",
    "FileDataset",
    "Order",
    "Sample",
    "Subset",
    "TensorDataset",
    "contact_sheet",
    "open_dataset",
    "order",
    "report",
]
