"""The house style of all figures: fonts, one look for every method, and two file formats.

The colours are those of Okabe and Ito (2008), which readers with any colour vision can tell apart, with grey instead
of yellow. A method has the same colour and dashes in every figure; related methods share a colour.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zlib import crc32

from matplotlib import rc_context
from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.4,
    "savefig.dpi": 120,
    "svg.hashsalt": "fgtrain",  # the same figure is the same file
}
house_style = rc_context(STYLE)
"""A decorator of functions that draw or save figures."""

COLOURS = ("#000000", "#D55E00", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#808080")
GROUPS = (
    ("backprop", "backprop_checkpoint"),
    ("fwdgrad", "forward_exact"),
    ("fwdgrad_lowrank", "local"),
    ("activity_head", "activity"),
    ("spsa", "mezo"),
    ("gauss_newton", "second_order"),
    ("fdfa", "highway", "highway_forward"),
    ("local_guess", "forward_in_time"),
)
"""The methods of each colour: the first has solid lines, the second dashed ones, a third dash-dotted ones."""


def looks(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{method: (colour, line style)} for one figure: that of `look`, or a free one if another method has it."""
    found: dict[str, tuple[str, str]] = {}
    for method in methods:
        others = ((colour, dashes) for dashes in (":", "-.", "-", "--") for colour in COLOURS)
        found[method] = next(each for each in (look(method), *others) if each not in found.values())
    return found


def look(method: str) -> tuple[str, str]:
    """(colour, line style) of a method. A method of your own has a dotted line; its name determines the colour."""
    for colour, methods in zip(COLOURS, GROUPS, strict=True):
        if method in methods:
            return colour, ("-", "--", "-.")[methods.index(method)]
    return COLOURS[crc32(method.encode()) % len(COLOURS)], ":"


@house_style
def save(figure: Figure, path: Path) -> None:
    """Write a figure as `path`.png and `path`.svg."""
    figure.savefig(path.with_suffix(".png"))
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
