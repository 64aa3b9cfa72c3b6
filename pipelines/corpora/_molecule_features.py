"""A molecule as a graph: the features of Hu et al. (2020), "Strategies for pre-training GNNs" (arXiv 1905.12265)."""

from collections.abc import Callable
from functools import cache as once
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int8, Int16, Int32

from pipelines.errors import Refused

ATOM_TYPES = 118
"""Index = atomic number - 1. Their embedding has 120 rows: one of the two others marks a masked atom."""
CHIRALITIES = ("CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW")
BONDS = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")
"""Their embedding has 6 rows: a self loop is 4, a masked bond 5. Both are put in by the network."""
DIRECTIONS = ("NONE", "ENDUPRIGHT", "ENDDOWNRIGHT")
MOST_SMILES = 10_000
MOST_SDF = 1 << 20
"""Characters. Longer text is no molecule, and RDKit may take minutes for it."""

Molecule = Any


class UnreadableMolecule(ValueError):
    """Why one record cannot become a row, in few different words: they are counted."""


class Graph(NamedTuple):
    nodes: Int16[np.ndarray, "A 2"]
    """Atom type and chirality."""
    edges: Int32[np.ndarray, "E 2"]
    """From, to. Each bond is two edges, one behind the other, in the order of the bonds."""
    edge_features: Int8[np.ndarray, "E 2"]
    """Bond type and direction, the same both ways."""


@once
def chemistry() -> Any:
    """rdkit.Chem.

    Raises:
        Refused: RDKit is not installed.
    """
    try:
        from rdkit import Chem
    except ImportError:
        raise Refused("molecules are read with RDKit: pip install 'vqray[molecules]'") from None
    return Chem


def quietly() -> Any:
    """A context in which RDKit writes nothing: what it cannot read is reported by us."""
    chemistry()
    from rdkit import rdBase

    return rdBase.BlockLogs()


def from_smiles(text: str) -> Molecule:
    """One molecule, hydrogens implicit.

    Raises:
        UnreadableMolecule: with the reason.
    """
    if not text.strip():
        raise UnreadableMolecule("the SMILES is empty")
    if len(text) > MOST_SMILES:
        raise UnreadableMolecule(f"the SMILES has more than {MOST_SMILES:,} characters")
    chem = chemistry()
    molecule = chem.MolFromSmiles(text)
    if molecule is None:
        raise UnreadableMolecule(_why_none(lambda: chem.MolFromSmiles(text, sanitize=False), "SMILES"))
    return molecule


def from_sdf(record: str) -> Molecule:
    """The molecule of one SDF record, hydrogens implicit; its properties are read with `GetProp`.

    Raises:
        UnreadableMolecule: with the reason.
    """
    if len(record) > MOST_SDF:
        raise UnreadableMolecule(f"the SDF record has more than {MOST_SDF:,} characters")
    supplier = chemistry().SDMolSupplier()

    def first(**options: bool) -> Molecule:
        supplier.SetData(record, **options)
        return next(iter(supplier), None)

    molecule = first()
    if molecule is None:
        raise UnreadableMolecule(_why_none(lambda: first(sanitize=False, removeHs=False), "SDF record"))
    return molecule


def graph(molecule: Molecule) -> Graph:
    """
    Raises:
        UnreadableMolecule: no atom, or an atom or a bond that has no feature.
    """
    tags, bonds, directions = _numbers()
    try:
        nodes = [(atom.GetAtomicNum() - 1, tags[atom.GetChiralTag()]) for atom in molecule.GetAtoms()]
        edges, features = [], []
        for bond in molecule.GetBonds():
            begin, end = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
            edges += [(begin, end), (end, begin)]
            features += [(bonds[bond.GetBondType()], directions[bond.GetBondDir()])] * 2
    except KeyError as unknown:
        raise UnreadableMolecule(f"no feature of Hu et al. stands for {unknown.args[0]}") from None
    if not nodes:
        raise UnreadableMolecule("it has no atoms")
    if min(kind for kind, _ in nodes) < 0:
        raise UnreadableMolecule("it has an atom of no element (*)")
    return Graph(
        np.array(nodes, np.int16),
        np.array(edges, np.int32).reshape(-1, 2),
        np.array(features, np.int8).reshape(-1, 2),
    )


def largest_fragment(molecule: Molecule) -> Molecule:
    """Of several that are not connected, the one of most atoms; of equal ones the first."""
    return max(chemistry().GetMolFrags(molecule, asMols=True), key=lambda one: one.GetNumAtoms(), default=molecule)


def canonical(molecule: Molecule) -> str:
    return str(chemistry().MolToSmiles(molecule))


def scaffold(molecule: Molecule, chirality: bool) -> str:
    """The Bemis-Murcko scaffold as SMILES; "" of a molecule without rings.

    Raises:
        UnreadableMolecule: RDKit cannot make it.
    """
    from rdkit.Chem.Scaffolds import MurckoScaffold

    try:
        return str(MurckoScaffold.MurckoScaffoldSmiles(mol=molecule, includeChirality=chirality))
    except (ValueError, RuntimeError):
        raise UnreadableMolecule("RDKit cannot make its Murcko scaffold") from None


def to_sdf(graph: Graph) -> str:
    """One SDF record of a graph, laid out in the plane. Charges are no features, so valences are not checked.

    Raises:
        UnreadableMolecule: an index that stands for no atom or bond.
    """
    chem = chemistry()
    from rdkit.Chem import rdDepictor

    molecule = chem.RWMol()
    try:
        for kind, chirality in graph.nodes.tolist():
            atom = chem.Atom(kind + 1)
            atom.SetChiralTag(getattr(chem.ChiralType, CHIRALITIES[chirality]))
            atom.SetNoImplicit(True)
            molecule.AddAtom(atom)
        for (begin, end), (kind, _) in zip(graph.edges[::2].tolist(), graph.edge_features[::2].tolist(), strict=True):
            molecule.AddBond(begin, end, getattr(chem.BondType, BONDS[kind]))
    except (IndexError, RuntimeError, ValueError, OverflowError):
        raise UnreadableMolecule("an index in the graph stands for no atom or bond") from None
    rdDepictor.Compute2DCoords(molecule)
    return str(chem.MolToMolBlock(molecule, kekulize=False)) + "$$$$\n"


@once
def _numbers() -> tuple[dict[Any, int], dict[Any, int], dict[Any, int]]:
    chem = chemistry()
    tags = {getattr(chem.ChiralType, name): number for number, name in enumerate(CHIRALITIES)}
    bonds = {getattr(chem.BondType, name): number for number, name in enumerate(BONDS)}
    # Since 2022 RDKit makes some bonds to metals dative that were written, and read before, as single ones.
    bonds[chem.BondType.DATIVE] = bonds[chem.BondType.SINGLE]
    directions = {getattr(chem.BondDir, name): number for number, name in enumerate(DIRECTIONS)}
    return tags, bonds, directions


def _why_none(parse: Callable[[], Molecule], what: str) -> str:
    """What stopped RDKit: the text itself, or the chemistry in it."""
    chem = chemistry()
    molecule = parse()
    if molecule is None:
        return f"RDKit cannot parse the {what}"
    try:
        chem.SanitizeMol(molecule)
    except chem.AtomValenceException:
        return "an atom has more bonds than its valence allows"
    except chem.KekulizeException:
        return "its aromatic bonds cannot be kekulized"
    except (chem.MolSanitizeException, ValueError, RuntimeError):
        pass
    return f"RDKit cannot sanitize the {what}"
