"""From a float model to a low-bit file, stage by stage, each measured on the same inputs and kept for a run that goes on.

float -> "ptq" (calibrated) -> "ptq_bn" (statistics corrected) -> "qat" (trained) -> "onnx" (in ONNX Runtime)
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

import arsam
from tasks import checkpoint, engine, state
from tasks.config import describe
from tasks.errors import UserError
from tasks.loading import Seeded
from tasks.quant import export, plan, ptq
from tasks.quant.calibrate import reestimate_batch_norm
from tasks.quant.check import check
from tasks.quant.lowbit import BATCH
from tasks.quant.prepare import convert
from tasks.quant.run import CALIBRATED, PTQ, QAT, Run
from tasks.quant.runtime import Compared, InRuntime, costs, kernels
from tasks.quant.sharpness import effect
from tasks.quant.work import bit_operations, not_quantized

STATISTICS = 4096  # inputs that re-estimate BatchNorm: with 1024, the noise of its statistics cost half a point of top-1


def run(run: Run) -> dict[str, Any]:
    """Take a config through all stages, and write float.onnx, model.onnx and the runs' folders.

    Returns:
        What report.json holds, but for machine and command.

    Raises:
        UserError: something the user can put right.
    """
    run.take_up()
    source = _float_source(run)
    done = {name for name, file in (("float", "float/result.json"), ("ptq", PTQ), ("qat", QAT)) if (run.out / file).is_file()}
    for line in plan.lines(run.config, run.task, source, plan.pace(run.config, run.task, run.device), done):
        run.say(line)
    run.say("[1/3] float model")
    model, source = _float_model(run, source)
    run.measure("float", model)
    run.say(f"      {run.title} {run.shown('float')}")

    bits = f"W{run.task.weight_bits}A{run.task.act_bits}"
    run.say(f"[2/3] {bits}: calibration" + (", then training" if run.config.epochs else "; epochs=0, so no training"))
    quantized, kept = _calibrated(run, model)
    run.say(f"      {run.title} {run.shown('ptq')} calibrated, {run.shown('ptq_bn')} with statistics corrected; kept: {kept}")
    passes = 0.0
    if run.config.epochs:
        passes = _trained(run, model, quantized, source)
        run.say(f"      {run.title} {run.shown('qat')} trained, at {passes:.2f} passes per step")

    run.say("[3/3] ONNX file, in ONNX Runtime")
    facts = _files(run, model, quantized)
    run.say(f"      {run.title} {run.shown('onnx')}, agreement with the fake-quantized model {facts['agreement']:.4f}")
    return {
        "metric": run.task.metric,
        "stages": {name: run.stages[name] for name in ("float", "ptq", "ptq_bn", "qat", "onnx") if name in run.stages},
        "kept": kept,
        **facts,
        "bits": {"weight": run.task.weight_bits, "act": run.task.act_bits},
        "perturb": run.task.perturb,
        "passes_per_step": passes,
        "seed": run.config.seed,
        "config": run.name,
    }


def _float_source(run: Run) -> Path | None:
    """The file of the float weights; None: they are timm's own, or trained."""
    given = run.float_checkpoint or run.task.float_weights()
    if given is not None:
        checkpoint.load(given)  # says now what is wrong with it
        return given
    if not getattr(run.task, "pretrained", False) and run.config.pretraining is None:
        raise UserError(f"{run.name}: has no float training of its own; give --checkpoint FLOAT.pt")
    return None


def _float_model(run: Run, source: Path | None) -> tuple[nn.Module, Path]:
    """The float model, and the file of its weights, which is the teacher's too."""
    if source is None and getattr(run.task, "pretrained", False):
        model = state.build_model(run.task.in_float())
        source = run.out / "float.pt"
        checkpoint.save(source, {"model": model.state_dict()})
        return model.to(run.device), source
    if source is None:
        assert run.config.pretraining is not None
        # Weights that are no whole float model are a backbone's, from which the float training starts.
        start: Any = run.config.pretraining.task
        task = replace(run.task.in_float(), weights=run.task.weights or start.weights)
        config = replace(run.config.pretraining, task=task, seed=run.config.seed)
        source = run.out / "float" / "last.pt"
        if not (run.resume and (source.parent / "result.json").is_file()):
            resume = run.resume and (source.parent / "run.json").is_file()
            engine.train(config, source.parent, device=run.device, resume=resume, name=run.name)
    saved = checkpoint.load(source)
    run.task = run.task.knowing(saved.get("about") or {})
    run.config = replace(run.config, task=run.task)
    model = state.build_model(run.task.in_float())
    checkpoint.load_weights(model, source)
    return model.to(run.device), source


def _calibrated(run: Run, model: nn.Module) -> tuple[nn.Module, str]:
    """The calibrated model, and which of the two was kept: "ptq" or "ptq_bn"."""
    quantized = run.task.quantize(model.cpu()).to(run.device)
    if run.kept_model(PTQ, quantized):
        return quantized, run.stages["kept"]
    reference = convert(quantized)
    if not run.kept_model(CALIBRATED, quantized):
        reference = ptq.prepared(run.task, quantized, run.device)
        run.keep_model(CALIBRATED, quantized)
    run.measure("ptq", quantized)
    corrected, gains = ptq.corrected(run.task, quantized, reference, run.device)
    if corrected is not None:
        run.measure("ptq_bn", corrected)
    run.stages.setdefault("ptq_bn", run.stages["ptq"])
    better = corrected is not None and gains["corrected"] < gains["calibrated"]
    chosen = corrected if better and corrected is not None else quantized
    run.stages |= {"kept": "ptq_bn" if better else "ptq", "distance": gains}
    run.keep_model(PTQ, chosen)
    return chosen, run.stages["kept"]


