"""From float to fake-quantized and back, over timm's models."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tasks.quant.prepare import QuantLayer, convert, parameter_groups, prepare

# name, input size, arguments that make it small
MODELS: list[tuple[str, int, dict[str, object]]] = [
    ("resnet18", 32, {}),
    ("mobilenetv2_100", 32, {}),
    ("tf_efficientnet_lite0", 33, {}),
    ("dm_nfnet_f0", 32, {"depths": (1, 1, 1, 1), "channels": (256, 256, 256, 256), "stem_chs": 16}),
    ("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 2}),
    ("convnext_atto", 32, {}),
]
FAMILIES = [
    "resnet18", "resnetv2_50", "resnetv2_50x1_bit", "res2net50_26w_4s", "resnest14d", "skresnet18", "regnetx_002",
    "regnety_002", "densenet121", "dla34", "dpn48b", "hrnet_w18_small", "selecsls42", "ese_vovnet19b_dw", "vgg11",
    "cspresnet50", "gernet_s", "repvgg_a0", "mobilenetv2_100", "mobilenetv3_small_050", "mnasnet_small", "fbnetc_100",
    "spnasnet_100", "hardcorenas_a", "ghostnet_100", "lcnet_050", "tinynet_e", "rexnet_100", "tf_efficientnet_lite0",
    "mobileone_s0", "fastvit_t8", "starnet_s1", "repvit_m1", "nfnet_l0", "convnext_atto", "convmixer_768_32",
    "inception_next_atto", "mambaout_femto", "hgnet_tiny", "rdnet_tiny", "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224", "pit_ti_224", "cait_xxs24_224",
    "xcit_nano_12_p8_224", "convit_tiny", "mixer_s32_224", "resmlp_12_224", "gmlp_ti16_224", "swin_tiny_patch4_window7_224",
    "pvt_v2_b0", "coat_tiny", "levit_128s", "visformer_tiny", "efficientformer_l1", "mobilevit_xxs", "edgenext_xx_small",
    "efficientvit_b0", "efficientvit_m0", "tiny_vit_5m_224", "poolformer_s12", "shvit_s1", "halonet26t", "botnet26t_256",
    "lambda_resnet26t", "coatnet_nano_rw_224", "sequencer2d_s", "davit_tiny", "focalnet_tiny_srf", "mvitv2_tiny",
    "caformer_s18", "hiera_tiny_224", "crossvit_tiny_240", "tresnet_m", "volo_d1_224", "tnt_s_patch16_224",
    "vit_base_patch16_siglip_224", "flexivit_small", "gcvit_xxtiny", "vitamin_small_224", "nextvit_small",
]  # fmt: skip
SMALLER: dict[str, dict[str, object]] = {  # where the smallest variant is large
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (32, 64, 96, 128), "num_heads": (2, 2, 3, 4)},
    "hiera_tiny_224": {"embed_dim": 32, "stages": (1, 1, 1, 1)},
    "crossvit_tiny_240": {"embed_dim": (32, 64), "num_heads": (2, 2)},
    "tresnet_m": {"layers": (1, 1, 1, 1)},
    "tnt_s_patch16_224": {"depth": 2},
    "vit_base_patch16_siglip_224": {"depth": 2, "embed_dim": 96, "num_heads": 3},
    "flexivit_small": {"depth": 2},
}
NATIVE = {
    "efficientformer_l1": 224,
    "halonet26t": 256,
    "hiera_tiny_224": 224,
    "crossvit_tiny_240": 240,
}  # at smaller sizes they fail in float too


def quantized(model: nn.Module, **options: object) -> nn.Module:
    """Prepared at 4 bits."""
    return prepare(model, **{"weight_bits": 4, "act_bits": 4, **options})


def layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}


def build(name: str, size: int, options: dict[str, object]) -> tuple[nn.Module, Tensor]:
    """A timm model with ten classes, and a batch."""
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **options), torch.randn(2, 3, size, size)


def there_and_back(model: nn.Module, x: Tensor) -> None:
    """Prepare, forward, backward, convert; and what must hold of each."""
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.eval()
    with torch.no_grad():
        expected = model(x)
    twin = quantized(model)
    assert layers(twin)
    assert not layers(model)
    twin.train()
    out = twin(x)
    out = out if isinstance(out, Tensor) else sum(out)
    assert out.isfinite().all()
    out.square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in twin.parameters())
    for name, layer in layers(twin).items():
        if layer.input_quantizer.initialised:  # some models use a weight without calling its layer
            for p in (layer.input_quantizer.scale, layer.weight_quantizer.scale, layer.layer.weight):
                assert (p.grad is not None) == p.requires_grad, name
    fixed = [name for name, p in twin.named_parameters() if not p.requires_grad]
    assert fixed == [f"{next(iter(layers(twin)))}.input_quantizer.scale"], "the image's step size is not learned"
    back = convert(twin).eval()
    assert layers(twin)
    assert not layers(back)
    assert list(back.state_dict()) == list(state)
    for name, p in back.named_parameters():
        assert torch.equal(p, state[name]), name
    back.load_state_dict(state)  # training moved the statistics
    with torch.no_grad():
        got = back(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "size", "options"), MODELS, ids=[m[0] for m in MODELS])
def test_there_and_back(name: str, size: int, options: dict[str, object]) -> None:
    """Kills: `type(m) is nn.Conv2d`, a lost or renamed parameter, NaN at 4 bits, a step size without a gradient."""
    there_and_back(*build(name, size, options))


def family(name: str) -> tuple[nn.Module, int]:
    """A timm model with ten classes, and the side of its images."""
    torch.manual_seed(0)
    size, options = NATIVE.get(name, 64), SMALLER.get(name, {})
    try:
        return timm.create_model(name, num_classes=10, img_size=size, **options), size
    except TypeError:  # convolutional, most of them of any size
        model = timm.create_model(name, num_classes=10, **options)
        return model, model.pretrained_cfg["input_size"][-1] if model.pretrained_cfg.get("fixed_input_size") else size


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    """Over 40 families. Kills: what a model reads of its layers and the wrapper does not pass on."""
    model, size = family(name)
    there_and_back(model, torch.randn(2, 3, size, size))


KINDS = [
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(4, 6, 3, padding="same", groups=2),
    Conv2dSame(4, 6, 3, stride=2),
    StdConv2d(4, 6, 3),
    StdConv2dSame(4, 6, 3, stride=2),
    ScaledStdConv2d(4, 6, 3),
    ScaledStdConv2dSame(4, 6, 3, stride=2, gain_init=0.7),
]


@pytest.mark.parametrize("layer", [*KINDS, nn.Conv1d(4, 6, 3), nn.Linear(7, 6)], ids=lambda layer: type(layer).__name__)
def test_a_layer_runs_as_its_class_says(layer: nn.Module) -> None:
    """Switched off, bit for bit; switched on, the weight it runs with has codes. Kills: lost padding, standardising twice."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 7) if isinstance(layer, nn.Conv2d) else torch.randn(2, 4, 7)
    twin = quantized(layer, first_last_bits=None)
    assert isinstance(twin, QuantLayer)
    for quantizer in (twin.input_quantizer, twin.weight_quantizer):
        quantizer.enabled = False
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
    for quantizer in (twin.input_quantizer, twin.weight_quantizer):
        quantizer.enabled = True
    twin(x)
    weight, q = twin.standardised_weight(), twin.weight_quantizer
    # a layer of the plain class with the fake-quantized weight is the oracle
    plain = copy.deepcopy(twin.layer)
    if isinstance(layer, tuple(type(kind) for kind in KINDS[3:])):
        torch.testing.assert_close(weight.mean((1, 2, 3)), torch.zeros(6), rtol=0, atol=1e-5)
        plain = Conv2dSame(4, 6, 3, stride=2) if layer.stride[0] == 2 else nn.Conv2d(4, 6, 3, padding=1)
        plain.bias = layer.bias
    plain.weight = nn.Parameter((q.codes(weight) * q.step.view(-1, *[1] * (weight.dim() - 1))).detach())
    torch.testing.assert_close(twin(x), plain(twin.input_quantizer(x)))
    assert "weight" not in vars(twin.layer)


