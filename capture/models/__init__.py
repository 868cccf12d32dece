"""Models: one file per architecture.

A factory of this package is called with what the task says that every model has to know
(`input_shape`, `num_classes`, …), with `width`, and with the keyword arguments of the user. One
given as ``module:factory`` gets of these only the arguments that its signature names; the user's
own always.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from capture.factories import call_factory, find_factory, signature_of
from capture.store.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

MODELS = {
    "mlp": "capture.models.mlp:mlp",
    "resnet": "capture.models.resnet:resnet",
    "resnet18": "capture.models.resnet:resnet18",
    "resnet50": "capture.models.resnet:resnet50",
    "resnet152": "capture.models.resnet:resnet152",
    "transformer": "capture.models.transformer:transformer",
    "segnet": "capture.models.segnet:segnet",
    "unet": "capture.models.unet:unet",
}


def build_model(
    name: str,
    task_args: Mapping[str, Any],
    *,
    width: float = 1.0,
    model_args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build the model of this name, or that of ``module:factory``, freshly initialised.

    The weights come from torch's global generator. Raises `UsageError`.
    """
    factory = find_factory("model", name, MODELS)
    offered = {**task_args, "width": width}
    signature = signature_of(factory)
    named = signature.parameters if signature is not None else {}
    if width != 1.0 and "width" not in named:
        raise UsageError(f"the model {name} has no width to scale", where=f"width = {width}")
    arguments = {key: value for key, value in offered.items() if key in named}
    model = call_factory(factory, "model", name, {**arguments, **(model_args or {})})

    from torch import nn

    if not isinstance(model, nn.Module):
        raise UsageError(
            f"the model {name} is no torch.nn.Module but a {type(model).__name__}",
            fix="let the factory return the model",
        )
    return model
