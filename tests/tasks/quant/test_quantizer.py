"""LSQ and LSQ+ against the papers' equations."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tasks.quant.quantizer import Quantizer


def ready(bits: int, *, scale: object = 0.3, offset: float | None = None, **options: object) -> Quantizer:
    """A quantizer with a given step size and sign."""
    quantizer = Quantizer(bits, **options)
    with torch.no_grad():
        quantizer.scale.copy_(torch.as_tensor(scale))
        if quantizer.offset is not None:
            quantizer.offset.fill_(offset or 0.0)
    quantizer.initialised = True
    return quantizer


def paper(x: Tensor, s: Tensor, b: Tensor, low: int, high: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LSQ eq. 1-3, LSQ+ eq. 2-5, in float64: output, and dy/dx, g dy/ds, g dy/db element by element."""
    v = (x - b) / s
    inside = (low < v) & (v < high)
    code = torch.round(torch.clamp(v, low, high))
    of_s = torch.where(v <= low, low, torch.where(v >= high, high, code - v))
    g = 1 / (count * high) ** 0.5
    return code * s + b, inside.double(), g * of_s, g * (~inside).double()


RANGES = [(2, True), (2, False), (3, True), (4, False), (4, True), (8, False), (8, True)]


@pytest.mark.parametrize(("bits", "signed"), RANGES)
@pytest.mark.parametrize("channels", [None, 4])
def test_gradients_of_the_paper(bits: int, signed: bool, channels: int | None) -> None:
    """Kills: a gradient without round(v) - v, with bounds off by one, without 1 / sqrt(N p), N of the tensor per channel."""
    torch.manual_seed(bits)
    x = torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(x)
    scale = torch.rand(4 if channels else (), dtype=torch.float64).add(0.5) * 2 / 2**bits
    quantizer = ready(bits, signed=signed, scale=scale, channels=channels, axis=1)
    s = quantizer.scale.detach().double().view(1, 4, 1) if channels else quantizer.scale.detach().double()
    y, of_x, of_s, _ = paper(x.detach(), s, torch.zeros(()), quantizer.low, quantizer.high, 30 if channels else 120)
    out = quantizer(x)
    out.backward(g)
    assert quantizer.scale.grad is not None
    torch.testing.assert_close(out, y)
    torch.testing.assert_close(x.grad, g * of_x)
    expected = (g * of_s).sum((0, 2) if channels else (0, 1, 2))
    torch.testing.assert_close(quantizer.scale.grad.double(), expected, rtol=1e-5, atol=1e-7)
    assert 0 < of_x.mean() < 1  # both kinds of element are there


def test_gradients_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a block that is left out, or that writes to another channel's step size."""
    torch.manual_seed(0)
    for channels in (None, 10):
        gradients = []
        for size in (1 << 18, 24):
            monkeypatch.setattr("tasks.quant.quantizer._BLOCK", size)
            quantizer = ready(3, signed=True, channels=channels)
            x = torch.linspace(-2, 2, 120).sin().view(10, 12).requires_grad_()
            quantizer(x).backward(x.detach().cos())
            gradients.append((x.grad, quantizer.scale.grad))
        torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_of_lsq_plus(bits: int) -> None:
    """Kills: an offset whose gradient is that of the inside, or misses 1 / sqrt(N p); a zero point off the grid."""
    torch.manual_seed(bits)
    x = (2 * torch.randn(50, 3, dtype=torch.float64)).requires_grad_()
    g = torch.randn_like(x)
    quantizer = ready(bits, signed=None, asymmetric=True, scale=2.0 / 2**bits, offset=-0.7)
    assert quantizer.offset is not None
    s = quantizer.step.double()
    b = -s * quantizer.zero_point
    assert quantizer.zero_point == round(0.7 * 2**bits / 2.0)
    y, of_x, of_s, of_b = paper(x.detach(), s, b, 0, 2**bits - 1, 150)
    out = quantizer(x)
    out.backward(g)
    torch.testing.assert_close(out, y)
    torch.testing.assert_close(x.grad, g * of_x)
    torch.testing.assert_close(quantizer.scale.grad, (g * of_s).sum().float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer.offset.grad, (g * of_b).sum().float(), rtol=1e-5, atol=1e-6)
    assert (quantizer(torch.zeros(3)) == 0).all()  # padding stays what it is


@pytest.mark.parametrize(("bits", "signed"), RANGES)
def test_a_staircase(bits: int, signed: bool) -> None:
    """Idempotent, monotone, within s / 2 inside, 2^B values. Kills: floor for round, a range that is one code short."""
    quantizer = ready(bits, signed=signed)
    x = torch.linspace(-90, 90, 30001)
    y = quantizer(x).detach()
    assert torch.equal(quantizer(y), y)
    assert (y.diff() >= 0).all()
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    inside = (x >= 0.3 * low) & (x <= 0.3 * high)
    assert (y - x)[inside].abs().max() <= 0.15 + 1e-5
    codes = quantizer.codes(x)
    assert codes.dtype == torch.int32
    assert codes.unique().tolist() == list(range(low, high + 1))
    torch.testing.assert_close(codes * 0.3, y)