def _trained(run: Run, model: nn.Module, quantized: nn.Module, source: Path) -> float:
    """Train a calibrated model, in place; passes per step."""
    folder_ = run.out / "qat"
    if run.resume and (folder_ / "result.json").is_file():
        result = json.loads((folder_ / "result.json").read_text())
    else:
        config = replace(run.config, task=run.task.starting(run.out / PTQ, source))
        resume = run.resume and (folder_ / "run.json").is_file()
        result = engine.train(config, folder_, device=run.device, resume=resume, name=run.name)
    if not run.kept_model(QAT, quantized):
        checkpoint.load_weights(quantized, folder_ / "last.pt")
        _reestimate(run, model, quantized)
        run.keep_model(QAT, quantized)
    run.measure("qat", quantized)
    return float(result["passes_per_step"])


def _reestimate(run: Run, model: nn.Module, quantized: nn.Module) -> None:
    """BatchNorm's statistics anew after training, where training items say that it helps."""
    before = {name: value.clone() for name, value in quantized.state_dict().items()}
    loss = _loss(run, model, quantized)
    # Of the plain inputs, which the network knows by heart, the statistics fit new ones worse than training's own do.
    reestimate_batch_norm(quantized, (x.to(run.device) for x in run.task.inputs(STATISTICS, augment=True)))
    again = _loss(run, model, quantized)
    if again > loss:
        quantized.load_state_dict(before)
    run.stages["reestimated"] = {"kept": again <= loss, "loss": loss, "loss_reestimated": again}


def _losses(run: Run, model: nn.Module, count: int) -> Iterator[Callable[[nn.Module], Tensor]]:
    """The loss of a network on training items as training sees them, batch by batch.

    Training that learns from the float network's answers alone is judged by the distance to them: its items need no labels.
    """
    if getattr(run.task, "distill", 0) == 1:
        for x in run.task.inputs(count, augment=True):
            x = x.to(run.device)
            wanted = model.to(run.device).eval()(x).detach()
            yield lambda network, x=x, wanted=wanted: (network(x) - wanted).square().mean()
        return
    data: Any = run.task.dataset("train")
    train, task = Seeded(data, run.config.seed), run.task.in_float()
    for start in range(0, min(count, len(data)), BATCH):
        items = default_collate([train[0, i] for i in range(start, min(start + BATCH, count, len(data)))])
        batch = {key: x.to(run.device) for key, x in items.items()}
        yield lambda network, batch=batch: task.loss(network, batch)


@torch.no_grad()
def _loss(run: Run, model: nn.Module, quantized: nn.Module) -> float:
    """The loss on training items, in evaluation mode."""
    quantized.eval()
    return statistics.fmean(float(loss(quantized)) for loss in _losses(run, model, 4 * BATCH))


def _files(run: Run, model: nn.Module, quantized: nn.Module) -> dict[str, Any]:
    """Write the two files; what is to be said of them."""
    about = {**run.task.about(), "task": run.task.name, "version": arsam.__version__}
    bits = {"weight": run.task.weight_bits, "act": run.task.act_bits}
    inputs = [x.numpy() for x in run.task.inputs(run.task.calibration.pictures, augment=False)]
    files = {"float": run.out / "float.onnx", "low_bit": run.out / "model.onnx"}
    if "file" not in run.stages or not all(file.is_file() for file in files.values()):
        export.export(model, files["float"], inputs[:1], about=about)
        export.export(
            quantized,
            files["low_bit"],
            inputs,
            about={**about, "bits": bits, "target": run.task.target},
            target=run.task.target,
        )
        parted = check(files["low_bit"], quantized, inputs)
        compared = Compared(InRuntime(files["low_bit"]), quantized, run.device, files["low_bit"])
        figures = engine.evaluate(replace(run.config, precision="fp32"), compared, torch.device("cpu"))
        run.stages["onnx"] = {run.task.metric: figures[run.task.metric], "size_mb": files["low_bit"].stat().st_size / 1e6}
        run.stages["file"] = {"agreement": compared.agreement, "openvino": compared.second_opinion, "check": parted}
    for line in run.stages["file"]["check"]["warnings"]:
        run.say(f"warning: {line}")
    run.stages["float"]["size_mb"] = files["float"].stat().st_size / 1e6
    run.keep()
    example = inputs[0][:1]
    image = torch.from_numpy(example)
    cost = costs(files, example)
    return {
        **run.stages["file"],
        "latency_ms": {name: figures["latency_ms"] for name, figures in cost.items()},
        "cost": cost,
        "kernels": dict(kernels(files["low_bit"])),
        "bops": {
            name: bit_operations(quantized, image.to(run.device), low) for name, low in (("float", False), ("low_bit", True))
        },
        "not_quantized": not_quantized(quantized.cpu(), image),
        "sharpness": _ascent(run, model, quantized.to(run.device)) if run.config.epochs else None,
        "input": about,
        "calibration": describe(run.task.calibration),
        "distance": run.stages["distance"],
        **({"reestimated": run.stages["reestimated"]} if "reestimated" in run.stages else {}),
    }


def _ascent(run: Run, model: nn.Module, quantized: nn.Module) -> dict[str, float]:
    """What an ascent of the config's rho does to the model on a batch of the training split."""
    rho = float(getattr(run.config.sharpness, "keywords", {}).get("rho", 0.05))  # the usual one where the config has none
    return {"rho": rho, **effect(quantized, next(_losses(run, model, BATCH)), rho)}
