"""Reuse rules: what a one-pass step gets from the last ascent.

A rule says which vector an ascent leaves behind (`keep_`) and how a later one-pass step mixes it into its own gradient
(`mix_`). The age of the vector is 1 on the first step after the ascent. A rule has settings and no state: the optimizer
keeps the vector, in float32 at least, one tensor per parameter.
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from arsam import functional


class Reuse(Protocol):
    """What the optimizer asks of a reuse rule.

    Attributes:
        horizon: one-pass steps that a kept vector serves; 0: nothing is kept; None: until the next ascent.
        needs_spacing: does `mix_` need to know the spacing of the ascents?
        keeps_psf: is the kept vector PSF = g_s - g itself?
        max_growth: a vector more than so many times as long as that of the ascent before is not kept; None: any is.
    """

    horizon: int | None
    needs_spacing: bool = False
    keeps_psf: bool = False
    max_growth: float | None = None

    def keep_(self, gradients: list[Tensor], sam_gradients: list[Tensor]) -> None:
        """Turn g, in place, into the vector that is kept."""
        ...

    def mix_(
        self,
        gradients: list[Tensor],
        kept: list[Tensor],
        age: int,
        spacing: float | None = None,
        size: Tensor | None = None,
    ) -> None:
        """Mix the kept vector into g, in place.

        Args:
            gradients: g, one tensor per parameter.
            kept: the kept vector, a tensor for each of them.
            age: one-pass steps since its ascent, this one counted: 1, 2, ..., horizon.
            spacing: mean number of steps from one ascent to the next at present; None: the sampling rule does not know.
            size: L2 norm of the whole kept vector, 0-dim; None: not at hand.
        """
        ...


class Nothing(Reuse):
    """A one-pass step updates with its own gradient g: plain SAM on the steps in between (SS-SAM, late-phase SAM, AE-SAM).

    With a horizon of 0 nothing is kept, and nothing is mixed.
    """

    horizon = 0

    def keep_(self, gradients: list[Tensor], sam_gradients: list[Tensor]) -> None:
        """Never called: the horizon is 0."""

    def mix_(
        self,
        gradients: list[Tensor],
        kept: list[Tensor],
        age: int,
        spacing: float | None = None,
        size: Tensor | None = None,
    ) -> None:
        """Never called: the horizon is 0."""


class Decayed(Reuse):
    """g + beta^j PSF on the j-th one-pass step after an ascent, j = 1 ... horizon; then g (arXiv 2510.03763).

    With ``beta="auto"`` the decay follows the spacing k of the ascents, the mean number of steps from one to the next as the
    sampling rule has it: beta = 1 - 1 / max(k, 10). However long the gap, its last step then gets 1/e of the PSF and an
    average step 0.63 of it; a constant beta would give the steps of a long gap next to nothing. Two PSFs differ by their
    batches far more than by their age: on digits their cosine is 0.17 one step apart and 0.13 thirty steps apart (the line
    "ageing" of benchmarks/records/digits.jsonl), so that no gap calls for a faster decay than 0.9. There beta = 1 was better
    still, but on clean labels it was worse.

    One broken batch on an ascent would rule every step until the next one. With "auto" a PSF more than four times as long as
    that of the ascent before is therefore not kept. A bound by the present g does not serve for this: where the labels are
    known by heart, g vanishes and the PSF does not, and a bound of ||g|| took away half of the gain (docs/method.md).

    Args:
        beta: decay per step, in [0, 1], or "auto", with a sampling rule that has a ``spacing``.
        horizon: one-pass steps that one PSF serves, an integer >= 1; None: until the next ascent.
        max_ratio: ||beta^j PSF|| is held to this multiple of ||g||, > 0; None: it is not held, which saves the norm of g.
        max_growth: a PSF more than so many times as long as that of the ascent before is not kept, > 1; None: whatever its
            length. "auto": 4 where beta is "auto"; None for a beta of one's own, so that the published form stays as it is.
    """

    keeps_psf = True

    def __init__(
        self,
        beta: float | Literal["auto"] = 0.7,
        horizon: int | None = 6,
        *,
        max_ratio: float | None = None,
        max_growth: float | Literal["auto"] | None = "auto",
    ) -> None:
        if beta != "auto" if isinstance(beta, str) else not 0 <= beta <= 1:
            raise ValueError(f'beta must lie in [0, 1] or be "auto", got {beta!r}')
        if horizon is not None and (horizon != int(horizon) or horizon < 1):
            raise ValueError(
                f"horizon must be an integer >= 1, or None for until the next ascent, got {horizon};"
                " to reuse nothing take reuse.Nothing()"
            )
        if max_ratio is not None and not max_ratio > 0:
            raise ValueError(f"max_ratio must be > 0, or None for no bound, got {max_ratio}")
        growth = (4.0 if beta == "auto" else None) if max_growth == "auto" else max_growth
        if growth is not None and (isinstance(growth, str) or not growth > 1):
            raise ValueError(f'max_growth must be > 1, "auto", or None for no bound, got {growth!r}')
        self.beta: float | Literal["auto"] = beta
        self.horizon = None if horizon is None else int(horizon)
        self.max_ratio = max_ratio
        self.max_growth: float | None = growth  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def needs_spacing(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where beta is "auto"."""
        return self.beta == "auto"

    def decay(self, spacing: float | None = None) -> float:
        """beta; where it is "auto", 1 - 1 / max(k, 10) with k the spacing of the ascents, in steps.

        Raises:
            ValueError: beta is "auto", and no spacing is given.
        """
        if not isinstance(self.beta, str):
            return self.beta
        if spacing is None:
            raise ValueError('beta="auto" follows the spacing of the ascents: give it, decay(optimizer.sampling.spacing)')
        return 1 - 1 / max(spacing, 10.0)

    def keep_(self, gradients: list[Tensor], sam_gradients: list[Tensor]) -> None:
        """g <- PSF = g_s - g."""
        functional.psf_(gradients, sam_gradients)

    def mix_(
        self,
        gradients: list[Tensor],
        kept: list[Tensor],
        age: int,
        spacing: float | None = None,
        size: Tensor | None = None,
    ) -> None:
        """g <- g + min(beta^age, max_ratio ||g|| / ||PSF||) PSF."""
        share = self.decay(spacing) ** age
        if self.max_ratio is None:
            torch._foreach_add_(gradients, kept, alpha=share)
            return
        size = functional.global_norm(kept) if size is None else size
        bound = self.max_ratio * functional.global_norm(gradients) / size
        functional.add_scaled_(gradients, kept, torch.where(size > 0, bound.clamp(max=share), torch.zeros_like(bound)))


class Orthogonal(Reuse):
    """LookSAM: g + alpha * (||g|| / ||g_v||) * g_v, g_v the part of g_s orthogonal to g, until the next ascent.

    Args:
        alpha: weight of the reused direction, >= 0 (arXiv 2203.02714, algorithm 1).
    """

    horizon = None

    def __init__(self, alpha: float = 0.7) -> None:
        if alpha < 0:
            raise ValueError(f"alpha must be >= 0, got {alpha}")
        self.alpha = alpha

    def keep_(self, gradients: list[Tensor], sam_gradients: list[Tensor]) -> None:
        """g <- g_v."""
        functional.orthogonal_(gradients, sam_gradients)

    def mix_(
        self,
        gradients: list[Tensor],
        kept: list[Tensor],
        age: int,
        spacing: float | None = None,
        size: Tensor | None = None,
    ) -> None:
        """g <- g + alpha * ||g|| / ||g_v|| * g_v; a zero g_v adds nothing."""
        norm = functional.global_norm(kept) if size is None else size
        ratio = functional.global_norm(gradients) / norm
        functional.add_scaled_(gradients, kept, self.alpha * torch.where(norm > 0, ratio, torch.zeros_like(norm)))


RULES = (Decayed, Nothing, Orthogonal)
