"""What quantization came to: report.json, report.md and a picture of the stages with their size and latency."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from tasks import folder, log
from tasks.quant.runtime import RETURN

TITLES = {
    "float": "float",
    "ptq": "calibrated",
    "ptq_bn": "calibrated, statistics corrected",
    "qat": "trained (QAT)",
    "onnx": "ONNX file, in ONNX Runtime",
}


METRICS = {"top1": "top-1"}  # as they are printed


def write(out: Path, result: dict[str, Any]) -> str:
    """Write report.json, report.md and report.png into a folder; the report's text."""
    log.write_json(out / "report.json", result)
    text = _text(result)
    folder.fresh(out / "report.md").write_text(text)
    _draw(out / "report.png", result)
    return text


def speed(before: float, after: float) -> str:
    """How two times compare, in words: "1.50 times faster", "1.33 times slower"."""
    return f"{before / after:.2f} times faster" if after <= before else f"{after / before:.2f} times slower"


def _text(result: dict[str, Any]) -> str:
    bits, bops = result["bits"], result["bops"]
    stages, machine = result["stages"], result["machine"]
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
        f"- calibrated model that was kept: {TITLES[result['kept']]} ({_distances(result['distance'])})",
        f"- agreement of ONNX Runtime with the fake-quantized model: {result['agreement']:.4f} of the validation split",
        *_second(result["openvino"]),
        *(f"- warning: {line}" for line in result["check"]["warnings"]),
        f"- size: the file is {smaller:.2f} times smaller than the float file",
        *_costs(result["cost"]),
        f"- kernels: {convolutions} of {convolutions + others} convolutions run on integers",
        f"- bit operations: {bops['float'] / 1e9:.2f} G float, {bops['low_bit'] / 1e9:.3f} G low-bit",
        *_training(result),
        *_ascent(result["sharpness"]),
        "- not quantized:",
        *(f"  - {line}" for line in result["not_quantized"]),
        *_input(result["input"]),
        f"- machine: {machine['device']}, {machine['threads']} threads, torch {machine['versions']['torch']}",
        f"- seed {result['seed']}; command: {' '.join(machine['command'])}",
        *_layers(result["check"].get("layers")),
    ]
    return "\n".join(lines) + "\n"


def _distances(distance: dict[str, float]) -> str:
    what = ", ".join(f"{value:.4f} {name}" for name, value in distance.items())
    return f"squared distance of the outputs from float's on held-out inputs, relative: {what}"


def _costs(cost: dict[str, dict[str, float]]) -> list[str]:
    before, after = cost["float"], cost["low_bit"]
    lines = [
        f"- latency of a call at batch {size}, one thread: {before[key]:.3f} ms float, {after[key]:.3f} ms low-bit,"
        f" {speed(before[key], after[key])}"
        for size, key in ((1, "latency_ms"), (8, "latency_ms_batch_8"))
    ]
    return [
        *lines,
        f"- loading: {before['load_seconds']:.2f} s float, {after['load_seconds']:.2f} s low-bit",
        f"- memory that the loaded file holds: {before['resident_mb']:.0f} MB float, {after['resident_mb']:.0f} MB low-bit;"
        f" with MALLOC_MMAP_THRESHOLD_={RETURN} in the environment, so that glibc gives back what loading has freed,"
        f" {before['needed_mb']:.0f} and {after['needed_mb']:.0f} MB",
    ]


def _training(result: dict[str, Any]) -> list[str]:
    if "qat" not in result["stages"]:
        return ["- training: none (epochs=0)"]
    again = result["reestimated"]
    better = "kept" if again["kept"] else "left out"
    return [
        f"- training: {result['passes_per_step']:.3f} passes per step; perturbation of {result['perturb']} weights",
        f"- BatchNorm re-estimated after training: {better} (loss on training items {again['loss']:.4f} before,"
        f" {again['loss_reestimated']:.4f} after)",
    ]


