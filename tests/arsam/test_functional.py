"""The closed forms behind a step."""

from __future__ import annotations

import pytest
import torch

from arsam import functional, reuse


def test_global_norm() -> None:
    """Over all tensors, of any dtype. Kills: a sum of norms; float16 squares that overflow."""
    xs = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert float(functional.global_norm(xs)) == 5.0
    assert float(functional.global_norm([])) == 0.0
    big = torch.full((4,), 300.0, dtype=torch.float16)
    assert float(functional.global_norm([big, *xs])) == pytest.approx((4 * 300**2 + 25) ** 0.5)
    assert functional.global_norm([torch.ones(2, dtype=torch.float64)]).dtype == torch.float64


@pytest.mark.parametrize("adaptive", [False, True])
def test_perturbation(adaptive: bool) -> None:
    """e = rho t^2 g / ||t g||. Kills: w in place of w^2, the norm of g in ASAM."""
    w, g = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 2.0, -2.0])
    t = w.abs() if adaptive else torch.ones(3)
    moved = [w.clone()]
    scaled = functional.scaled_gradients(moved, [g], adaptive)
    functional.perturb_(moved, scaled, adaptive, 0.1 / functional.global_norm(scaled))
    torch.testing.assert_close(moved[0] - w, 0.1 * t**2 * g / (t * g).norm())


def test_orthogonal_part() -> None:
    """g_v is orthogonal to g, and g_v plus the part along g is g_s."""
    torch.manual_seed(0)
    g, g_s = [torch.randn(3), torch.randn(2, 2)], [torch.randn(3), torch.randn(2, 2)]
    v = [x.clone() for x in g]
    functional.orthogonal_(v, g_s)
    assert abs(float(functional.inner_product(v, g))) < 1e-5
    along = functional.inner_product(g, g_s) / functional.inner_product(g, g)
    for a, b, c in zip(v, g, g_s, strict=True):
        torch.testing.assert_close(a + along * b, c)
    zero = [torch.zeros(3), torch.zeros(2, 2)]
    functional.orthogonal_(zero, g_s)
    torch.testing.assert_close(zero, g_s)


def test_add_scaled_off_the_cpu_path() -> None:
    """The path that leaves the scale on its device, on the meta device for want of another."""
    x = [torch.zeros(2, device="meta")]
    functional.add_scaled_(x, [torch.ones(2, device="meta")], torch.tensor(2.0, device="meta"))
    assert x[0].shape == (2,)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: reuse.Decayed(beta=1.1), "beta"),
        (lambda: reuse.Decayed(horizon=0), "Nothing"),
        (lambda: reuse.Decayed(horizon=2.5), "integer"),  # type: ignore[arg-type]
        (lambda: reuse.Orthogonal(-1), "alpha"),
    ],
)
def test_bad_reuse_arguments(build: object, message: str) -> None:
    """Errors name the argument and the rule."""
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]
