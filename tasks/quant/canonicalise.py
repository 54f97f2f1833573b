"""A float model in a form that is easier to quantize, with the same outputs."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.utils._pytree import tree_leaves

from tasks.quant.prepare import QuantLayer


def canonicalise(model: nn.Module, inputs: Tensor) -> nn.Module:
    """A copy of a float model with the same outputs and no negative BatchNorm gamma behind a convolution.

    Where gamma < 0, the channel's weights, bias, running mean and gamma change sign: BN(-x; -gamma, -mean) = BN(x; gamma,
    mean). Only where that is exact, bit for bit: the normalisation takes the convolution's own output, nothing else does,
    and neither is used twice. A gamma of zero stays zero.

    Args:
        model: float, before `prepare`.
        inputs: a batch; the convolutions and normalisations are paired by the autograd graph of its forward pass.

    Raises:
        ValueError: the model is prepared.
    """
    if any(isinstance(module, QuantLayer) for module in model.modules()):
        raise ValueError("the model is prepared: canonicalise the float model first, then prepare it")
    model = copy.deepcopy(model)
    probe = copy.deepcopy(model).eval().requires_grad_()
    names = {module: name for name, module in probe.named_modules()}
    made: dict[str, list[Node | None]] = defaultdict(list)
    taken: dict[str, list[Node | None]] = defaultdict(list)

    def left(module: nn.Module, args: Any, output: Tensor) -> None:
        made[names[module]].append(output.grad_fn)

    def entered(module: nn.Module, args: Any) -> None:
        taken[names[module]].append(args[0].grad_fn)

    for module in names:
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            module.register_forward_hook(left)
        elif isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(entered)
    with torch.enable_grad():
        outputs = [out.grad_fn for out in tree_leaves(probe(inputs)) if isinstance(out, Tensor)]
    uses = Counter(outputs)
    unseen, seen = list(uses), set(uses)
    while unseen:
        node = unseen.pop()
        following = [node for node, _ in node.next_functions] if node is not None else []
        uses.update(following)
        unseen += [node for node in dict.fromkeys(following) if node not in seen]
        seen.update(following)
    modules: dict[str, Any] = dict(model.named_modules())
    makers = {nodes[0]: modules[name] for name, nodes in made.items() if len(nodes) == 1 and uses[nodes[0]] == 1}
    owners = Counter(p for _, p in model.named_parameters(remove_duplicate=False))
    for name, nodes in taken.items():
        norm, conv = modules[name], makers.get(nodes[0])
        if conv is None or norm.weight is None or len(nodes) > 1:
            continue
        tensors = [conv.weight, norm.weight, *(t for t in (conv.bias, norm.running_mean) if t is not None)]
        if all(owners[t] <= 1 for t in tensors):
            with torch.no_grad():
                negative = norm.weight < 0
                for tensor in tensors:
                    tensor[negative] = -tensor[negative]
    return model
