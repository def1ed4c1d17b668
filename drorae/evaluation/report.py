"""The report: one self-contained HTML page about one finished run.

What is measured lies in `metrics.json`; this module only arranges it. The page loads nothing from
anywhere: style sheet, pictures (base64 PNG) and figures (SVG) are inside the file.
"""

import base64
from html import escape
from typing import Any

from drorae.evaluation.job import ReportJob
from drorae.evaluation.report_data import ReportData
from drorae.evaluation.report_plots import (
    angle_figure,
    curves_figure,
    generation_figure,
    routing_figure,
    sensitivity_figure,
    spectrum_figure,
)
from drorae.evaluation.report_tables import (
    SAMPLERS,
    difference_table,
    generation_table,
    paper_table,
    provenance_table,
    reconstruction_table,
)
from drorae.evaluation.report_template import page
from drorae.evaluation.report_verdicts import verdicts

__all__ = ["render"]

SAMPLE_TITLES = {
    "samples-unguided": "Unguided",
    "samples-cfg": "Classifier-free guidance",
    "samples-autoguidance": "AutoGuidance",
    "samples-internal": "Internal guidance",
    "samples-untrained": "Freshly initialised DiT",
}


def render(data: ReportData, report: ReportJob) -> str:
    """The page as text.

    Args:
        data: What `report_data.collect` gathered.
        report: Title and figure settings.
    """
    metrics = data.metrics
    sections = [
        ("verdict", "What this run shows", verdicts(metrics)),
        ("reconstruction", "Reconstruction of held-out photos", _reconstruction(data)),
        ("generation", "Generation", _generation(data)),
        ("inside", "Inside the fusion", _diagnostics(data)),
        ("training", "Training curves", _curves(data)),
        (
            "paper",
            "Beside the paper",
            paper_table(metrics.get("reconstruction", {}), metrics.get("generation", {})),
        ),
        ("caveats", "How to read these numbers", _caveats(metrics.get("meta", {}))),
        ("provenance", "Provenance", provenance_table(data.stages)),
    ]
    return page(report.title, _lead(data), sections)


def _lead(data: ReportData) -> str:
    counts = data.counts
    parts = [f"Recipe <code>{escape(data.recipe)}</code>"]
    if counts:
        parts.append(
            f"{counts['train']['rows']:,} training and {counts['val']['rows']:,} held-out photos, "
            f"{len(counts.get('class_names', []))} classes, {counts.get('resolution_px', '?')} px"
        )
    hours = sum(s.device_hours for s in data.stages)
    parts.append(f"{sum(s.wall_s for s in data.stages) / 60:.1f} minutes, {hours:.2f} device-hours")
    return f'<p class="lead">{" &middot; ".join(parts)}</p>'


def _reconstruction(data: ReportData) -> str:
    metrics = data.metrics
    if not metrics.get("reconstruction"):
        return ""
    meta = metrics.get("meta", {})
    intro = (
        f"Means over {meta.get('num_val_images', '?')} held-out photos with 95 % bootstrap "
        "intervals over images. "
        "Differences are paired: the same photos in both, so their intervals are the ones to trust."
    )
    parts = [f"<p>{escape(intro)}</p>", reconstruction_table(metrics["reconstruction"])]
    if metrics.get("differences"):
        parts += ["<h3>Paired differences</h3>", difference_table(metrics["differences"])]
    parts.append(
        _picture(data, "reconstruction", "Held-out photos and what each model makes of them.")
    )
    return "\n".join(parts)


def _generation(data: ReportData) -> str:
    generation = data.metrics.get("generation", {})
    if not generation:
        return ""
    meta = data.metrics.get("meta", {})
    intro = (
        f"{meta.get('num_samples', '?')} images per row, the same noise and labels in every row, "
        "measured against "
        f"{meta.get('num_val_images', '?')} held-out photos. FD is the Frechet distance on "
        f"{meta.get('feature_extractor', '?')} features; rows with another N are not on the same "
        "scale."
    )
    values = {name: generation[name]["fd"] for name in SAMPLERS if name in generation}
    limits = [generation[n]["fd"] if n in generation else None for n in ("untrained", "real")]
    parts = [f"<p>{escape(intro)}</p>", generation_table(generation)]
    if values:
        figure = generation_figure(values, limits[0], limits[1])
        parts.append(
            f'<div class="figures">{_figure(figure, "Frechet distance by guidance.")}</div>'
        )
    grids = [
        _picture(data, name, f"{title}. One row per class, the same noise in every grid.")
        for name, title in SAMPLE_TITLES.items()
    ]
    parts.append(f'<div class="figures">{"".join(grids)}</div>' if any(grids) else "")
    return "\n".join(parts)


def _diagnostics(data: ReportData) -> str:
    found = data.metrics.get("diagnostics", {})
    figures = []
    if "routing" in found:
        figures.append(
            _figure(
                routing_figure(found["routing"]),
                f"Routing weight per layer, mean and spread over tokens. Effective layers: "
                f"{found['routing']['effective_layers']:.2f}.",
            )
        )
    if "angles" in found:
        angles = found["angles"]
        figures.append(
            _figure(
                angle_figure(found["angle_histogram"], angles["angle_bound_degrees"]),
                f"Rotation of tokens. Mean {angles['angle_mean_degrees']:.2f} degrees; cos(fused, "
                "base) "
                f"{angles['cosine_fused_base']:.3f}, where the bound is reached at "
                f"{angles['cosine_at_bound']:.3f}.",
            )
        )
    if found.get("spectra"):
        figures.append(
            _figure(
                spectrum_figure(found["spectra"]),
                "Spectrum of reconstructions against photos; below zero: lost.",
            )
        )
    if found.get("sensitivity"):
        figures.append(
            _figure(
                sensitivity_figure(found["sensitivity"]),
                "How far a decoded picture moves when its latent is disturbed.",
            )
        )
    grid = f'<div class="figures">{"".join(figures)}</div>' if figures else ""
    caption = "Signed routing weights per layer: blue adds a layer, orange subtracts it."
    return grid + _picture(data, "routing", caption)


def _curves(data: ReportData) -> str:
    parts = []
    for stage in dict.fromkeys(curve.stage for curve in data.curves):
        curves = [c for c in data.curves if c.stage == stage]
        parts.append(f"<h3>{escape(stage)}</h3>{_figure(curves_figure(stage, curves), '')}")
    return "\n".join(parts)


def _caveats(meta: dict[str, Any]) -> str:
    lines = list(meta.get("caveats", []))
    rows = "".join(f"<li>{escape(line)}</li>" for line in lines)
    protocol = ", ".join(
        f"{escape(k)} = <code>{escape(str(v))}</code>" for k, v in meta.items() if k != "caveats"
    )
    return f"<ul>{rows}</ul><details><summary>Protocol</summary><p>{protocol}</p></details>"


def _figure(svg: str, caption: str) -> str:
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg}{text}</figure>"


def _picture(data: ReportData, name: str, caption: str) -> str:
    if name not in data.pictures:
        return ""
    code = base64.b64encode(data.pictures[name]).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{code}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
