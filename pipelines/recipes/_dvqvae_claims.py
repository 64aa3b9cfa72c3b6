"""The claims of DVQ-VAE's code, on a population atlas: 106 bundles of one average brain.

The authors train on about 120,000 chunks of many subjects for 30,000 steps; what stands here is what two cores can ask.
Their numbers are of held-out chunks whose subjects were trained on; ours of held-out streamlines.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.recipe import SOURCE, Claims, Contrast, Line, Run

STEPS = 600
WANTED = "bundles as .trk, .tck or .trx files, one a bundle, as the atlas HCP-1065 has them (106 files)"


def ingest(places: Mapping[str, Path]) -> tuple[list[str], dict[str, Any]]:
    """Chunks of up to 512, so that training draws 64 of them anew; each streamline is in one split."""
    return [str(places[SOURCE])], {"rows": "chunks", "chunk": 512}


def report(places: Mapping[str, Path], out: Path) -> dict[str, Any]:
    return {}


def _run(bottleneck: str) -> Run:
    return Run(bottleneck, {"steps": STEPS, "bottleneck": bottleneck}, 2.5)


def _lines() -> tuple[Line | Contrast, ...]:
    order = "on 12 bundles of 12"
    return (
        Contrast("AE reconstructs better than DVQ (MSE)", order, "ae", "gumbel", "mse", False),
        Contrast("DVQ better than VQ", order, "gumbel", "vq", "mse", False),
        Contrast("VQ better than VQ-EMA", order, "vq", "vq_ema", "mse", False),
        Contrast("VQ-EMA better than VAE", order, "vq_ema", "vae", "mse", False),
        Line("BUAN at 0.05: AE", "0.9998 to 1.0000", "ae", "buan", lambda value: value > 0.99),
        Line("... DVQ", "0.986 to 0.999", "gumbel", "buan", lambda value: value > 0.98),
        Line("... VQ", "0.31 to 0.72", "vq", "buan"),
        Line("... VQ-EMA", "0.23 to 0.69", "vq_ema", "buan"),
        Line("... VAE", "0.23 to 0.50", "vae", "buan"),
        Contrast("BUAN of DVQ above VQ's", order, "gumbel", "vq", "buan"),
        Line("DVQ from its argmax codes alone: BUAN", "not found", "gumbel", "buan_of_codes"),
        Contrast("... what the mixture adds (MSE)", "not found", "gumbel", "gumbel", "mse", False, "mse_of_codes"),
        Contrast("... below VQ's, whose codes are all there is", "not found", "gumbel", "vq", "buan_of_codes", False),
        Line("MDF in mm: DVQ", "not found", "gumbel", "mdf_mm"),
        Line("usage of argmax codes: DVQ", "not found", "gumbel", "usage"),
        Line("... VQ", "not found", "vq", "usage"),
        Line("... VQ-EMA", "not found", "vq_ema", "usage"),
        Contrast("shifted latents bend less in DVQ than in VQ", "on one chunk", "gumbel", "vq", "shift_bending", False),
        Contrast("... than in AE", "on one chunk", "gumbel", "ae", "shift_bending", False),
        Line("bundle told by codes, 1-NN: DVQ", "not found", "gumbel", "recognised_by_codes_1nn"),
        Line("... by raw streamlines", "not found", "gumbel", "recognised_by_points_1nn"),
    )


RUNS = tuple(_run(one) for one in ("gumbel", "ae", "vq", "vq_ema", "vae"))
claims = Claims((), 1.0, ingest, RUNS, _lines(), report, wants=WANTED)