def _ascent(effect: dict[str, float] | None) -> list[str]:
    if effect is None:
        return []
    rises = [f"{effect[name]:+.5f}" for name in ("loss_rise_latent", "loss_rise_quantized")]
    return [
        f"- an ascent of rho {effect['rho']:g} changes {effect['codes_changed']:.4%} of the codes if it moves latent weights;"
        f" the loss rises by {rises[0]}, or {rises[1]} if it moves quantized ones"
    ]


def _input(about: dict[str, Any]) -> list[str]:
    facts = {
        key: value for key, value in about.items() if key not in ("classes", "joints", "task", "version") and value is not None
    }
    names = about.get("classes")
    told = [f"- classes: {len(names)}, from {names[0]} to {names[-1]}"] if names else []
    return [f"- input: {', '.join(f'{key} {value}' for key, value in facts.items())}", *told] if facts else told


def _layers(rows: list[dict[str, Any]] | None) -> list[str]:
    if not rows:
        return []
    return [
        "",
        "| layer | weight bits | input bits | input | input step | mean weight step | signal to noise, dB |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {r['layer']} | {r['weight_bits']} | {r['act_bits']} | {'signed' if r['signed'] else 'unsigned'}"
            f" | {r['act_step']:.3g} | {r['weight_step']:.3g} | {r['snr_db']:.1f} |"
            for r in rows
        ),
    ]


def _second(opinion: dict[str, Any] | None) -> list[str]:
    if opinion is None:
        return []
    if "error" in opinion:
        return [f"- OpenVINO {opinion['version']} does not run the file: {opinion['error']}"]
    return [f"- agreement of OpenVINO {opinion['version']} with ONNX Runtime: {opinion['agreement']:.4f} of the test set"]


_FILES = (  # of the two files: key of the costs, what it is, how it is written
    ("latency_ms", "ms at batch 1", "{:.2f}"),
    ("latency_ms_batch_8", "ms at batch 8", "{:.1f}"),
    ("load_seconds", "s to load", "{:.2f}"),
    ("needed_mb", "MB held in memory", "{:.0f}"),
)


def _draw(path: Path, result: dict[str, Any]) -> None:
    """The stages with their metric and size; below, what the two files cost in ONNX Runtime on one thread."""
    import matplotlib.figure

    stages, metric, cost = result["stages"], result["metric"], result["cost"]
    names = [TITLES[stage].replace(", ", ",\n") for stage in stages]
    bits = f"W{result['bits']['weight']}A{result['bits']['act']}"
    figure = matplotlib.figure.Figure(figsize=(10, 2.6 + 0.5 * len(stages)), layout="constrained", facecolor="white")
    figure.suptitle(f"{bits} of {Path(result['config']).stem}", fontsize=11)
    above, below = cast(Any, figure.subfigures)(2, 1, height_ratios=(0.5 * len(stages) + 0.6, 1.4))
    metrics, sizes = above.subplots(1, 2, sharey=True)
    _bars(metrics, names, [s[metric] for s in stages.values()], str(METRICS.get(metric, metric)), "{:.4f}")
    _bars(sizes, names, [s["size_mb"] for s in stages.values()], "MB, weights in their bits, or the file", "{:.2f}")
    panels = below.subplots(1, len(_FILES), sharey=True)
    for panel, (key, title, form) in zip(panels, _FILES, strict=True):
        _bars(panel, ["float.onnx", "model.onnx"], [c[key] for c in cost.values()], title, form)
    figure.savefig(folder.fresh(path), dpi=110)


def _bars(panel: Any, names: list[str], values: list[float], title: str, form: str) -> None:
    """Horizontal bars with their values, the first, which is float, in grey."""
    bars = panel.barh(names, values, color=["0.6", *["C0"] * (len(values) - 1)])
    panel.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
    if not panel.yaxis_inverted():  # shared axes are turned once
        panel.invert_yaxis()
    panel.set_title(title, fontsize=9)
    panel.set_xlim(0, 1.3 * max(*values, 1e-9))
    panel.tick_params(labelsize=8)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right"]].set_visible(False)
