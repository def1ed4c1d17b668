"""What the evaluation found, as rows for a terminal and for Prefect."""

from collections.abc import Mapping

__all__ = ["QualityTable", "quality_tables"]

RECONSTRUCTION = ("rae", "fusion", "finetune", "control")
DIFFERENCES = ("fusion-rae", "finetune-control")
GENERATION = ("untrained", "unguided", "cfg", "autoguidance", "internal", "real")
RECONSTRUCTION_METRICS = ("psnr", "ssim", "lpips", "fd")
GENERATION_METRICS = ("fd", "kid", "precision", "recall")
FORMATS = {"psnr": ".2f", "ssim": ".3f", "lpips": ".4f", "fd": ".1f", "kid": ".4f"}

QualityTable = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""Title, column names, rows of text."""


def quality_tables(metrics: Mapping[str, float | None]) -> list[QualityTable]:
    """Tables of the `evaluate` stage's numbers; a table without a row is left out.

    Args:
        metrics: The stage's metrics, `kind/what/metric`.
    """
    reconstruction = _rows(metrics, "reconstruction", RECONSTRUCTION, RECONSTRUCTION_METRICS)
    reconstruction += _rows(metrics, "difference", DIFFERENCES, RECONSTRUCTION_METRICS)
    generation = _rows(metrics, "generation", GENERATION, GENERATION_METRICS)
    tables = [
        ("held-out photos", ("model", "PSNR dB", "SSIM", "LPIPS", "FD"), reconstruction),
        ("generated images", ("sampling", "FD", "KID", "precision", "recall"), generation),
    ]
    return [table for table in tables if table[2]]


def _rows(
    metrics: Mapping[str, float | None], kind: str, names: tuple[str, ...], columns: tuple[str, ...]
) -> list[tuple[str, ...]]:
    rows = []
    for name in names:
        values = [metrics.get(f"{kind}/{name}/{column}") for column in columns]
        if any(value is not None for value in values):
            cells = zip(values, columns, strict=True)
            rows.append((name, *(_cell(v, c, signed=kind == "difference") for v, c in cells)))
    return rows


def _cell(value: float | None, column: str, *, signed: bool) -> str:
    if value is None:
        return ""
    return format(value, ("+" if signed else "") + FORMATS.get(column, ".3f"))
