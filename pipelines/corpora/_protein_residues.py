"""The vocabulary of residue types, and which of a file's residue names belong to it."""

from functools import cache

RESIDUES = (
    "ALA", "ARG", "ASN", "ASP", "CYS", "GLN", "GLU", "GLY", "HIS", "ILE", "LEU", "LYS", "MET", "PHE", "PRO", "SER",
    "THR", "TRP", "TYR", "VAL", "UNK",
)  # fmt: skip
"""Type 0 to 20, by name as AlphaFold and OpenFold have them."""
LETTERS = "ARNDCQEGHILKMFPSTWYVX"
UNKNOWN = 20
"""An amino acid that is none of the twenty and has no single one of them as its parent (selenocysteine, D-alanine)."""
UNHEARD = 21
"""No dictionary has the name; under an ATOM record it is an amino acid if it has the atoms of one."""

# Protonation states as force fields name them. The component dictionary has other molecules under some of these names
# (HSE: homoserine), but those are no ATOM records.
FORCE_FIELD = {
    "HID": "HIS", "HIE": "HIS", "HIP": "HIS", "HSD": "HIS", "HSE": "HIS", "HSP": "HIS",
    "CYX": "CYS", "CYM": "CYS", "ASH": "ASP", "GLH": "GLU", "LYN": "LYS",
}  # fmt: skip
NUMBER = {name: place for place, name in enumerate(RESIDUES)}


@cache
def residue_type(name: str, hetero: bool) -> int | None:
    """Number of a residue name; None where it is no amino acid (water, ion, ligand, nucleotide, cap).

    Modified residues count as their parent (MSE as MET, SEP as SER) where the component dictionary names one.
    """
    if name in NUMBER:
        return NUMBER[name]
    if not hetero and name in FORCE_FIELD:
        return NUMBER[FORCE_FIELD[name]]
    from biotite.structure import info

    if name not in _amino_acids():
        return UNHEARD if not hetero and info.link_type(name) is None else None
    parent = info.get_from_ccd("chem_comp", name, "mon_nstd_parent_comp_id")
    return NUMBER.get(parent.as_item(), UNKNOWN) if parent is not None else UNKNOWN


@cache
def _amino_acids() -> frozenset[str]:
    from biotite.structure import info

    return frozenset(info.amino_acid_names())
