"""The models the configs name. Any other nn.Module serves as well."""

from fgtrain.models.basic import CNN, MLP, ImageAdapter
from fgtrain.models.vision import torchvision_model

__all__ = ["CNN", "MLP", "ImageAdapter", "torchvision_model"]