def test_no_gradient_outside() -> None:
    """And none on the bounds, as eq. 5 has it. Kills: a plain straight-through gradient; bounds that belong to the inside."""
    x = torch.tensor([-9.0, -4.0, -3.9, 0.0, 2.9, 3.0, 9.0], requires_grad=True)
    ready(3, signed=True, scale=1.0)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 0, 0]


def test_a_step_size_below_zero() -> None:
    """Used as |s| in training and evaluation. Kills: a clamp at evaluation, a gradient without the sign, division by 0."""
    x = torch.cat([torch.zeros(1), torch.randn(49)])
    plus, minus = ready(4, signed=True), ready(4, signed=True, scale=-0.3)
    for mode in (True, False):
        assert torch.equal(plus.train(mode)(x), minus.train(mode)(x))
    assert torch.equal(plus.codes(x), minus.codes(x))
    plus(x).square().sum().backward()
    minus(x).square().sum().backward()
    assert plus.scale.grad is not None
    assert torch.equal(plus.scale.grad, -minus.scale.grad)
    assert plus.scale.grad != 0
    zero = ready(4, signed=True, scale=0.0)
    out = zero(x.requires_grad_())
    out.sum().backward()
    assert out.isfinite().all()
    assert zero.scale.grad is not None
    assert zero.scale.grad.isfinite()


def test_bfloat16() -> None:
    """Rounded in float32, also under autocast. Kills: codes computed in bfloat16, which has too few digits for 8 bits."""
    torch.manual_seed(0)
    x = (40 * torch.rand(2000)).bfloat16()
    quantizer = ready(8, signed=False, scale=0.17)
    expected = quantizer(x.float())
    wide = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(wide)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16())
    assert torch.equal(quantizer.codes(x), quantizer.codes(x.float()))
    out.float().square().sum().backward()
    first = quantizer.scale.grad
    quantizer.scale.grad = None
    quantizer(x.float()).bfloat16().float().square().sum().backward()
    assert first is not None
    torch.testing.assert_close(first, quantizer.scale.grad, rtol=1e-2, atol=0)
    assert wide.grad is not None
    assert wide.grad.dtype == torch.bfloat16


def test_what_backward_keeps() -> None:
    """The input and the scale, nothing that was computed. Kills: saved codes or masks."""
    kept: list[Tensor] = []
    x = torch.randn(64, requires_grad=True)
    quantizer = ready(4, signed=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantizer(x)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), quantizer.scale.data_ptr()}


def test_initialisation() -> None:
    """LSQ's formula to 4 bits, least squares from 5. Kills: p of the wrong sign; LSQ's formula at 8 bits."""
    torch.manual_seed(0)
    x = torch.randn(3, 4000)
    for bits in (2, 4):
        quantizer = Quantizer(bits, signed=True, channels=3)
        quantizer(x)
        torch.testing.assert_close(quantizer.scale.detach(), 2 * x.abs().mean(1) / (2 ** (bits - 1) - 1) ** 0.5)
    quantizer = Quantizer(8, signed=None)
    quantizer(x)
    assert quantizer.signed
    scale = quantizer.scale.detach()
    errors = [(ready(8, signed=True, scale=f * scale)(x) - x).detach().square().mean() for f in (0.8, 1.0, 1.25)]
    assert errors[1] < min(errors[0], errors[2])
    positive = Quantizer(4, signed=None)
    positive(x.abs())
    assert (positive.signed, positive.low, positive.high) == (False, 0, 15)
    before = positive.scale.item()
    positive(9 * x.abs())
    assert positive.scale.item() == before  # only once


@pytest.mark.parametrize("asymmetric", [False, True])
def test_ranges(asymmetric: bool) -> None:
    """Kills: a range that ignores one side, a percentile that is a share, or an offset that is not the minimum."""
    x = torch.cat([torch.linspace(-0.5, 3.0, 1001), torch.tensor([100.0])])
    quantizer = Quantizer(4, signed=None, asymmetric=asymmetric)
    quantizer.initialise(x, "minmax")
    assert quantizer.scale.item() == pytest.approx(100.5 / 15 if asymmetric else 100 / 7)
    quantizer.initialise(x, "percentile", 99.5)
    assert quantizer.scale.item() == pytest.approx(3.48 / 15 if asymmetric else 2.99 / 7, rel=0.01)
    if asymmetric:
        assert quantizer.offset is not None
        assert quantizer.offset.item() == pytest.approx(-0.5, abs=0.02)
        assert (quantizer.low, quantizer.high) == (0, 15)
        quantizer.initialise(x.clamp(-0.5, 3), "mse")
        assert (quantizer(x.clamp(-0.5, 3)) - x.clamp(-0.5, 3)).abs().max() < 0.75 * 3.5 / 15
    left = Quantizer(4, signed=True)
    left.initialise(torch.tensor([-8.0, 1.0]), "minmax")
    assert left.scale.item() == 1.0


