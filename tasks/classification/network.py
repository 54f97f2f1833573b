"""The float network of a classification task: timm's by name, or a function's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tasks import checkpoint
from tasks.errors import UserError
from tasks.log import say_once


def of_timm(name: str, arguments: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """A timm model.

    Args:
        name: as timm.create_model takes it.
        arguments: likewise.
        pretrained: with timm's weights, out of its cache or the hub.

    Raises:
        UserError: timm knows no such model or arguments, or the weights cannot be had.
    """
    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f"task.model: timm knows no model {name}" + (f"; did you mean {', '.join(close)}?" if close else ""))
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        shown = {key: value for key, value in arguments.items() if key not in ("num_classes", "in_chans")}
        raise UserError(f"task.model_args: {name} does not take {shown}: {error}") from error
    except Exception as error:  # of the hub, anything
        what = " ".join(str(error).split())[:150]
        if not pretrained:
            raise UserError(f"task.model: {name} cannot be built with {dict(arguments)}: {what}") from error
        raise UserError(
            f"task.pretrained: the weights of {name} cannot be had ({what}); on a machine that reaches the hub:"
            f" python -c \"import timm, torch; torch.save(timm.create_model('{name}', pretrained=True).state_dict(),"
            f" '{name}.pth')\", then task.weights={name}.pth"
        ) from error


def of_function(function: Callable[..., nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """What a user's own function builds.

    Raises:
        UserError: it does not take the arguments, or returns no network.
    """
    try:
        model = function(**arguments)
    except TypeError as error:
        raise UserError(
            f"task.model: {function} does not take {dict(arguments) or 'a call without arguments'}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"task.model: expected a function that returns a torch.nn.Module, got {type(model).__name__}")
    return model


def start(model: Any, saved: Mapping[str, Tensor], file: Path, classes: int) -> None:
    """Fill a network, in place; a timm model's classifier stays new where the file's is for another number of classes.

    Args:
        model: with that many classes.
        saved: the state_dict.
        file: for messages.
        classes: of the model.

    Raises:
        UserError: it does not fit.
    """
    tensors = list(saved.values())
    theirs = len(tensors[-1]) if tensors and tensors[-1].dim() else classes
    if theirs == classes or not hasattr(model, "reset_classifier"):
        checkpoint.fill(model, dict(saved), file)
        return
    model.reset_classifier(theirs)
    checkpoint.fill(model, dict(saved), file)
    model.reset_classifier(classes)
    say_once(f"{file}: its classifier is for {theirs} classes; a new one for {classes}")


def make_stem_small(model: Any, channels: int) -> None:
    """Give a resnet a 3x3 convolution of stride 1 and no pooling, in place, for pictures of 32 pixels.

    Raises:
        UserError: not a resnet.
    """
    # ResNets have conv1 and maxpool, those of the second version a stem of conv and pool.
    first, convolution, pool = (model.stem, "conv", "pool") if hasattr(model, "stem") else (model, "conv1", "maxpool")
    if not (hasattr(first, convolution) and hasattr(first, pool)):
        raise UserError(f'task.stem: "small" is for resnets, {type(model).__name__} has no {convolution} and {pool}')
    conv = nn.Conv2d(channels, getattr(first, convolution).out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    setattr(first, convolution, conv)
    setattr(first, pool, nn.Identity())


@torch.no_grad()
def check(model: nn.Module, example: Tensor, classes: int) -> None:
    """Call a network once, so that pictures that do not fit are told now, and in a line.

    Args:
        model: its modes are kept.
        example: [1, c, h, w].
        classes: that it must answer with.

    Raises:
        UserError: it does not take the pictures, or does not answer with the classes.
    """
    _, channels, height, width = example.shape
    modes = [(module, module.training) for module in model.modules()]
    try:
        answer = model.eval()(example)
    except Exception as error:  # networks raise anything
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"task.model: takes no pictures of {height}x{width} with {channels} channels ({what}); set task.side,"
            f" task.channels or task.model_args, such as task.model_args={{'img_size': {height}}} for a ViT"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(answer, Tensor) or answer.shape != (1, classes):
        raise UserError(
            f"task.model: expected logits [1, {classes}] for a picture, got {getattr(answer, 'shape', type(answer))}"
        )
