"""The claims of AminoAseed's paper, on a hundredth of its chains: docking complexes, bound and unbound.

The paper trains on 48,000 chains with K = 512 and D = 1024; what stands here is what two cores can ask about it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.recipe import SOURCE, Claims, Contrast, Line, Run

STEPS = 400
WANTED = (
    "docking complexes, a folder each, as the protein docking benchmark 5.5 has them: `1A2K/1A2K_r_u.pdb.gz` and `_l_u`"
    " unbound, `_r_b-matched` and `_l_b-matched` bound, and interface_contacts_5A.txt"
)


def ingest(places: Mapping[str, Path]) -> tuple[list[str], dict[str, Any]]:
    """Chains of 20 residues and more; a complex lies in one split."""
    return [str(places[SOURCE])], {"group": "folder", "contacts": "interface_contacts_5A.txt"}


def report(places: Mapping[str, Path], out: Path) -> dict[str, Any]:
    return {"pair_suffixes": ["_u", "_b-matched"], "steps": 150, "rates": [1e-2, 1e-3]}


def _runs() -> tuple[Run, ...]:
    main = {"steps": STEPS}
    return (
        Run("reparameterized", main, 3.5),
        Run("plain", {**main, "quantizer": "plain"}, 3.5),
        Run("random basis", {**main, "start": "random"}, 3.5, headline=False),
        Run("reparameterized 4096", {**main, "num_codes": 4096}, 4.0, headline=False),
        Run("plain 4096", {**main, "num_codes": 4096, "quantizer": "plain"}, 4.0, headline=False),
    )


def _lines() -> tuple[Line | Contrast, ...]:
    ours, plain, unsaid = "reparameterized", "plain", "not found"
    alike, sites = "sensitivity_codes_spearman_normalised", "contact_test_auroc_codes"
    return (
        Contrast("larger usage than VanillaVQ, K = 512", "yes", ours, plain, "usage"),
        Contrast("higher perplexity than VanillaVQ", "yes", ours, plain, "perplexity"),
        Contrast("codes less alike than VanillaVQ's (mean |cosine|)", unsaid, ours, plain, "cosine_all", False),
        Contrast("sensitivity: conformations told apart better", "+12.8 % over ESM3", ours, plain, alike),
        Line("... Spearman against TM-score", unsaid, ours, alike),
        Line("... of vectors before the quantizer", unsaid, ours, "sensitivity_latents_spearman_normalised"),
        Contrast("interface residues: higher AUROC", "+4.6 against -1.4 % of ESM3", ours, plain, sites),
        Line("... of AminoAseed's codes", "0.724 over functional sites", ours, sites),
        Line("... of VanillaVQ's", "0.683", plain, sites),
        Line("... of vectors before the quantizer", "above", ours, "contact_test_auroc_latents"),
        Line("... of k-means of dihedrals", unsaid, ours, "contact_test_auroc_dihedrals"),
        Line("B-factors, Spearman", "worse than ESM3", ours, "b_factors_test_spearman_codes"),
        Contrast("... than VanillaVQ's", unsaid, ours, plain, "b_factors_test_spearman_codes"),
        Line("RMSD of test chains, Angstrom", unsaid, ours, "rmsd_codes"),
        Contrast(
            "... smaller than of the mean structure", unsaid, ours, ours, "rmsd_codes", False, "rmsd_mean_structure"
        ),
        Contrast("... than VanillaVQ's", unsaid, ours, plain, "rmsd_codes", False),
        Line("CA-lDDT", unsaid, ours, "lddt_codes"),
        Contrast("basis from data: larger usage than random", "told both ways", ours, "random basis", "usage"),
        Contrast("larger usage than VanillaVQ, K = 4096", "+124 % over ESM3", f"{ours} 4096", f"{plain} 4096", "usage"),
    )


claims = Claims((), 2.0, ingest, _runs(), _lines(), report, wants=WANTED)
