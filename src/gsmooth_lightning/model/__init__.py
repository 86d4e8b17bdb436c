"""Base networks, and the optimised copy that is certified."""

from gsmooth_lightning.model.audio import MFCCNet
from gsmooth_lightning.model.black_box import BlackBox, is_black_box
from gsmooth_lightning.model.checkpoint import file_hash, load_weights
from gsmooth_lightning.model.cnn import (
    BandLimit,
    SmallCNN,
    Synthesis,
    WienerBank,
    deblurring_cnn,
    lowpass_cnn,
)
from gsmooth_lightning.model.denoiser import Residual, dncnn, unet_denoiser
from gsmooth_lightning.model.fused import described, fused
from gsmooth_lightning.model.pretrained import Normalize, timm_model, torchvision_model
from gsmooth_lightning.model.resnet import CifarResNet, cifar_resnet, small_resnet18

__all__ = [
    "BandLimit",
    "BlackBox",
    "CifarResNet",
    "MFCCNet",
    "Normalize",
    "Residual",
    "SmallCNN",
    "Synthesis",
    "WienerBank",
    "cifar_resnet",
    "deblurring_cnn",
    "described",
    "dncnn",
    "file_hash",
    "fused",
    "is_black_box",
    "load_weights",
    "lowpass_cnn",
    "small_resnet18",
    "timm_model",
    "torchvision_model",
    "unet_denoiser",
]
