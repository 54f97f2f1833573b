"""Cost of a fake-quantized training step beside the float one, and beside other packages'."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from benchmarks.speed import timing
from benchmarks.speed.memory import Live
from benchmarks.speed.timing import EVERY, Step
from tasks import log
from tasks.classification.task import Classification
from tasks.quant.calibrate import calibrate


def _brevitas(model: nn.Module, bits: int) -> nn.Module:
    """The model with the quantized layers of brevitas, weights per channel and inputs per tensor."""
    import brevitas.nn as qnn  # pyright: ignore[reportMissingImports]
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat  # pyright: ignore[reportMissingImports]

    how = {
        "weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": bits,
        "input_quant": Int8ActPerTensorFloat, "input_bit_width": bits,
    }  # fmt: skip
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            bias = getattr(child, "bias", None) is not None
            if isinstance(child, nn.Conv2d):
                geometry = {k: getattr(child, k) for k in ("stride", "padding", "dilation", "groups")}
                new = qnn.QuantConv2d(
                    child.in_channels, child.out_channels, child.kernel_size, bias=bias, **geometry, **how
                )  # fmt: skip
            elif isinstance(child, nn.Linear):
                new = qnn.QuantLinear(child.in_features, child.out_features, bias=bias, **how)
            else:
                continue
            new.load_state_dict(child.state_dict(), strict=False)
            setattr(parent, name, new)
    return model


def _torchao(model: nn.Module, bits: int) -> nn.Module:
    """The model as torchao prepares it for training: it has no fake-quantized convolution, so its linear layers alone."""
    from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig  # pyright: ignore[reportMissingImports]

    dtype = getattr(torch, f"int{bits}")
    weight = IntxFakeQuantizeConfig(dtype, granularity="per_channel")
    quantize_(
        model,
        QATConfig(
            activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
            weight_config=weight,
            step="prepare",
        ),
    )
    return model


def step_cost(device: torch.device, rounds: int) -> dict[str, Any]:
    """Cost and saved memory of a W4A4 training step against float, beside brevitas and torchao where installed."""
    torch.set_num_threads(1)
    batch, labels = torch.randn(32, 3, 32, 32, device=device), torch.randint(10, (32,), device=device)
    records: list[dict[str, Any]] = []
    for task in (Classification(), Classification(stem="small"), Classification(model="mobilenetv2_100")):
        task = replace(task, weight_bits=4, act_bits=4)
        torch.manual_seed(0)
        model = replace(task, weight_bits=None, act_bits=None).build()
        ours = task.quantize(model)
        calibrate(ours, [batch.cpu()])
        models = {"float": model, "arsam": ours}
        for rival, make in (("brevitas", _brevitas), ("torchao", _torchao)):
            try:
                models[rival] = make(copy.deepcopy(model), 4)
            except ImportError as error:
                print(f"{rival} is left out: {error}")
        steps: dict[str, Step] = {}
        memory: dict[str, float] = {}
        for label, each in models.items():
            each.to(device).train()
            optimizer = SGD(each.parameters(), lr=1e-3, momentum=0.9)

            def step(each: nn.Module = each, optimizer: SGD = optimizer) -> None:
                optimizer.zero_grad()
                nn.functional.cross_entropy(each(batch), labels).backward()
                optimizer.step()

            step()
            steps[label] = step
            with Live() as live:
                output = each(batch)
            memory[label] = live.now() / 1e6
            del output
        rows = timing.rows(timing.interleaved(steps, rounds, device), {label: "float" for label in steps if label != "float"})
        for row in rows:
            row["saved_mb"], row["saved_ratio"] = memory[row["name"]], memory[row["name"]] / memory["float"]
        print(f"\n{task.model}" + (", 3x3 stem" if task.stem == "small" else ""))
        timing.show(rows)
        print(
            "kept for the backward pass: "
            + ", ".join(f"{k} {v:.1f} MB ({v / memory['float']:.2f}x)" for k, v in memory.items())
        )
        records.append({"model": task.model, "stem": task.stem, "rows": rows})
    print(f"\nW4A4, batch 32 of 32x32, one thread, {rounds} rounds of {EVERY} steps each; torchao: linear layers only")
    return {"models": records, "rounds": rounds, **log.environment(device)}
