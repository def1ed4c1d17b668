"""What the numbers of a run show, in words: the list at the top of the report, as HTML."""

from typing import Any

from drorae.evaluation.report_tables import METRICS, SAMPLERS, judge, with_interval

__all__ = ["verdicts"]


def verdicts(metrics: dict[str, Any]) -> str:
    """What the run shows, one line each, with a mark for better, worse or undecided."""
    lines = []
    differences, generation = metrics.get("differences", {}), metrics.get("generation", {})
    for pair, claim in (
        ("fusion-rae", "Fusion against RAE with the same decoder"),
        ("finetune-rae", "Fusion with fine-tuned decoder against RAE"),
        ("finetune-control", "The same against a last-layer decoder trained as long"),
    ):
        if pair in differences:
            lines.append(_difference_line(claim, differences[pair]))
    lines += _generation_lines(generation)
    items = "".join(f'<li class="{mark}">{text}</li>' for mark, text in lines)
    return f'<ul class="verdict">{items}</ul>' if items else ""


def _difference_line(claim: str, values: dict[str, Any]) -> tuple[str, str]:
    outcomes = {judge(values[key], sign) for key, _, _, sign in METRICS}
    parts = ", ".join(
        f"{key.upper()} {with_interval(values[key], digits, signed=True)}"
        for key, _, digits, _ in METRICS
    )
    if outcomes == {"better"}:
        return "good", f"<b>{claim}: better on all three.</b> {parts}"
    if outcomes == {"worse"}:
        return "bad", f"<b>{claim}: worse on all three.</b> {parts}"
    words = "mixed" if outcomes >= {"better", "worse"} else "partly within the interval"
    words = "no measurable difference" if outcomes == {""} else words
    return "", f"<b>{claim}: {words}.</b> {parts}"


def _generation_lines(generation: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    plain = generation.get("unguided")
    if plain and "untrained" in generation and "real" in generation:
        floor, ceiling = generation["untrained"]["fd"], generation["real"]["fd"]
        closed = 100.0 * (floor - plain["fd"]) / max(floor - ceiling, 1e-9)
        mark = "good" if closed > 50 else "bad" if closed < 10 else ""
        lines.append(
            (
                mark,
                f"<b>Generator, unguided: closes {closed:.0f} % of the way from an untrained "
                "network to real "
                f"photos.</b> FD {plain['fd']:.2f} between {floor:.2f} and {ceiling:.2f}",
            )
        )
    for name in SAMPLERS:
        if plain and name != "unguided" and name in generation:
            change = generation[name]["fd"] - plain["fd"]
            mark = "good" if change < 0 else "bad"
            word = "lowers" if change < 0 else "raises"
            lines.append(
                (
                    mark,
                    f"<b>{SAMPLERS[name]} {word} FD by {abs(change):.2f}</b> "
                    f"({plain['fd']:.2f} to {generation[name]['fd']:.2f}); one seed, no interval",
                )
            )
    return lines
