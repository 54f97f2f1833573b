"""What of a fake-quantized model's work is done on quantized values."""

from __future__ import annotations

import torch
from torch import nn

from tasks.quant.quantizer import Quantizer
from tasks.quant.work import not_quantized
from tests.tasks.quant.test_prepare import build, layers, quantized


def test_attention_that_owns_its_linear_layer() -> None:
    """Stays float, with its inside. Kills: a wrapper that nn.MultiheadAttention never calls."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    twin = quantized(model)
    assert set(layers(twin)) == {"linear1", "linear2"}
    lines = not_quantized(twin.train(), torch.randn(1, 5, 8))
    assert any(line.startswith("self_attn: matrix product, product of two activations in floating point") for line in lines)
    assert twin.training


def test_what_is_not_quantized() -> None:
    """Shares add up; attention and layers left out are named. Kills: fused attention that is not counted."""
    model, x = build("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 2})
    twin = quantized(model, layers={"blocks.1.mlp.fc1": None})
    lines = not_quantized(twin, x)
    assert not any(m.initialised for m in twin.modules() if isinstance(m, Quantizer))
    # per block: 5 tokens of 192, 3 heads; qkv, proj, fc1, fc2, and twice 5 x 5 x 192 in attention
    block, attention, fc1 = 5 * 192 * 192 * 12, 2 * 5 * 5 * 192, 5 * 192 * 768
    total = 2 * (block + attention) + 4 * 192 * 768 + 192 * 10
    assert lines[0].startswith(f"{1 - (2 * attention + fc1) / total:.2%} of the multiplications have both")
    assert lines[1] == f"blocks.*.mlp.fc1: matrix product in floating point, {fc1 / total:.2%} of the multiplications"
    assert (
        lines[2]
        == f"blocks.*.attn: product of two activations in floating point, {2 * attention / total:.2%} of the multiplications"
    )
    assert lines[3].startswith("normalisation, activation functions, softmax")
    assert len(lines) == 4
    embedded = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2))
    assert "0: in floating point, and not among the multiplications" in not_quantized(quantized(embedded), torch.tensor([1]))
    # BEiT passes its weight to F.linear by itself
    beit, x = build("beit_base_patch16_224", 32, {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 3})
    assert any(line.startswith("blocks.*.attn: matrix product, product") for line in not_quantized(quantized(beit), x))