def test_channels_of_zeros() -> None:
    """They take a neighbour's step size. Kills: a step size of zero."""
    weight = torch.zeros(3, 8)
    quantizer = Quantizer(4, signed=True, channels=3)
    quantizer(weight)
    assert quantizer.scale.tolist() == [1, 1, 1]
    weight[1] = 0.5
    quantizer.initialise(weight, "minmax")
    torch.testing.assert_close(quantizer.scale.detach(), torch.full((3,), 0.5 / 7))


def test_perturbation_behind_the_quantizer() -> None:
    """Y + e, with the gradient of y + e passed on. Kills: a perturbation that is rounded away, saved, or used once more."""
    x = torch.randn(5, 4, requires_grad=True)
    quantizer = ready(2, signed=True, channels=5)
    plain = quantizer(x).detach()
    e = 1e-3 * torch.randn(5, 4)
    quantizer.perturbation = e
    out = quantizer(x)
    torch.testing.assert_close(out, plain + e, rtol=0, atol=0)
    out.square().sum().backward()
    inside = (x.detach() / 0.3 > -2) & (x.detach() / 0.3 < 1)
    torch.testing.assert_close(x.grad, torch.where(inside, 2 * (plain + e), 0.0))
    assert "perturbation" not in quantizer.state_dict()
    quantizer.perturbation = None
    assert torch.equal(quantizer(x), plain)


def test_switch_and_state() -> None:
    """Kills: state that a state_dict, a deepcopy or the switch loses."""
    x = torch.randn(40).abs()
    quantizer = Quantizer(4, signed=None)
    quantizer.enabled = False
    assert quantizer(x) is x
    assert not quantizer.initialised
    quantizer.enabled = True
    y = quantizer(x)
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    other = Quantizer(4, signed=None)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.initialised and not other.signed
    assert torch.equal(other(x), y)
    assert torch.equal(copy.deepcopy(quantizer)(x), y)
    signed = ready(4, signed=None)
    signed.initialise(torch.randn(9), "minmax")
    other.load_state_dict(signed.state_dict())
    assert other.signed
    assert "4 bits, signed" in repr(other)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Quantizer(1, signed=True), "from 2 to 8, got 1"),
        (lambda: Quantizer(9, signed=True), "leave the layer float"),
        (lambda: Quantizer(4, signed=True, asymmetric=True), "unsigned codes"),
        (lambda: Quantizer(4, signed=True)(torch.tensor([1.0, float("nan")])), "not finite"),
        (lambda: Quantizer(4, signed=True)(torch.zeros(0)), "missing"),
        (lambda: Quantizer(4, signed=True).initialise(torch.ones(2), "entropy"), "lsq, minmax, percentile, mse"),
        (lambda: Quantizer(4, signed=None, asymmetric=True).initialise(torch.ones(2), "lsq"), "no offset"),
        (lambda: Quantizer(4, signed=True).initialise(torch.ones(2), "percentile", 0.999), "from 50 to 100"),
    ],
)
def test_errors(build: object, message: str) -> None:
    """Errors name the argument, the rule and the way out."""
    with pytest.raises(ValueError, match=message):
        build()


@given(
    bits=st.integers(2, 8),
    signed=st.booleans(),
    scale=st.floats(1e-6, 1e3),
    negative=st.booleans(),
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
)
@settings(max_examples=200, deadline=None)
def test_whatever_the_values(bits: int, signed: bool, scale: float, negative: bool, values: list[float]) -> None:
    """Codes in range, once is enough, order is kept, and inside the range an error of half a step at most.

    Kills: a floor in place of a round, codes past the last one, the sign of a step size that training has turned.
    """
    quantizer = ready(bits, signed=signed, scale=-scale if negative else scale)
    x = torch.tensor(values).sort().values
    with torch.no_grad():
        y, codes, step = quantizer(x), quantizer.codes(x), quantizer.step
        assert quantizer.low <= int(codes.min()) and int(codes.max()) <= quantizer.high
        assert torch.equal(y, codes * step)
        assert torch.equal(quantizer(y), y)
        assert bool((y.diff() >= 0).all())
        inside = (x >= quantizer.low * step) & (x <= quantizer.high * step)
        assert bool(((y - x).abs()[inside] <= 0.5001 * step + 1e-6 * x.abs()[inside]).all())