def test_bits_by_name() -> None:
    """Ends at 8 bits; the first pattern that fits decides. Kills: patterns after the ends, the last one first, None ignored."""
    model = build("resnet18", 32, {})[0]
    bits = {
        n: (m.weight_quantizer.bits, m.input_quantizer.bits)
        for n, m in layers(prepare(model, weight_bits=2, act_bits=3)).items()
    }
    assert bits.pop("conv1") == bits.pop("fc") == (8, 8)
    assert set(bits.values()) == {(2, 3)}
    assert len(bits) == 19
    rules = {"layer1.*.conv2": None, "layer1.*": (5, 6), "fc": (4, 7), "*.downsample.0": (3, 8)}
    found = layers(quantized(model, layers=rules))
    bits = {n: (m.weight_quantizer.bits, m.input_quantizer.bits) for n, m in found.items()}
    assert "layer1.0.conv2" not in bits and "layer1.1.conv2" not in bits
    assert bits["layer1.1.conv1"] == (5, 6)
    assert bits["fc"] == (4, 7) and bits["conv1"] == (8, 8)
    assert bits["layer2.0.downsample.0"] == (3, 8)
    none = layers(quantized(model, first_last_bits=None))
    assert none["fc"].weight_quantizer.bits == none["conv1"].input_quantizer.bits == 4
    asymmetric = layers(quantized(model, asymmetric=True))["fc"]
    assert asymmetric.input_quantizer.asymmetric and not asymmetric.weight_quantizer.asymmetric


