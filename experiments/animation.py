"""A picture that moves: models write the same answer side by side, one panel each, as an SVG without scripts.

Every token has its place from the beginning. It is a grey box while it is masked, lights up in the pass that commits
it, and is then text. A token that the panel marks is red. Styles alone move the picture, so a page may show it as an
image. In print, or where the reader asked for less motion, nothing moves and the finished answers show.
"""

from html import escape
from typing import NamedTuple

WIDTH, LINE, COLUMN, SIZE = 838, 36, 15.6, 26  # pixels: of the picture, a line, a character, the font
PASS, PAUSE = 0.3, 4.0  # seconds of a pass, and between the last pass and the next beginning
STYLE = """text{{font:{size}px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:#e6edf3}}
.s{{font:15px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}}.d{{fill:#8b949e}}.w{{fill:#ff7b72}}
.r{{fill:#7ee787}}.p{{fill:#9e6a03;transform-origin:16px 0;animation:p {seconds:g}s linear infinite}}
.b,.t{{animation:{seconds:g}s step-end infinite}}rect.b{{fill:#484f58;opacity:0}}
@media(prefers-reduced-motion:reduce){{.b,.t,.p{{animation:none!important}}}}"""


class Panel(NamedTuple):
    title: str
    tokens: list[str]  # the text of each token of the answer
    when: list[int]  # the pass, from 0, that commits it
    wrong: list[bool]  # whether it is marked
    verdict: str
    right: bool


def at(number: int, passes: int) -> str:
    """The moment of a pass, in percent of a round. Before the first pass all is masked, for as long as a pass takes."""
    return f"{100 * (number + 1) * PASS / round_of(passes):.2f}%"


def round_of(passes: int) -> float:
    return (passes + 1) * PASS + PAUSE


def placed(panel: Panel, columns: int):
    """(text, pass, wrong, column, row) of each token; a line ends after ⏎, and where the panel is full."""
    column = row = 0
    for text, number, wrong in zip(panel.tokens, panel.when, panel.wrong, strict=True):
        if column + len(text) > columns:
            column, row = 0, row + 1
        yield text, number, wrong, column, row
        column += len(text)
        if text.endswith("⏎"):
            column, row = 0, row + 1


def picture(heading: str, panels: list[Panel], passes: int) -> str:
    """The SVG of all panels. Every answer takes that many passes."""
    apart = 16
    wide = (WIDTH - apart * (len(panels) + 1)) / len(panels)
    laid = [list(placed(panel, int((wide - 24) // COLUMN))) for panel in panels]
    rows = 1 + max(row for tokens in laid for *_, row in tokens)
    high = 114 + rows * LINE
    style = STYLE.format(size=SIZE, seconds=round_of(passes)) + (
        f"\n@keyframes p{{0%{{transform:scaleX(0)}}{at(passes, passes)}{{transform:scaleX(1)}}}}")
    for n in range(passes):
        done, shown = at(n, passes), at(n + 1, passes)  # committed, and no longer new
        style += (f"\n@keyframes b{n}{{0%{{opacity:1}}{done}{{opacity:1;fill:#9e6a03}}{shown}{{opacity:0}}}}"
                  f"@keyframes t{n}{{0%{{opacity:0}}{done}{{opacity:1}}}}.b{n}{{animation-name:b{n}}}"
                  f".t{n}{{animation-name:t{n}}}")
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{high + 36}" '
           f'viewBox="0 0 {WIDTH} {high + 36}" role="img" aria-label="{escape(heading)}"><style>{style}</style>',
           f'<rect width="{WIDTH}" height="{high + 36}" rx="8" fill="#0d1117"/>',
           f'<rect class="p" x="{apart}" y="38" width="{WIDTH - 2 * apart}" height="2"/>',  # how far the passes are
           f'<text class="s" x="{apart}" y="29">{escape(heading)}</text>',
           f'<text class="s d" x="{apart}" y="{high + 24}">{passes} passes. Grey is still masked, amber was just '
           f'committed. ⏎ ends a line, · the text.</text>']
    for i, (panel, tokens) in enumerate(zip(panels, laid, strict=True)):
        x = apart + i * (wide + apart)
        out.append(f'<rect x="{x:.1f}" y="44" width="{wide:.1f}" height="{high - 44}" rx="6" fill="#161b22"/>'
                   f'<text class="s d" x="{x + 12:.1f}" y="68">{escape(panel.title)}</text>'
                   f'<text class="s t t{passes - 1} {"r" if panel.right else "w"}" x="{x + 12:.1f}" y="{high - 13}">'
                   f'{escape(panel.verdict)}</text>')
        for text, number, wrong, column, row in tokens:
            left, top, long = x + 12 + column * COLUMN, 82 + row * LINE, len(text) * COLUMN
            kind = "w" if wrong else "d" if text in "⏎·" else ""
            out.append(f'<rect class="b b{number}" x="{left + 1:.1f}" y="{top}" width="{long - 2:.1f}" '
                       f'height="{LINE - 4}" rx="3"/>')
            if text.strip():
                out.append(f'<text class="t t{number} {kind}" x="{left:.1f}" y="{top + 24}" xml:space="preserve" '
                           f'textLength="{long:.1f}" lengthAdjust="spacingAndGlyphs">{escape(text)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
