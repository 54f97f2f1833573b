"""The float network and the quantized one in one forward pass, so that each layer can be fitted to what both see there.

The inputs go in twice, as one batch: its first half takes the float network's way through each quantized layer and each
normalisation by running statistics, the second half the quantized one's. All else treats the inputs of a batch one by one,
so that each half is what its network alone would compute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tasks.quant.calibrate import modes_kept
from tasks.quant.correct import with_statistics
from tasks.quant.prepare import QuantLayer

Fit = Callable[[str, Any, Tensor, Tensor], None]  # name, module, its input in the float network, its input in the quantized one


@torch.no_grad()
def side_by_side(model: nn.Module, reference: nn.Module, inputs: Tensor, fit: Fit) -> None:
    """Run both networks, layer by layer in the order in which they are called.

    Args:
        model: prepared and calibrated.
        reference: the float model that it was made of, with the same names.
        inputs: [B, ...], on the models' device; the activations of 2 B inputs lie in memory.
        fit: called before a module meets its quantized input; what it changes in the module is what the next ones see.

    Raises:
        ValueError: the network mixes the inputs of a batch, so that the halves are not apart.
    """
    count = len(inputs)
    twins = dict(reference.named_modules())

    def both(name: str, module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if len(x) % (2 * count):
            return twins[name](x)  # no inputs of the network, but a table of positions, say: in float for both
        f, q = x.chunk(2)
        y = twins[name](f)
        fit(name, module, f, q)
        return torch.cat([y, forward(q)])

    normalising = with_statistics(model)
    met = {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer) or n in normalising}
    with modes_kept(model), modes_kept(reference):
        model.eval()
        reference.eval()
        try:
            for name, module in met.items():
                # An instance attribute goes before the class's method.
                vars(module)["forward"] = partial(both, name, module, module.forward)
            y = model(torch.cat([inputs, inputs]))
        finally:
            for module in met.values():
                vars(module).pop("forward", None)
        expected = reference(inputs[:1])
    if not torch.allclose(y[:1], expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise ValueError(f"{type(model).__name__} mixes the inputs of a batch: its layers cannot be fitted one after the other")
