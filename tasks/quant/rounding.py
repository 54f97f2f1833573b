"""Learned rounding: a layer's codes by the error of its output, given the input that the quantized network has for it.

Rounding each weight to the nearest code is best for the weights and not for the output, in which errors of neighbouring
inputs can cancel, and in which a weight can make up for an error of its input. Layer by layer, from the first to the last:
the weight w* is the one of least error on the quantized input; its codes are chosen by that error, which is quadratic in
them and is lowered by one code at a time, exactly, until none wants to move. There are no rates and no schedule.

# G groups of a layer, o outputs of a group, d inputs of an output (channels times kernel), n samples of them
# f of the float network, q of the quantized one; w weights [G, o, d], s step sizes [G, o], c codes [G, o, d]; u [G, d, n]
# y = w u_f what the float network has; Q(u_q) the quantized input; h = E[Q(u_q) Q(u_q)^T] [G, d, d]

References:
    AdaRound's objective: arXiv 2004.10568, eq. 8 to 14. Coordinate descent on it: QuantEase, arXiv 2309.01885. With the
    input of the quantized network, and the float network's output: GPTAQ, arXiv 2504.02692.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tasks.quant.calibrate import some
from tasks.quant.columns import columns
from tasks.quant.correct import moments, set_statistics, with_statistics
from tasks.quant.prepare import LAYERS, QuantLayer
from tasks.quant.side_by_side import side_by_side

PICTURES = 128  # that are looked at, at most: all of them, twice, lie in memory
DAMPING = 0.02  # of the mean diagonal of h: what a few pictures did not show is not taken for silent
SWEEPS = 3  # over the codes of a layer
_MOST = 8192  # inputs of an output; h of a wider layer would not fit, and it keeps the nearest codes
_TRUST = (0.003, 0.03, 0.3, 3.0)  # how firmly w* is held to w, in mean diagonals of h


@torch.no_grad()
def learn_rounding(model: nn.Module, reference: nn.Module, batches: Iterable[Tensor]) -> None:
    """Choose the codes of each layer's weight, and their step sizes, in place; the weights become what the codes stand for.

    Statistics of normalisation are put right on the way, as `correct_statistics` does, and are then as they were.

    Args:
        model: prepared and calibrated.
        reference: the float model that it was made of, with the same names.
        batches: inputs on its device; a hundred pictures are enough, and more than `PICTURES` are not looked at.

    Raises:
        ValueError: no batches, or the network mixes the inputs of a batch.
    """
    inputs = torch.cat([batch[:PICTURES] for batch, _ in zip(some(batches), range(PICTURES), strict=False)])[:PICTURES]
    waiting = _eligible(model)
    free = _means_put_right(reference, inputs[:1])
    before: dict[Any, tuple[Tensor, Tensor]] = {}

    def fit(name: str, module: Any, f: Tensor, q: Tensor) -> None:
        if not isinstance(module, QuantLayer):
            statistics = before.setdefault(module, (module.running_mean.clone(), module.running_var.clone()))
            (mean_f, var_f), (mean_q, var_q) = moments(f, linear=False), moments(q, linear=False)
            set_statistics(module, statistics, mean_q - mean_f, var_q, var_f)
        elif module in waiting:
            waiting.remove(module)
            _fit_layer(module, f, q, centred=name in free)

    try:
        side_by_side(model, reference, inputs, fit)
    finally:
        for norm, (mean, variance) in before.items():
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)


def _eligible(model: nn.Module) -> set[QuantLayer]:
    """Layers whose weight is their own, is not made anew each time, and whose h fits into memory."""
    layers = {m for m in model.modules() if isinstance(m, QuantLayer)}
    owners = Counter(p for m in model.modules() for p in m.parameters(recurse=False))
    return {
        m
        for m in layers
        if m.standardised_weight() is m.layer.weight
        and all(owners[p] == 1 for p in m.layer.parameters())
        and m.layer.weight[0].numel() <= _MOST  # type: ignore[index]
    }


def _means_put_right(reference: nn.Module, example: Tensor) -> set[str]:
    """Names of layers whose outputs may shift: they have a bias, or a normalisation by running statistics comes next."""
    kinds = {name: m for name, m in reference.named_modules() if isinstance(m, LAYERS)}
    made: list[tuple[str, Tensor]] = []
    found = {name for name, m in kinds.items() if m.bias is not None}
    hooks = [m.register_forward_hook(lambda _, __, y, name=name: made.append((name, y))) for name, m in kinds.items()]  # type: ignore[misc]
    for norm in with_statistics(reference).values():
        hooks.append(norm.register_forward_pre_hook(lambda _, x: found.update(name for name, y in made if y is x[0])))
    try:
        reference.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _fit_layer(layer: QuantLayer, f: Tensor, q: Tensor, *, centred: bool) -> None:
    """Codes, their step sizes, and the bias.

    Args:
        layer: whose weight is still float.
        f: its input in the float network.
        q: in the quantized one.
        centred: the mean of an output's error does not count.
    """
    inner: Any = layer.layer
    quantizer = layer.weight_quantizer
    u_f, u_q = columns(layer, f, q)
    groups, d, _ = u_f.shape
    w = inner.weight.reshape(groups, -1, d)
    y = w @ u_f
    power = y.var(2, correction=0)
    weights = 1 / power.clamp_min(1e-3 * float(power.mean()) + 1e-12)  # outputs of any size count alike, but for silent ones
    u = layer.input_quantizer(u_q)
    mean, whole = u.mean(2, keepdim=True), y.mean(2)
    if centred:
        u, y = u - mean, y - whole[..., None]
    target = _best_weight(w, u, y, weights)
    h = u @ u.mT / u.shape[2]
    h.diagonal(dim1=1, dim2=2).add_(DAMPING * h.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp_min(1e-12))
    quantizer.initialise(target.reshape(inner.weight.shape), "mse")
    s, codes = fit_codes(target, h, quantizer.step.view(groups, -1), quantizer.low, quantizer.high)
    quantizer.scale.copy_(s.reshape(quantizer.scale.shape))
    rounded = codes * s[..., None]
    inner.weight.copy_(rounded.reshape(inner.weight.shape))
    if inner.bias is not None:
        inner.bias.add_((whole - (rounded @ mean)[..., 0]).flatten())


def _best_weight(w: Tensor, u: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """w* = argmin over v: E (y - v u)^2 + trust (v - w)^2, with the trust that fits samples it was not made of best."""
    cut = 3 * u.shape[2] // 4

    def made_of(h: Tensor, right: Tensor, trust: float) -> Tensor:
        hold = trust * h.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)[:, None, None]
        eye = torch.eye(len(h[0]), device=h.device, dtype=h.dtype)
        return torch.linalg.solve(h + hold * eye, (right + hold * w).mT).mT.to(w.dtype)

    def moments_of(u: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (u @ u.mT / u.shape[2]).double(), (y @ u.mT / u.shape[2]).double()

    def error(v: Tensor) -> float:
        return float(((y - v @ u)[..., cut:].square().mean(2) * weights).sum())

    part = moments_of(u[..., :cut], y[..., :cut])
    trials = {trust: error(made_of(*part, trust)) for trust in _TRUST}
    best = min(trials, key=trials.__getitem__)
    return made_of(*moments_of(u, y), best) if trials[best] < error(w) else w


def fit_codes(w: Tensor, h: Tensor, s: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Step sizes and codes of low (w - s c) h (w - s c)^T, near the step sizes s; of 8 bits, the nearest codes.

    Args:
        w: [G, o, d].
        h: [G, d, d], symmetric, with a positive diagonal.
        s: [G, o], > 0.
        low: smallest code.
        high: largest code.
    """

    def nearest(s: Tensor) -> Tensor:
        return (w / s[..., None]).round_().clamp_(low, high)

    def error(s: Tensor, c: Tensor) -> Tensor:
        r = w - s[..., None] * c
        return ((r @ h) * r).sum(2)

    if high - low >= 255:
        return s, nearest(s)
    tried = torch.stack([s * factor for factor in (0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2)])
    least = torch.stack([error(t, nearest(t)) for t in tried]).argmin(0, keepdim=True)
    s = tried.gather(0, least)[0]
    c = descend(w, h, s, nearest(s), low, high)
    # With the codes given, the best step size is a quotient; and with it, codes may move once more.
    hc = c @ h
    better = (hc * w).sum(2) / (hc * c).sum(2).clamp_min(1e-20)
    s = torch.where((better > 0) & (error(better, c) < error(s, c)), better, s)
    return s, descend(w, h, s, c, low, high, sweeps=1)


