"""The claims of DVQ-VAE's code, on a population atlas: 106 bundles of one average brain.

The authors train on about 120,000 chunks of many subjects for 30,000 steps; what stands here is what two cores can ask.
Their numbers are of held-out chunks whose subjects were trained on; ours of held-out streamlines.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.recipe import SOURCE, Claims, Contrast, Line, Run

STEPS, LONG = 600, 6000
"""Of the headline's runs and of the others; the source has 30,000, of eight times as many chunks."""
OURS = {"network": "set", "revive_below": 0.1}
BOTTLENECKS = ("gumbel", "ae", "vq", "vq_ema", "vae")
WANTED = "bundles as .trk, .tck or .trx files, one a bundle, as the atlas HCP-1065 has them (106 files)"


def ingest(places: Mapping[str, Path]) -> tuple[list[str], dict[str, Any]]:
    """Chunks of up to 512, so that training draws 64 of them anew; each streamline is in one split."""
    return [str(places[SOURCE])], {"rows": "chunks", "chunk": 512}


def report(places: Mapping[str, Path], out: Path) -> dict[str, Any]:
    return {}


def _runs() -> tuple[Run, ...]:
    short = {"gumbel": 2.5, "ae": 2.0, "vq": 2.0, "vq_ema": 2.0, "vae": 1.6}
    return (
        *(Run(one, {"steps": STEPS, "bottleneck": one}, short[one]) for one in BOTTLENECKS),
        *(Run(f"set {one}", {"steps": STEPS, **OURS, "bottleneck": one}, 1.5) for one in ("gumbel", "ae", "vq")),
        *(Run(f"long {one}", {"steps": LONG, "bottleneck": one}, 25.0, headline=False) for one in BOTTLENECKS),
    )


def _paper(steps: str, to: str) -> tuple[Line | Contrast, ...]:
    """The source's table of runs whose names begin with `to`."""
    order = "on 12 bundles of 12"
    ae, dvq, vq, ema, vae = (f"{to}{one}" for one in ("ae", "gumbel", "vq", "vq_ema", "vae"))
    return (
        Contrast(f"AE reconstructs better than DVQ (MSE, {steps})", order, ae, dvq, "mse", False),
        Contrast(f"DVQ better than VQ (MSE, {steps})", order, dvq, vq, "mse", False),
        Contrast(f"VQ better than VQ-EMA (MSE, {steps})", order, vq, ema, "mse", False),
        Contrast(f"VQ-EMA better than VAE (MSE, {steps})", order, ema, vae, "mse", False),
        Line(f"BUAN at 0.05: AE ({steps})", "0.9998 to 1.0000", ae, "buan", lambda value: value > 0.99),
        Line(f"... DVQ ({steps})", "0.986 to 0.999", dvq, "buan", lambda value: value > 0.98),
        Line(f"... VQ ({steps})", "0.31 to 0.72", vq, "buan", lambda value: 0.31 < value < 0.72),
        Line(f"... VQ-EMA ({steps})", "0.23 to 0.69", ema, "buan", lambda value: 0.23 < value < 0.69),
        Line(f"... VAE ({steps})", "0.23 to 0.50", vae, "buan", lambda value: 0.23 < value < 0.50),
        Contrast(f"BUAN of DVQ above VQ's ({steps})", order, dvq, vq, "buan"),
    )


def _lines() -> tuple[Line | Contrast, ...]:
    return (
        *_paper(f"{STEPS} steps", ""),
        Line("DVQ from its argmax codes alone: BUAN", "not found", "gumbel", "buan_of_codes"),
        Contrast("... what the mixture adds (MSE)", "not found", "gumbel", "gumbel", "mse", False, "mse_of_codes"),
        Contrast("... below VQ's, whose codes are all there is", "not found", "gumbel", "vq", "buan_of_codes", False),
        Line("bits of a streamline: DVQ's mixtures in float32", "not found", "gumbel", "bits"),
        Line("... codes alone", "not found", "gumbel", "bits_of_codes"),
        Line("MDF in mm: DVQ", "not found", "gumbel", "mdf_mm"),
        Line("usage of argmax codes: DVQ", "not found", "gumbel", "usage"),
        Line("... VQ", "not found", "vq", "usage"),
        Line("... VQ-EMA", "not found", "vq_ema", "usage"),
        Contrast("shifted latents bend less in DVQ than in VQ", "on one chunk", "gumbel", "vq", "shift_bending", False),
        Contrast("... than in AE", "on one chunk", "gumbel", "ae", "shift_bending", False),
        Line("bundle told by codes, 1-NN: DVQ", "not found", "gumbel", "recognised_by_codes_1nn"),
        Line("... by raw streamlines", "not found", "gumbel", "recognised_by_points_1nn"),
        *_ours(),
        *_paper(f"{LONG} steps", "long "),
    )


def _ours() -> tuple[Line | Contrast, ...]:
    """The set network, which no paper has."""
    ours = f"ours, {STEPS} steps"
    return (
        Line("BUAN of the set network: AE", ours, "set ae", "buan"),
        Line("... DVQ", ours, "set gumbel", "buan"),
        Line("... VQ with revival, whose codes are all there is", ours, "set vq", "buan"),
        Contrast("the set network reconstructs better than the grid: AE (MSE)", ours, "set ae", "ae", "mse", False),
        Contrast("... DVQ", ours, "set gumbel", "gumbel", "mse", False),
        Contrast("... VQ", ours, "set vq", "vq", "mse", False),
        Line("BUAN of DVQ's mixture told by 16 codes a position", ours, "set gumbel", "buan_of_16_codes"),
        Line("... by 256", ours, "set gumbel", "buan_of_256_codes"),
        Line("bundle told by codes, 1-NN: DVQ, set network", ours, "set gumbel", "recognised_by_codes_1nn"),
        Line("... VQ", ours, "set vq", "recognised_by_codes_1nn"),
    )


claims = Claims((), 1.0, ingest, _runs(), _lines(), report, wants=WANTED)
