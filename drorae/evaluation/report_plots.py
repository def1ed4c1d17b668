"""Figures of the report as inline SVG that follows the page's light or dark colours.

Figures are drawn without pyplot (no global state). Ink is a marker colour that is replaced by
`currentColor`, and ids get a prefix of their own, since all figures share one HTML document.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from drorae.evaluation.report_data import Curve

__all__ = [
    "angle_figure",
    "curves_figure",
    "generation_figure",
    "routing_figure",
    "sensitivity_figure",
    "spectrum_figure",
]

INK = "#010203"
COLOURS = ("#2f7ed8", "#e07b39", "#2a9d6f", "#b5459b", "#8a8f98", "#c9a227")
PANELS_PER_ROW = 4
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#8888884d",
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def curves_figure(stage: str, curves: Sequence[Curve]) -> str:
    """Small multiples of one stage's training curves."""
    rows = -(-len(curves) // PANELS_PER_ROW)
    figure, panels = _panels(rows, min(len(curves), PANELS_PER_ROW), width=11.0, height=1.9 * rows)
    for i, (panel, curve) in enumerate(zip(panels, curves, strict=False)):
        panel.plot(curve.steps, curve.values, color=COLOURS[i % len(COLOURS)], linewidth=1.3)
        panel.set_title(curve.name, loc="left")
        panel.set_xlabel("step")
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    return _svg(figure, f"curves-{stage}")


def angle_figure(histogram: dict[str, list[float]], bound_degrees: float) -> str:
    """Histogram of token angles with the largest angle that beta allows."""
    figure, (panel,) = _panels(1, 1, width=5.0, height=2.6)
    edges, counts = histogram["edges_degrees"], histogram["counts"]
    total = sum(counts) or 1.0
    panel.stairs([c / total for c in counts], edges, fill=True, color=COLOURS[0], alpha=0.8)
    if bound_degrees < 180.0:
        panel.axvline(bound_degrees, color=COLOURS[1], linestyle="--", linewidth=1.3)
        panel.annotate(
            f"bound {bound_degrees:.2f}",
            (bound_degrees, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -10),
            textcoords="offset points",
            ha="right",
            color=INK,
        )
        panel.set_xlim(right=bound_degrees * 1.02)
    panel.set_xlabel("angle between fused latent and RAE latent, degrees")
    panel.set_ylabel("share of tokens")
    return _svg(figure, "angles")


def routing_figure(report: dict[str, Any]) -> str:
    """Mean signed routing weight per layer with its spread."""
    figure, (panel,) = _panels(1, 1, width=5.0, height=2.6)
    layers = list(range(1, len(report["mean"]) + 1))
    colours = [COLOURS[0] if m >= 0 else COLOURS[1] for m in report["mean"]]
    panel.bar(layers, report["mean"], yerr=report["std"], color=colours, ecolor=INK, capsize=2)
    panel.axhline(0.0, color=INK, linewidth=0.8)
    panel.set_xticks(layers)
    panel.set_xlabel("encoder layer")
    panel.set_ylabel("weight / norm over layers")
    return _svg(figure, "routing")


def spectrum_figure(spectra: dict[str, dict[str, Any]]) -> str:
    """Signed log-magnitude difference to the photos per radial band, one line a model."""
    figure, (panel,) = _panels(1, 1, width=5.0, height=2.6)
    for i, (name, spectrum) in enumerate(spectra.items()):
        bands = range(1, len(spectrum["signed"]) + 1)
        panel.plot(
            bands, spectrum["signed"], marker="o", markersize=3, label=name, color=COLOURS[i % 6]
        )
    panel.axhline(0.0, color=INK, linewidth=0.8)
    panel.set_xlabel("frequency band, low to high")
    panel.set_ylabel("log magnitude minus photo")
    panel.legend(frameon=False)
    return _svg(figure, "spectrum")


def sensitivity_figure(curves: dict[str, dict[str, list[float]]]) -> str:
    """LPIPS change against the size of a latent perturbation, one line a decoder."""
    figure, (panel,) = _panels(1, 1, width=5.0, height=2.6)
    for i, (name, curve) in enumerate(curves.items()):
        panel.plot(
            [100 * n for n in curve["relative_norm"]],
            curve["lpips"],
            marker="o",
            markersize=3,
            label=name,
            color=COLOURS[i % 6],
        )
    panel.set_xlabel("latent perturbation, % of its norm")
    panel.set_ylabel("LPIPS to unperturbed")
    panel.legend(frameon=False)
    return _svg(figure, "sensitivity")


def generation_figure(values: dict[str, float], floor: float | None, ceiling: float | None) -> str:
    """Frechet distance of each way of sampling, between the floor and the ceiling."""
    figure, (panel,) = _panels(1, 1, width=5.0, height=2.6)
    names = list(values)
    bars = panel.barh(names, [values[n] for n in names], color=COLOURS[: len(names)], height=0.6)
    panel.bar_label(bars, fmt="%.1f", padding=3, color=INK)
    for line, label in ((floor, "untrained"), (ceiling, "real photos")):
        if line is not None:
            panel.axvline(line, color=INK, linestyle=":", linewidth=1.2)
            panel.annotate(
                label,
                (line, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                color=INK,
            )
    panel.invert_yaxis()
    panel.set_xlabel("Frechet distance, lower is better")
    panel.set_xlim(left=0.0, right=1.12 * max([*values.values(), floor or 0.0]))
    panel.grid(visible=False, axis="y")
    return _svg(figure, "generation")


def _panels(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def _svg(figure: Figure, prefix: str) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": prefix}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    prefix = re.sub(r"[^A-Za-z0-9-]", "-", prefix)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
    text = re.sub(r'(<svg[^>]*?) width="[^"]*pt"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", text, count=1)
    return text.replace(INK, "currentColor")
