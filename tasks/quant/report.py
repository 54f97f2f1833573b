"""What quantization came to: report.json, report.md and a picture of the stages with their size and latency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tasks import folder, log

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
        f"- calibrated model that was kept: {TITLES[result['kept']]} ({_distances(result['distance'])})",
        f"- agreement of ONNX Runtime with the fake-quantized model: {result['agreement']:.4f} of the validation split",
        *_second(result["openvino"]),
        *(f"- warning: {line}" for line in result["check"]["warnings"]),
        f"- size: the file is {smaller:.2f} times smaller than the float file",
        *_costs(result["cost"]),
        f"- kernels: {convolutions} of {convolutions + others} convolutions run on integers",
        f"- bit operations: {bops['float'] / 1e9:.2f} G float, {bops['low_bit'] / 1e9:.3f} G low-bit",
        *_training(result),
        f"- an ascent of rho {sharpness['rho']:g} changes {sharpness['codes_changed']:.4%} of the codes if it moves latent"
        f" weights; the loss rises by {sharpness['loss_rise_latent']:+.5f}, or {sharpness['loss_rise_quantized']:+.5f} if it"
        " moves quantized ones",
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
        f"- loading: {before['load_seconds']:.2f} s float, {after['load_seconds']:.2f} s low-bit; memory that the loaded file"
        f" holds: {before['resident_mb']:.0f} MB float, {after['resident_mb']:.0f} MB low-bit",
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


def _draw(path: Path, result: dict[str, Any]) -> None:
    import matplotlib.figure

    stages, metric = result["stages"], result["metric"]
    names = [TITLES[stage].replace(", ", ",\n") for stage in stages]
    figure = matplotlib.figure.Figure(figsize=(11, 1.2 + 0.55 * len(stages)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    panels = (
        (left, names, [s[metric] for s in stages.values()], METRICS.get(metric, metric), "{:.4f}"),
        (middle, names, [s["size_mb"] for s in stages.values()], "MB", "{:.2f}"),
        (right, ["float file", "low-bit file"], [c["latency_ms"] for c in result["cost"].values()], "ms at batch 1", "{:.2f}"),
    )
    for panel, labels, values, title, form in panels:
        bars = panel.barh(labels, values, color=["0.6", *["C0"] * (len(values) - 1)])
        panel.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
        panel.invert_yaxis()
        panel.set(title=title, xlim=(0, 1.25 * max(*values, 1e-9)))
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    middle.set_yticklabels([])
    figure.savefig(folder.fresh(path), dpi=110)
