import re
from html.parser import HTMLParser

import made_up
import pytest

from drorae.evaluation.job import ReportJob
from drorae.evaluation.report import render
from drorae.evaluation.report_data import collect, is_plotted, parse_log, thin
from drorae.evaluation.report_tables import generation_table, judge, paper_table
from drorae.evaluation.report_verdicts import verdicts

VOID = {"meta", "img", "br"}


class Outline(HTMLParser):
    """Checks nesting and collects ids."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.resources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if "id" in found:
            self.ids.append(str(found["id"]))
        self.resources += [str(found[k]) for k in ("src", "srcset") if k in found]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    return render(made_up.report_data(), ReportJob(title="A <test> run"))


def test_page_is_well_formed_with_unique_ids(page: str) -> None:
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))


def test_page_loads_nothing_from_outside(page: str) -> None:
    outline = Outline()
    outline.feed(page)
    assert outline.resources
    assert all(resource.startswith("data:image/png;base64,") for resource in outline.resources)
    assert "<script" not in page
    assert not re.search(r'href="(?!#)', page)


def test_references_inside_figures_resolve(page: str) -> None:
    outline = Outline()
    outline.feed(page)
    wanted = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page))
    assert wanted <= set(outline.ids)


def test_page_has_every_section_and_escapes_text(page: str) -> None:
    for anchor in (
        "verdict",
        "reconstruction",
        "generation",
        "inside",
        "training",
        "paper",
        "provenance",
    ):
        assert f'id="{anchor}"' in page
    assert "A &lt;test&gt; run" in page
    assert "Example &lt;CPU&gt;" in page
    assert "ab" * 32 in page


def test_page_of_a_run_without_extras_leaves_sections_out() -> None:
    data = made_up.report_data()
    bare = {"reconstruction": {}, "generation": {}, "meta": {}}
    reduced = type(data)(recipe="x", metrics=bare, pictures={}, curves=[], stages=[], counts={})
    page = render(reduced, ReportJob())
    assert 'id="reconstruction"' not in page
    assert 'id="training"' not in page


def test_same_data_gives_the_same_page(page: str) -> None:
    assert render(made_up.report_data(), ReportJob(title="A <test> run")) == page


def test_verdict_names_better_mixed_and_no_difference() -> None:
    text = verdicts(made_up.metrics())
    assert "Fusion against RAE with the same decoder: better on all three." in text
    assert "mixed" in text
    assert "closes 72 % of the way" in text
    flat = {"differences": {"fusion-rae": made_up.columns(0.0, 0.0, 0.0, 1.0)}}
    assert "no measurable difference" in verdicts(flat)
    worse = {"differences": {"fusion-rae": made_up.columns(-5.0, -1.0, 1.0, 0.1)}}
    assert 'class="bad"' in verdicts(worse)


def test_an_interval_around_zero_is_no_verdict() -> None:
    assert judge({"lo": -1.0, "hi": 2.0}, 1) == ""
    assert judge({"lo": 1.0, "hi": 2.0}, 1) == "better"
    assert judge({"lo": 1.0, "hi": 2.0}, -1) == "worse"


def test_limits_come_last_in_the_generation_table() -> None:
    text = generation_table(made_up.metrics()["generation"])
    assert (
        text.index("Unguided")
        < text.index("AutoGuidance")
        < text.index("ceiling")
        < text.index("floor")
    )
    assert "Unguided, decoder of stage decoder" in text


def test_paper_numbers_are_marked_as_not_comparable() -> None:
    metrics = made_up.metrics()
    text = paper_table(metrics["reconstruction"], metrics["generation"])
    assert "Not comparable." in text
    assert "18.36" in text
    assert "150.00" in text  # the fusion row takes samples drawn by the untuned decoder
    assert "-</td>" in text


def test_a_repeated_step_counts_once() -> None:
    first = '{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 4.0}\n\n'
    text = first + '{"step": 1, "loss": 3.0, "note": "x"}\n'
    (curve,) = parse_log("decoder", text, 100)
    assert (curve.steps, curve.values) == ([1, 2], [3.0, 4.0])


def test_speed_and_bookkeeping_are_not_curves() -> None:
    assert is_plotted("loss")
    for name in ("speed/images_per_s", "speed/peak_memory_bytes", "lr", "optim/lr"):
        assert not is_plotted(name)


def test_thinning_keeps_both_ends() -> None:
    kept = thin(list(range(1000)), 7)
    assert (len(kept), kept[0], kept[-1]) == (7, 0, 999)
    assert thin([1, 2], 7) == [1, 2]


def test_a_report_needs_an_evaluation() -> None:
    with pytest.raises(ValueError, match="expected evaluate"):
        collect({}, recipe="x", max_points=10)
