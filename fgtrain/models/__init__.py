"""The models that the configs name. Any other nn.Module works too."""

from fgtrain.models.basic import CNN, MLP, ImageAdapter
from fgtrain.models.diagonal import DiagonalRecurrence, DiagonalRNN
from fgtrain.models.finetune import FineTuned, LoRA, add_lora
from fgtrain.models.mixer import LocalMixer
from fgtrain.models.sequence import LSTMLM, TransformerLM
from fgtrain.models.vision import torchvision_model
from fgtrain.network.chains import Residual

__all__ = [
    "CNN",
    "LSTMLM",
    "MLP",
    "DiagonalRNN",
    "DiagonalRecurrence",
    "FineTuned",
    "ImageAdapter",
    "LoRA",
    "LocalMixer",
    "Residual",
    "TransformerLM",
    "add_lora",
    "torchvision_model",
]
