"""The page of a report on bundles: one HTML file with its pictures inside."""

import base64
import io
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from pipelines.recipes import _structure_charts as charts
from pipelines.recipes._concept_page import table

Found = Mapping[str, Any]


def page_of(report: Found, picture: Figure) -> str:
    """The whole page of `bundles.json`'s content."""
    told = report["metrics"]
    facts = {
        "BUAN": f"{told['buan']:.3f}",
        "MDF": f"{told['mdf_mm']:.2f} mm",
        "chunks": f"{report['bundles'][-1]['chunks']:,}",
        "streamlines": f"{report['bundles'][-1]['streamlines']:,}",
        "split": str(report["split"]),
    }
    about = f"{report['what']}; bundle {report['bundle'][:12]}, shards {report['shards'][:12]}."
    sections = [
        _views(picture),
        _bundles(report),
        *_rate(report),
        _recognition(report),
        _synthesis(report),
        _shift(report),
    ]
    return charts.page("Bundles", about, facts, sections)


def _views(picture: Figure) -> str:
    held = io.BytesIO()
    picture.savefig(held, format="png")
    data = base64.b64encode(held.getvalue()).decode()
    source = f"data:image/png;base64,{data}"
    shown = f'<figure><img alt="bundles from three sides" src="{source}" style="max-width:100%"></figure>'
    text = (
        "The largest chunks, each above what became of it. Colours are directions: red right, green forward, blue up."
    )
    return charts.section("Before and after", text, shown)


def _bundles(report: Found) -> str:
    columns = ["bundle", "chunks", "streamlines", "BUAN", "±", "MDF (mm)", "RMSE (mm)"]
    coded = "buan_of_codes" in report["bundles"][-1]
    columns += ["BUAN, codes alone", "MDF (mm), codes alone"] if coded else []
    rows = []
    for one in sorted(report["bundles"], key=lambda row: (row["bundle"] != "all", row["buan"])):
        row = [one["bundle"], f"{one['chunks']:,}", f"{one['streamlines']:,}", charts.shown(one["buan"])]
        row += [charts.shown(one["buan_deviation"]), charts.shown(one["mdf_mm"], 2), charts.shown(one["rmse_mm"], 2)]
        row += [charts.shown(one["buan_of_codes"]), charts.shown(one["mdf_mm_of_codes"], 2)] if coded else []
        rows.append(row)
    text = "Worst first. BUAN at 0.05 of coordinates scaled to -1 to 1. Codes alone: decoded from one code a position."
    return charts.section("Bundles", text, table("Means over chunks", columns, rows))


def _rate(report: Found) -> list[str]:
    if not report["rate"]:
        return []
    rows = [
        [f"{one['draws']:,}", f"{one['bits']:,.0f}", charts.shown(one["buan"]), charts.shown(one["mdf_mm"], 2)]
        for one in report["rate"]
    ]
    text = (
        "The decoder is given a mean of all codes by their shares. Here it is given the mean of so many codes, those by"
        " which the shares are told best: one is the nearest code alone."
    )
    columns = ["codes a position", "bits a streamline", "BUAN", "MDF (mm)"]
    return [charts.section("What a mixture costs", text, table("By how many codes are kept", columns, rows))]


def _recognition(report: Found) -> str:
    found = report["recognition"]
    rows = [[name, charts.shown(value)] for name, value in found["accuracy"].items()]
    text = f"Share of {found['chunks']:,} chunks whose bundle is told, by what is learned from train chunks."
    return charts.section("Recognition", text, table("Accuracy", ["by", "accuracy"], rows))


def _synthesis(report: Found) -> str:
    rows = [
        [name, f"{one['chunks']:,}", *(charts.shown(one[key]) for key in ("buan", "length_off", "bending_off"))]
        for name, one in report["synthesis"].items()
    ]
    text = (
        "Chunks that nobody measured: halfway between one of this split and one of train, and of codes drawn from the"
        " bundle's. Lengths and bending are told as how far they are from the bundle's, as a share of it."
    )
    return charts.section(
        "Synthesis", text, table("New chunks", ["chunks", "count", "BUAN", "length", "bending"], rows)
    )


def _shift(report: Found) -> str:
    rows = [
        [f"{one['alpha']:+.2f}", *(charts.shown(one[key], 4) for key in ("moved", "bending"))]
        for one in report["shift"]
    ]
    text = "Every number the decoder is given, moved by alpha / 2: how far points move, and how much streamlines bend."
    return charts.section("Shifted latents", text, table("In scaled coordinates", ["alpha", "moved", "bending"], rows))
