"""What an optimizer notices of its own steps: numbers of the last ascent, and mistakes that would otherwise be silent."""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false

from __future__ import annotations

import math
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from arsam.functional import global_norm

# Beyond these a radius is told to be far off, once it was so on _IN_A_ROW ascents one after another. The lower ends lie between
# what a thousandth and a tenth of the right rho showed; a rho that is too large shows in no such figure until it is absurd
# (docs/rho.md).
_RATIO, _RISE, _IN_A_ROW = (0.03, 30.0), (1e-3, 3.0), 20  # of ||PSF|| / ||g||, of (L(w + e) - L(w)) / L(w)
NO_ASCENT = (
    "an ascent is due on this step, and step() was called without a closure: pass a closure that zeroes the gradients,"
    " runs forward and backward and returns the loss, or run the second pass yourself inside `with optimizer.perturb():`"
    " before step() whenever `optimizer.due` is true"
)
NEVER_ASKED = "step() was called without a closure, and the loop has not asked `optimizer.due`; on some later step " + NO_ASCENT
ZERO_PSF = (
    "the second pass gave exactly the gradient of the first, PSF = 0: the perturbation did not reach it. Half-precision weights"
    " round w + e back to w (keep them in float32, use torch.autocast); or the loss does not depend on these parameters (a copy"
    " of them, features computed beforehand), or is linear in them"
)
GROWN = (
    "the closure added its gradient to one that was there before, so that the update would be of both: let the closure begin"
    " with `optimizer.zero_grad()`, and run no backward pass outside of it. A loop that comes from another package's SAM, with"
    " the first pass outside and the closure for the second, passes the closure alone: `loss = optimizer.step(closure)`"
)
LOST = (
    "the second pass left no gradient, so that this step would update nothing: the closure, or the block inside `with"
    " optimizer.perturb():`, must run forward and backward of the same batch, and not zero the gradients after it"
)
BOTH_RUN = (
    "step(closure) after perturb(): both passes had been run, and the closure changed the gradient; call `optimizer.step()`"
    " without a closure, or pass the closure and leave perturb() out"
)
FAR_OFF = (
    "||g_s - g|| is {} times ||g||{} on the last of twenty such ascents: rho is far too {}, most likely. docs/rho.md has what"
    " these figures are where rho is right, and how to choose it; try values a factor of 3 apart"
)
STATISTICS = (
    "the second pass moves running statistics ({}), which then count every such batch twice, and at weights that are not kept:"
    " {}"
)
DRAWS = (
    "random numbers were drawn in the second pass that are not those of the first (dropout, drop path, MixUp), so that PSF is"
    " mostly their noise: {}, or pass a closure to step(); `same_randomness=False` says that it is meant to be so"
)
NO_MODEL = "give the optimizer its model, ARSAM(base, model)"
PART_OF_MODEL = "they are not of the model that the optimizer was given; give it a module that holds all that the passes run"
OTHER_MODEL = (
    "let both passes call the very module that the optimizer was given, equally often (compiled by `torch.compile(model)`, for"
    " after `model.compile()` it runs no hooks); draw what is drawn outside of it once, for both passes; begin a step with"
    " `optimizer.zero_grad()`, also where the batch before was skipped"
)


