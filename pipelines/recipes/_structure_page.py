"""From the numbers of a report on structure tokens to its page."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.recipes import _structure_charts as charts
from pipelines.recipes._concept_page import table
from pipelines.recipes._structure_charts import METHODS, section, shown

Found = Mapping[str, Any]


def page_of(report: Found, others: Sequence[Found]) -> str:
    """The whole page of `structure.json`'s content, with the numbers of other reports beside."""
    use, told = report["use"]["efficiency"], report["metrics"]
    facts = {
        "codes in use": f"{use['usage']:.1%} of {use['codes']:,.0f}",
        "perplexity": f"{use['perplexity']:,.1f}",
        "residues": f"{use['residues']:,.0f}",
        "chains": f"{report['use']['chains']:,}",
        "split": str(report["split"]),
    }
    if "sensitivity_codes_spearman_raw" in told:
        facts["sensitivity (Spearman)"] = shown(told["sensitivity_codes_spearman_raw"])
    if "rmsd_codes" in told:
        facts["backbone RMSD"] = f"{told['rmsd_codes']:.2f} Å"
    about = f"{report['what']}; bundle {report['bundle'][:12]}, shards {report['shards'][:12]}."
    if report["rows_without_tokens"]:
        about += f" {report['rows_without_tokens']:,} rows of the shards have no tokens and are in no number."
    if report["use"]["residues_without_code"]:
        about += f" {report['use']['residues_without_code']:,} residues have no code: their atoms make no frame."
    sections = [_beside(report, others), _efficiency(report), _distinctiveness(report), _sensitivity(report)]
    return charts.page("Structure tokens", about, facts, [*sections, _effectiveness(report), _reconstruction(report)])


def _beside(report: Found, others: Sequence[Found]) -> str:
    names = [str(one["what"]) for one in (report, *others)]
    text = "Larger is better, but for rmsd, cosine_* (more alike codes) and what is only a count."
    return section("At a glance", text, charts.beside(names, [one["metrics"] for one in (report, *others)]))


def _efficiency(report: Found) -> str:
    text = (
        "How codes are used, from counts pooled over all residues of the split. With equal use the curve would be flat"
        " and the perplexity the number of codes."
    )
    return section("Efficiency", text, charts.curve(report["use"]["shares"], "share of residues a code, largest first"))


def _distinctiveness(report: Found) -> str:
    found = {name: one for name, one in report["use"]["distinctiveness"].items() if one is not None}
    rows = [
        [name, shown(one["mean_absolute"]), shown(one["mean"]), shown(one["deviation"])]
        + [shown(value, 2) for value in one["quantiles"].values()]
        for name, one in found.items()
    ]
    text = (
        "Cosines of pairs of different codes; `used` weighs a pair by how often both occur. Nearer to 0: more distinct."
    )
    if not found:
        return section("Distinctiveness", "There is one code only, so there are no pairs.")
    columns = [
        "pairs",
        "mean |cos|",
        "mean",
        "deviation",
        *(f"{float(q):.0%}" for q in next(iter(found.values()))["quantiles"]),
    ]
    drawn = charts.histogram(
        {name: one["histogram"] for name, one in found.items()}, (-1.0, 1.0), "cosine of two codes, share of pairs"
    )
    return section("Distinctiveness", text, drawn, table("Cosines", columns, rows))


def _sensitivity(report: Found) -> str:
    found = report["sensitivity"]
    if "skipped" in found:
        return section("Sensitivity", f"Not measured: {found['skipped']}")
    text = (
        f"{found['pairs']:,} pairs of conformations of {found['found']:,}: does the alignment score of two token"
        " strings follow the TM-score of the structures?"
    )
    if found["left_out"]:
        text += f" {len(found['left_out'])} pairs were too short for TM-align or took too long."
    if found["not_there"]:
        text += f" {found['not_there']} listed pairs are not among the chains."
    columns = ["vectors", "Pearson", "Spearman", "Pearson, normalised", "Spearman, normalised"]
    order = ("pearson_raw", "spearman_raw", "pearson_normalised", "spearman_normalised")
    rows = [
        [METHODS.get(name, name), *(shown(one[key]) for key in order)] for name, one in found["correlations"].items()
    ]
    dots = [(one["tm"], one["codes"]["normalised"], one["pair"]) for one in found["each"]]
    drawn = charts.scatter(dots, "TM-score (across) and normalised alignment score of codes (up)") if dots else ""
    return section("Sensitivity", text, drawn, table("Correlation with the TM-score", columns, rows))


def _effectiveness(report: Found) -> str:
    found = report["effectiveness"]
    if "skipped" in found:
        return section("Effectiveness", f"Not measured: {found['skipped']}")
    rows, groups, said = [], [], []
    for task in found["tasks"]:
        if "skipped" in task:
            said.append(f"{task['name']} was skipped: {task['skipped']}")
            continue
        said += [f"{task['name']}: {note}" for note in task["notes"]]
        for test, part in task["tests"].items():
            scores = {name: answer["score"] for name, answer in part["scores"].items()}
            groups.append((f"{task['name']}, {test}", scores))
            counts = [f"{part[name]:,}" for name in ("train", "valid", "test")]
            rows.append([task["name"], test, task["metric"], *counts, *(shown(scores.get(name)) for name in METHODS)])
    text = (
        "What a frozen probe reads from tokens; the same probe on latents is the upper bound, on clusters of backbone"
        " dihedrals the plain alternative. Metrics are pooled over all examples of the test. " + " ".join(said)
    )
    if not rows:
        return section("Effectiveness", text)
    columns = ["task", "test", "metric", "train", "valid", "test", *METHODS.values()]
    return section("Effectiveness", text, charts.bars(groups, "score of each answer"), table("Tasks", columns, rows))


def _reconstruction(report: Found) -> str:
    found = report["reconstruction"]
    if "skipped" in found:
        return section("Reconstruction", f"Not measured: {found['skipped']}")
    text = (
        "Backbone RMSD after superposition and CA-lDDT. Unquantized is the same decoder on the latents; the mean"
        " structure averages train backbones by position, in the frame of their first residue."
    )
    columns = ["from", "chains", "RMSD (Å)", "median", "CA-lDDT", "median", "not finite"]
    rows = [
        [
            name, f"{one['chains']:,}", shown(one["rmsd"], 2), shown(one["rmsd_median"], 2), shown(one["lddt"]),
            shown(one["lddt_median"]), str(one["not_finite"]),
        ]
        for name, one in found["scores"].items()
    ]  # fmt: skip
    return section("Reconstruction", text, table("Backbones", columns, rows))
