"""What quantization came to: report.json, report.md and a plot of accuracy against size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks import log

TITLES = {
    "float": "float",
    "ptq": "calibrated",
    "ptq_bn": "calibrated, BatchNorm re-estimated",
    "qat": "trained (QAT)",
    "onnx": "ONNX file, in ONNX Runtime",
}


METRICS = {"top1": "top-1"}  # as they are printed


def write(out: Path, result: dict[str, Any]) -> str:
    """Write report.json, report.md and report.png into a folder; the report's text."""
    log.write_json(out / "report.json", result)
    text = _text(result)
    (out / "report.md").write_text(text)
    _draw(out / "report.png", result["stages"], result["metric"])
    return text


def _text(result: dict[str, Any]) -> str:
    bits, latency, bops = result["bits"], result["latency_ms"], result["bops"]
    stages, sharpness, machine = result["stages"], result["sharpness"], result["machine"]
    convolutions = result["kernels"].get("QLinearConv", 0)
    others = sum(count for kernel, count in result["kernels"].items() if kernel in ("Conv", "FusedConv", "ConvInteger"))
    metric = result["metric"]
    rows = [f"| {TITLES[stage]} | {s[metric]:.4f} | {s['size_mb']:.2f} |" for stage, s in stages.items()]
    smaller = stages["float"]["size_mb"] / stages["onnx"]["size_mb"]
    lines = [
        f"# W{bits['weight']}A{bits['act']} of {result['config']}",
        "",
        f"| stage | {METRICS.get(metric, metric)} | MB |",
        "|---|---|---|",
        *rows,
        "",
        f"- agreement of ONNX Runtime with the fake-quantized model: {result['agreement']:.4f} of the test set",
        *_second(result["openvino"]),
        f"- size: the file is {smaller:.2f} times smaller than the float file",
        f"- latency at batch 1, one thread: {latency['float']:.3f} ms float, {latency['low_bit']:.3f} ms low-bit,"
        f" {latency['float'] / latency['low_bit']:.2f} times faster",
        f"- kernels: {convolutions} of {convolutions + others} convolutions run on integers",
        f"- bit operations: {bops['float'] / 1e9:.2f} G float, {bops['low_bit'] / 1e9:.3f} G low-bit",
        f"- training: {result['passes_per_step']:.3f} passes per step; perturbation of {result['perturb']} weights",
        f"- an ascent of rho {sharpness['rho']:g} changes {sharpness['codes_changed']:.4%} of the codes if it moves latent"
        f" weights; the loss rises by {sharpness['loss_rise_latent']:+.5f}, or {sharpness['loss_rise_quantized']:+.5f} if it"
        " moves quantized ones",
        "- not quantized:",
        *(f"  - {line}" for line in result["not_quantized"]),
        f"- machine: {machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}",
        f"- seed {result['seed']}; command: {' '.join(machine['command'])}",
    ]
    return "\n".join(lines) + "\n"


def _second(opinion: dict[str, Any] | None) -> list[str]:
    if opinion is None:
        return []
    if "error" in opinion:
        return [f"- OpenVINO {opinion['version']} does not run the file: {opinion['error']}"]
    return [f"- agreement of OpenVINO {opinion['version']} with ONNX Runtime: {opinion['agreement']:.4f} of the test set"]


def _draw(path: Path, stages: dict[str, dict[str, float]], metric: str) -> None:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for stage, values in stages.items():
        panel.plot(values["size_mb"], values[metric], "o", label=TITLES[stage])
    panel.set(xscale="log", xlabel="MB", ylabel=METRICS.get(metric, metric))
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=110)