class Notes:
    """Warnings, each of them once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, name: str, message: str) -> None:
        """Warn, if nothing was said under this name."""
        if name not in self._told:
            self._told.add(name)
            warnings.warn(message, UserWarning, stacklevel=2)


class LastAscent:
    """Loss and gradient of the last ascent in numbers, which come to the host without a wait."""

    def __init__(self) -> None:
        self._notes = Notes()
        self._known: dict[str, float | None] = {"rise": None, "psf_ratio": None, "cosine": None}
        self._coming: Tensor | None = None  # ||g||, ||g_s||, ||PSF||, L(w + e) - L(w), L(w), on the way to the host
        self._ready: Any = None  # the event after which they are there; None: they are
        self._off, self._in_a_row = "", 0  # "small" or "large", on so many ascents one after another

    def put(self, seen: tuple[Tensor, Tensor, Tensor] | None, losses: tuple[Any, Any] | None) -> None:
        """Take in an ascent: the norms of g, g_s and PSF, None where g was given up; the closure's two losses or None."""
        self._look()  # at the one before: by now its numbers are there
        values = [*(seen or [math.nan] * 3), *_rise_and_loss(losses)]
        device = next((x.device for x in values if isinstance(x, Tensor)), torch.device("cpu"))
        kind = torch.float32 if device.type == "mps" else torch.float64
        stacked = torch.stack([torch.as_tensor(x, dtype=kind, device=device) for x in values])
        self._ready = None
        if device.type == "cuda":
            self._coming = torch.empty(5, dtype=kind, pin_memory=True)
            self._coming.copy_(stacked, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(device))
        else:
            self._coming = stacked
            if device.type == "cpu":
                self._look()

    def read(self) -> dict[str, float | None]:
        """{"rise", "psf_ratio", "cosine"}, None where they are not known; waits for the device if it must."""
        if self._ready is not None:
            self._ready.synchronize()
        self._look(wait=True)
        return dict(self._known)

    def load(self, known: dict[str, float | None]) -> None:
        """Go on from what `read` gave."""
        self._known, self._coming, self._ready = dict(known), None, None

    def __getstate__(self) -> dict[str, Any]:
        self.read()  # what is on its way cannot be copied
        return self.__dict__

    def _look(self, wait: bool = False) -> None:
        """Make numbers of what has come, and warn where they say that the radius or the second pass is far off."""
        if self._coming is None or (self._ready is not None and not self._ready.query() and not wait):
            return
        numbers = cast("list[float]", self._coming.tolist())  # pyright: ignore[reportUnknownMemberType]
        first, second, psf, rise, loss = numbers
        self._coming = self._ready = None
        cosine = (first**2 + second**2 - psf**2) / (2 * first * second) if first > 0 and second > 0 else math.nan
        self._known = {
            "rise": None if math.isnan(rise) else rise,
            "psf_ratio": psf / first if first > 0 and not math.isnan(psf) else None,
            "cosine": None if math.isnan(cosine) else min(max(cosine, -1.0), 1.0),
        }
        self._judge(self._known["psf_ratio"], rise / abs(loss) if loss else math.nan)

    def _judge(self, ratio: float | None, rise: float) -> None:
        if ratio == 0:
            self._notes.tell("zero", ZERO_PSF)
            return
        figures = [(ratio, *_RATIO), (rise, *_RISE)]
        known = [(x, low, high) for x, low, high in figures if x is not None and math.isfinite(x)]
        below, above = (all(x < low for x, low, _ in known), all(x > high for x, _, high in known)) if known else (False, False)
        off = "small" if below else "large" if above else ""
        self._in_a_row = self._in_a_row + 1 if off and off == self._off else int(bool(off))
        self._off = off
        if self._in_a_row == _IN_A_ROW:
            told = "" if math.isnan(rise) else f", and the perturbation changed the loss by {rise:.2g} of it,"
            self._notes.tell("radius", FAR_OFF.format("unknown" if ratio is None else f"{ratio:.2g}", told, off))


def _rise_and_loss(losses: tuple[Any, Any] | None) -> tuple[Any, Any]:
    """L(w + e) - L(w) and L(w), numbers or tensors of one element; NaN where the closure returned neither."""
    if losses is None or not all(isinstance(x, (int, float)) or (isinstance(x, Tensor) and x.numel() == 1) for x in losses):
        return math.nan, math.nan
    before, after = (x.detach().reshape(()) if isinstance(x, Tensor) else float(x) for x in losses)
    return after - before, before


class Growth:
    """Inside, a closure runs: has it added to gradients that were there before it?

    A gradient that is zeroed in place counts one version more than there were accumulations into it.

    Attributes:
        grown: a gradient other than zero has grown; said when the block is left.
        zeroed: a gradient was zeroed or replaced.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self._before = [
            (p, p.grad, p.grad._version) for p in parameters if p.grad is not None and p.requires_grad and p.is_leaf
        ]
        self._counts = [0] * len(self._before)
        self._handles: list[Any] = []
        self._norms: list[Tensor] = []
        self.grown = self.zeroed = False

    def __enter__(self) -> Growth:
        self._norms = [global_norm([g]) if g.layout == torch.strided else torch.ones(()) for _, g, _ in self._before]
        self._handles = [p.register_post_accumulate_grad_hook(self._counter(i)) for i, (p, _, _) in enumerate(self._before)]
        return self

    def _counter(self, i: int) -> Any:
        def count(_: Tensor) -> None:
            self._counts[i] += 1

        return count

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for (p, gradient, version), norm, count in zip(self._before, self._norms, self._counts, strict=True):
            if p.grad is not gradient or gradient._version - version > count:
                self.zeroed = True
            elif count > 0 and float(norm) != 0:
                self.grown = True
        self.grown &= not self.zeroed


def touched(parameters: list[Tensor]) -> list[tuple[int, int]]:
    """What tells whether a gradient has been replaced or written to: its identity and version, for each parameter."""
    return [(0, 0) if p.grad is None else (id(p.grad), p.grad._version) for p in parameters]


@contextmanager
def moving_statistics(model: nn.Module | None) -> Generator[list[str]]:
    """The kinds of modules outside of a model whose buffers move inside; filled when the block is left."""
    called: dict[nn.Module, dict[str, int]] = {}
    looked_after = set(model.modules()) if model is not None else set[nn.Module]()
    kinds: list[str] = []

    def note(module: nn.Module, _: Any) -> None:
        if not torch.compiler.is_compiling() and module not in called and module not in looked_after:
            called[module] = {name: b._version for name, b in module._buffers.items() if b is not None}

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using `torch.compile")
            yield kinds
    finally:
        handle.remove()
        for module, versions in called.items():
            if any(b is not None and b._version != versions.get(name) for name, b in module._buffers.items()):
                kinds.append(type(module).__name__)
