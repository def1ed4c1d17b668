"""The report's frame and style sheet: one file, no script, no request, light and dark."""

from html import escape

__all__ = ["page", "section"]

CSS = """
:root { color-scheme: light dark; --bg: #fbfbfa; --card: #ffffff; --ink: #1d2126; --soft: #5c646d;
--line: #e3e5e8;
  --good: #1f7a4d; --bad: #b3372f; --flat: #6b7280; --accent: #2f6fc4; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171a; --card: #1c2024; --ink: #e7eaee;
--soft: #9aa4af;
  --line: #2e343a; --good: #5cc48d; --bad: #ef8379; --flat: #9aa4af; --accent: #7fb0f0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 15px/1.55 system-ui,
-apple-system, "Segoe UI", sans-serif; } main { max-width: 1080px; margin: 0 auto; padding: 2.2rem
1.2rem 4rem; } h1 { font-size: 1.75rem; margin: 0 0 .2rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 0 0 .7rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 .4rem; color: var(--soft); font-weight: 600; }
p { margin: .35rem 0 .7rem; max-width: 78ch; } .lead, .note { color: var(--soft); } .note {
font-size: .88rem; } section { background: var(--card); border: 1px solid var(--line);
border-radius: 10px; padding: 1.2rem 1.3rem; margin: 1.1rem 0; } nav { display: flex; flex-wrap:
wrap; gap: .3rem 1.1rem; margin: 1rem 0 0; font-size: .9rem; } a { color: var(--accent);
text-decoration: none; } a:hover { text-decoration: underline; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size:
.9rem; } th, td { text-align: left; padding: .38rem .7rem .38rem 0; border-bottom: 1px solid
var(--line); vertical-align: top; } th { color: var(--soft); font-weight: 600; } td.n, th.n {
text-align: right; white-space: nowrap; } tr.limit td { color: var(--soft); font-style: italic; }
small { color: var(--soft); } code { font: .85em ui-monospace, "SF Mono", Menlo, monospace;
overflow-wrap: anywhere; } ul.verdict { list-style: none; padding: 0; margin: 0; }
ul.verdict li { padding: .45rem 0 .45rem 1.5rem; position: relative; border-bottom: 1px solid
var(--line); } ul.verdict li:last-child { border: 0; }
ul.verdict li::before { content: ""; position: absolute; left: .2rem; top: .95rem; width: .6rem;
height: .6rem; border-radius: 50%;
  background: var(--flat); }
ul.verdict li.good::before { background: var(--good); } ul.verdict li.bad::before { background:
var(--bad); } .better { color: var(--good); } .worse { color: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 1rem; }
.figures figure { max-width: 620px; } figure { margin: .5rem 0 0; } figcaption { font-size: .86rem;
color: var(--soft); margin-top: .3rem; } figure svg { width: 100%; height: auto; display: block; }
figure img { max-width: 100%; height: auto; border-radius: 6px; background: #fff; padding: 6px;
image-rendering: pixelated; } details { margin: .5rem 0; } summary { cursor: pointer; color:
var(--accent); } @media print { section { break-inside: avoid; } }
"""


def section(anchor: str, title: str, body: str) -> str:
    """One card of the page; empty when there is nothing to show."""
    if not body:
        return ""
    return f'<section id="{escape(anchor)}"><h2>{escape(title)}</h2>\n{body}\n</section>'


def page(title: str, lead: str, sections: list[tuple[str, str, str]]) -> str:
    """The whole document.

    Args:
        title: Heading, plain text.
        lead: HTML under the heading.
        sections: (anchor, title, HTML); empty ones are left out, also from the navigation.
    """
    shown = [s for s in sections if s[2]]
    links = "".join(f'<a href="#{escape(a)}">{escape(t)}</a>' for a, t, _ in shown)
    cards = "\n".join(section(*s) for s in shown)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style></head>\n<body><main>\n"
        f"<header><h1>{escape(title)}</h1>\n{lead}\n<nav>{links}</nav></header>\n{cards}\n"
        "</main></body></html>\n"
    )
