"""The roofline: what each provider reached, under the roofs measured in the same process.

x: least operations per least byte of the case (floors.py); y: those operations per second of the
measured time. The roofs are the copy bandwidth and the fastest bare GEMM. Jobs without
floating-point work (packing, planning) have no place on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_engine.bench.rows import FORWARD, OK, Row

FORMATS = ("png", "svg")
MARKERS = "osD^vP*X<>hp"


def write_roofline(result: dict[str, Any], rows: list[Row], stem: Path) -> list[Path] | str:
    """The files written, or in one line why there are none."""
    points = [row for row in rows if row.status == OK and row.ms and row.flops and row.bytes]
    if not points:
        return "no roofline: nothing with floating-point work was timed"
    roofs = result["copy_gb_per_s"], result["gemm_tflops"]
    if None in roofs:
        return "no roofline: it needs a timed case with a head, for the GEMM roof"
    try:
        import matplotlib
    except ImportError:
        return "no roofline: matplotlib is not installed (pip install 'grpo-engine[bench]')"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 7.5), layout="constrained")
    _roofs(axes, points, *roofs)
    _points(axes, points)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("least FLOP per least byte of the case")
    axes.set_ylabel("TFLOP/s of the least work")
    axes.set_title(f"{result['hardware']}\n{result['code']}, {result['date'][:10]}", fontsize=10)
    axes.grid(True, which="both", alpha=0.2)
    written = []
    for suffix in FORMATS:
        path = stem.with_name(f"{stem.name}.{suffix}")
        figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
        written.append(path)
    pyplot.close(figure)
    return written


def _roofs(axes, points: list[Row], gb_per_s: float, tflops: float) -> None:
    intensities = [row.flops / row.bytes for row in points]
    ridge = 1e3 * tflops / gb_per_s
    low, high = min(*intensities, ridge) / 4, max(*intensities, ridge) * 4
    at = [low, ridge, high]
    axes.plot(at, [x * gb_per_s / 1e3 if x < ridge else tflops for x in at], color="black", lw=1.2)
    about = {"textcoords": "offset points", "fontsize": 8}
    axes.annotate(f"copy {gb_per_s:.0f} GB/s", (low, low * gb_per_s / 1e3), xytext=(12, 0), **about)
    axes.annotate(
        f"bare GEMM {tflops:.3g} TFLOP/s", (high, tflops), xytext=(0, 5), ha="right", **about
    )


def _points(axes, points: list[Row]) -> None:
    """One colour a provider, one marker a case; hollow: forward alone; large: ours."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    palette = colormaps["tab20"].colors
    providers = dict.fromkeys(row.provider for row in points)
    cases = dict.fromkeys(row.case.name for row in points)
    colours = {name: palette[i % len(palette)] for i, name in enumerate(providers)}
    markers = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(cases)}
    for row in points:
        colour = colours[row.provider]
        axes.scatter(
            row.flops / row.bytes,
            row.flops / row.ms.median / 1e9,
            marker=markers[row.case.name],
            edgecolors=[colour],
            facecolors="none" if row.passes == FORWARD else [colour],
            s=60 if row.ours else 25,
        )
    dots = [Line2D([], [], ls="", marker="o", color=c, label=n) for n, c in colours.items()]
    shapes = [Line2D([], [], ls="", marker=m, color="grey", label=n) for n, m in markers.items()]
    style = {"fontsize": 7, "frameon": False, "alignment": "left", "title_fontsize": 8}
    figure = axes.figure
    figure.legend(handles=dots, title="provider (large: ours)", loc="outside right upper", **style)
    title = "case (hollow: forward alone)"
    figure.legend(handles=shapes, title=title, loc="outside lower left", ncols=2, **style)
