"""Any classification model of torchvision, by name."""

import difflib

import torchvision
from torch import nn

from fgtrain.models.basic import ImageAdapter


def refuse_unknown(name: str) -> None:
    """Raise a ValueError unless torchvision has a classification model of that name."""
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(names)}"
        raise ValueError(f"torchvision has no classification model {name!r}; {hint}")


def torchvision_model(
    name: str, num_classes: int, *, image_size: int | None = None, weights: str | None = None
) -> nn.Module:
    """A classification model of torchvision that takes the data's images, grey or coloured.

    Args:
        name: as in torchvision.models.list_models(), for example "resnet18".
        num_classes: number of outputs.
        image_size: enlarge images to this size; None for the size that a vision transformer was built for, and for the
            data's own otherwise. Networks with a minimum size need it, for example 32 for vgg11_bn.
        weights: name of pre-trained weights, for example "DEFAULT" (downloaded by torchvision); None for random ones.

    Raises:
        ValueError: torchvision has no classification model of that name.
    """
    refuse_unknown(name)
    if weights is None:
        network = torchvision.models.get_model(name, num_classes=num_classes)
    else:
        network = torchvision.models.get_model(name, weights=weights)
        _replace_head(network, num_classes)
    return ImageAdapter(network, image_size or getattr(network, "image_size", None))


def _replace_head(network: nn.Module, num_classes: int) -> None:
    """Replace the last Linear layer, since a pre-trained head has the classes of its own data."""
    path, head = [(path, m) for path, m in network.named_modules() if isinstance(m, nn.Linear)][-1]
    parent, _, attribute = path.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Linear(head.in_features, num_classes))
