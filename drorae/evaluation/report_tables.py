"""Tables of the report, as HTML. Pure functions of the collected data."""

from collections.abc import Sequence
from html import escape
from typing import Any

from drorae.evaluation.report_data import StageRow
from drorae.evaluation.report_paper import PAPER_ROWS, WHY_NOT_COMPARABLE, PaperRow

__all__ = [
    "METRICS",
    "SAMPLERS",
    "difference_table",
    "generation_table",
    "judge",
    "paper_table",
    "provenance_table",
    "reconstruction_table",
    "with_interval",
]

METRICS = (("psnr", "PSNR, dB", 2, 1), ("ssim", "SSIM", 4, 1), ("lpips", "LPIPS", 4, -1))
"""Key, heading, decimals, +1 when higher is better."""
MODELS = {
    "rae": "RAE (last layer, decoder)",
    "fusion": "DRoRAE fusion",
    "finetune": "DRoRAE fusion, decoder fine-tuned",
    "control": "Control: RAE, decoder trained on as long",
}
DIFFERENCES = {
    "fusion-rae": "fusion - RAE",
    "finetune-fusion": "fine-tuned - fusion",
    "finetune-rae": "fine-tuned - RAE",
    "finetune-control": "fine-tuned - control",
}
LIMITS = {
    "real": "Real training photos (ceiling)",
    "reconstruction": "Reconstructed held-out photos (ceiling of this decoder)",
    "untrained": "Freshly initialised DiT (floor)",
}
SAMPLERS = {
    "unguided": "Unguided",
    "cfg": "Classifier-free guidance",
    "autoguidance": "AutoGuidance",
    "internal": "Internal guidance",
}


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()
) -> str:
    """A table whose first column is text and whose other columns are numbers."""
    marks = list(classes) or [""] * len(rows)
    head = "".join(f"<th{' class=n' if i else ''}>{escape(h)}</th>" for i, h in enumerate(headings))
    body = "".join(
        f"<tr{f' class={mark}' if mark else ''}>"
        + "".join(f"<td{' class=n' if i else ''}>{cell}</td>" for i, cell in enumerate(row))
        + "</tr>\n"
        for row, mark in zip(rows, marks, strict=True)
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def reconstruction_table(reconstruction: dict[str, Any]) -> str:
    """PSNR, SSIM and LPIPS with intervals, and the Frechet distance, per model."""
    rows = []
    for model in (m for m in MODELS if m in reconstruction):
        values = reconstruction[model]
        cells = [escape(MODELS[model])]
        cells += [with_interval(values[key], digits) for key, _, digits, _ in METRICS]
        rows.append([*cells, _number(values.get("fd", {}).get("mean"), 2)])
    return table(["", *(title for _, title, _, _ in METRICS), "FD"], rows)


def difference_table(differences: dict[str, Any]) -> str:
    """Paired differences with intervals, coloured by whether they are an improvement."""
    rows = []
    for pair in (p for p in DIFFERENCES if p in differences):
        values = differences[pair]
        cells = [escape(DIFFERENCES[pair])]
        for key, _, digits, sign in METRICS:
            verdict = judge(values[key], sign)
            cells.append(
                f'<span class="{verdict}">{with_interval(values[key], digits, signed=True)}</span>'
            )
        rows.append(cells)
    return table(["", *(title for _, title, _, _ in METRICS)], rows)


def generation_table(generation: dict[str, Any]) -> str:
    """FD, KID, precision, recall and score of every set of images."""
    order = [*SAMPLERS, *(n for n in generation if n not in SAMPLERS and n not in LIMITS), *LIMITS]
    rows, classes = [], []
    for name in order:
        if name not in generation:
            continue
        values = generation[name]
        kid = f"{1000 * values['kid']:.2f} <small>sd {1000 * values['kid_std']:.2f}</small>"
        rows.append(
            [
                escape(set_label(name)),
                _number(values["fd"], 2),
                kid,
                _number(values["precision"], 3),
                _number(values["recall"], 3),
                _number(values["score"], 2),
                str(int(values["num_images"])),
            ]
        )
        classes.append("limit" if name in LIMITS else "")
    return table(["", "FD", "KID x 1000", "Precision", "Recall", "Score", "N"], rows, classes)


def set_label(name: str) -> str:
    """Words for a set name such as `cfg` or `unguided@decoder`."""
    guidance, _, stage = name.partition("@")
    words = {**SAMPLERS, **LIMITS}.get(guidance, guidance)
    return f"{words}, decoder of stage {stage}" if stage else words


def paper_table(reconstruction: dict[str, Any], generation: dict[str, Any]) -> str:
    """The paper's rows with ours under each, marked as not comparable."""
    rows, classes = [], []
    for paper in PAPER_ROWS:
        rows.append(_paper_cells(paper))
        classes.append("")
        if paper.ours in reconstruction:
            rows.append(_our_cells(paper.ours, reconstruction[paper.ours], generation))
            classes.append("limit")
    headings = ["", "PSNR", "SSIM", "LPIPS", "rFID / our FD", "gFID / our FD", "AutoGuidance"]
    note = f'<p class="note"><b>Not comparable.</b> {escape(WHY_NOT_COMPARABLE)}</p>'
    return note + table(headings, rows, classes)


def provenance_table(stages: Sequence[StageRow]) -> str:
    """One line a stage, and the weights with their digests folded away below."""
    rows = [
        [
            escape(s.stage),
            f"<code>{escape(s.key)}</code>",
            escape(s.seed),
            f"<code>{escape(s.code_digest)}</code>",
            f"{s.wall_s:,.0f}",
            f"{s.device_hours:.3f}",
            str(s.attempt),
        ]
        for s in stages
    ]
    rows.append(
        [
            "<b>sum</b>",
            "",
            "",
            "",
            f"{sum(s.wall_s for s in stages):,.0f}",
            f"{sum(s.device_hours for s in stages):.3f}",
            "",
        ]
    )
    overview = table(["Stage", "Key", "Seed", "Code", "Wall, s", "Device-hours", "Attempt"], rows)
    weights = [
        [f"{escape(s.stage)}/{escape(name)}", f"{size:,}", f"<code>{sha}</code>"]
        for s in stages
        for name, size, sha in s.weights
    ]
    return (
        overview
        + _fold("Weights and their sha256", table(["File", "Bytes", "sha256"], weights))
        + (_environment(stages))
    )


def judge(interval: dict[str, float], sign: int) -> str:
    """`better`, `worse`, or empty when the interval contains zero."""
    low, high = sorted((sign * interval["lo"], sign * interval["hi"]))
    if low > 0:
        return "better"
    return "worse" if high < 0 else ""


def _paper_cells(paper: PaperRow) -> list[str]:
    name = escape(paper.name) + (f"<br><small>{escape(paper.note)}</small>" if paper.note else "")
    values = (
        (paper.psnr, 2),
        (paper.ssim, 3),
        (paper.lpips, 3),
        (paper.rfid, 2),
        (paper.gfid, 2),
        (paper.gfid_guided, 2),
    )
    return [name, *(_number(value, digits) for value, digits in values)]


def _our_cells(name: str, values: dict[str, Any], generation: dict[str, Any]) -> list[str]:
    cells = ["this run, not comparable"]
    cells += [_number(values[key]["mean"], digits) for key, _, digits, _ in METRICS]
    cells.append(_number(values.get("fd", {}).get("mean"), 2))
    stage = {"fusion": "decoder", "finetune": "finetune"}.get(name)
    for sampler in ("unguided", "autoguidance"):
        fits = [
            v for k, v in generation.items() if k.startswith(sampler) and v.get("decoder") == stage
        ]
        cells.append(_number(fits[0]["fd"] if fits else None, 2))
    return cells


def _environment(stages: Sequence[StageRow]) -> str:
    if not stages:
        return ""
    last = stages[-1]
    machine = sorted({", ".join(f"{k} {v}" for k, v in s.hardware.items()) for s in stages})
    hardware = "".join(f"<p>{escape(m)}</p>" for m in machine)
    packages = table(
        ["Package", "Version"], [[escape(k), escape(v)] for k, v in last.packages.items()]
    )
    return _fold("Hardware", hardware) + _fold("Packages", packages)


def _fold(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def with_interval(interval: dict[str, float], digits: int, *, signed: bool = False) -> str:
    """Mean, and the interval in small print."""
    plus = "+" if signed else ""
    return (
        f"{interval['mean']:{plus}.{digits}f} "
        f"<small>[{interval['lo']:{plus}.{digits}f}, {interval['hi']:{plus}.{digits}f}]</small>"
    )