def descend(w: Tensor, h: Tensor, s: Tensor, codes: Tensor, low: int, high: int, sweeps: int = SWEEPS) -> Tensor:
    """Lower (w - s c) h (w - s c)^T by one code at a time, all outputs at once; never raises it.

    With r = w - s c and g = r h: the best code of input j, others fixed, is c_j + round(g_j / (s h_jj)), clipped.

    Args:
        w: [G, o, d].
        h: [G, d, d], symmetric, with a positive diagonal.
        s: [G, o], > 0.
        codes: to start from, [G, o, d].
        low: smallest code.
        high: largest code.
        sweeps: over all inputs, at most.
    """
    codes = codes.clone()
    g = (w - s[..., None] * codes) @ h
    diagonal = h.diagonal(dim1=1, dim2=2)
    for _ in range(sweeps):
        moved = False
        for j in diagonal.mean(0).argsort(descending=True).tolist():
            wanted = (codes[:, :, j] + g[:, :, j] / (s * diagonal[:, None, j])).round_().clamp_(low, high)
            change = wanted - codes[:, :, j]
            if change.any():
                moved = True
                codes[:, :, j] = wanted
                g.baddbmm_((change * s)[..., None], h[:, None, j, :], alpha=-1)
        if not moved:
            break
    return codes
