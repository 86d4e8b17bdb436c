"""Base networks, and the optimised copy that is certified."""

from gsmooth_lightning.model.checkpoint import file_hash, load_weights
from gsmooth_lightning.model.cnn import SmallCNN
from gsmooth_lightning.model.fused import fused
from gsmooth_lightning.model.pretrained import Normalize, torchvision_model

__all__ = ["Normalize", "SmallCNN", "file_hash", "fused", "load_weights", "torchvision_model"]