def test_state_copies_and_export() -> None:
    """Through state_dict, deepcopy, pickle, torch.export. Kills: a lost sign or step size, a wrapper that cannot be traced."""
    model, x = build("mobilenetv2_100", 32, {})
    twin = quantized(model).eval()
    with torch.no_grad():
        y = twin(x)
        file = io.BytesIO()
        torch.save(twin.state_dict(), file)
        file.seek(0)
        other = quantized(build("mobilenetv2_100", 32, {})[0]).eval()
        other.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(other(x), y)
        assert torch.equal(copy.deepcopy(twin)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(twin))(x), y)
        small = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), StdConv2dSame(4, 4, 3, stride=2))
        small = quantized(small)
        y = small(x)
        assert torch.equal(torch.export.export(small, (x,)).module()(x), y)


def test_a_layer_under_two_names() -> None:
    """Stays one layer. Kills: a wrapper around each name."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model.add_module("3", model[0])
    twin = quantized(model)
    assert twin[0] is twin[3] and isinstance(twin[0], QuantLayer)
    assert convert(twin)[3] is not None and isinstance(convert(twin)[3], nn.Linear)


def test_parameter_groups() -> None:
    """Every parameter once; step sizes apart. Kills: a step size that is perturbed or decays."""
    twin = quantized(build("resnet18", 32, {})[0], asymmetric=True)
    weights, steps = parameter_groups(twin)
    assert len(weights["params"]) + len(steps["params"]) == len(list(twin.parameters()))
    assert len(steps["params"]) == 21 * 3
    assert (steps["sam_rho"], steps["weight_decay"]) == (0.0, 0.0)
    assert "rho" not in weights
    names = {p: n for n, p in twin.named_parameters()}
    assert all(names[p].endswith(("quantizer.scale", "quantizer.offset")) for p in steps["params"])


def test_one_quantizer_learns() -> None:
    """A step of SGD lowers the loss of a fake-quantized model. Kills: gradients of the wrong sign."""
    model, x = build("resnet18", 32, {})
    twin = quantized(model).eval()
    target = torch.tensor([1, 2])
    optimizer = torch.optim.SGD(parameter_groups(twin), lr=0.01)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(twin(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: quantized(nn.Sequential(nn.ReLU())), "Sequential has no layer to quantize"),
        (lambda: quantized(quantized(nn.Linear(3, 3))), "already prepared"),
        (lambda: quantized(nn.Sequential(nn.Linear(3, 3)), layers={"head": None}), "no layer's name fits 'head'"),
        (lambda: quantized(timm.create_model("resnet18"), layers={"layer1.0.conv": None}), "like 'layer1.0.conv"),
        (lambda: quantized(nn.Linear(3, 3), first_last_bits=16), "from 2 to 8, got 16"),
    ],
)
def test_errors(build: object, message: str) -> None:
    """Errors name the culprit, the rule and the way out."""
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("kind", ["conv", "linear", "standardised"])
def test_no_copy_of_the_weight_is_kept(kind: str) -> None:
    """Its storage is gone before the backward pass, and the gradients are as if it were not.

    Kills: a saved quantized weight, one rounded with other step sizes, a transposed one laid out wrong.
    """
    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(8, 64, 3), "linear": nn.Linear(8, 64), "standardised": ScaledStdConv2d(8, 64, 3)}
    layer: Any = layers[kind]
    prepared: Any = prepare(nn.Sequential(layer), weight_bits=3, act_bits=4, first_last_bits=None).requires_grad_()
    x = torch.randn(4, 8) if kind == "linear" else torch.randn(4, 8, 5, 5)
    prepared(x)  # sets the step sizes
    quantized = prepared[0]
    made: list[StorageWeakRef] = []
    hook = quantized.weight_quantizer.register_forward_hook(
        lambda _m, _args, made_of: made.append(StorageWeakRef(made_of.untyped_storage()))
    )
    output = prepared(x)
    hook.remove()
    assert len(made) == 1
    assert made[0].expired()
    output.square().sum().backward()
    gradients = [p.grad.clone() for p in prepared.parameters()]
    prepared.zero_grad()
    weight = quantized.weight_quantizer(quantized.standardised_weight())
    function: Any = F.linear if kind == "linear" else quantized.layer._conv_forward
    function(quantized.input_quantizer(x), weight, quantized.layer.bias).square().sum().backward()
    for p, g in zip(prepared.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g, atol=0, rtol=0)
