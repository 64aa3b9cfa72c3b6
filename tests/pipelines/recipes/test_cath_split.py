"""The laws of the CATH split: what a test asks for is not in train."""

import numpy as np
import pytest

from pipelines.errors import Refused
from pipelines.recipes._cath_split import codes_for, divide, read_cath


def made(folds: int = 6, superfamilies: int = 5, proteins: int = 10) -> tuple[list[tuple[str, str]], list[str]]:
    """Every fold has superfamilies 1 to 5, so that bare numbers would merge them; each protein has two chains."""
    places, codes = [], []
    for fold in range(folds):
        for family in range(1, superfamilies + 1):
            for protein in range(proteins):
                for chain in "AB":
                    places.append((f"f{fold}h{family}p{protein}.pdb", chain))
                    codes.append(f"3.40.{fold + 1}.{family}")
    return places, codes


def test_no_superfamily_of_the_fold_test_is_in_train():
    places, codes = made()
    division = divide(places, codes, seed=42)
    valid, test = division.tests["fold"]
    held, trained = {codes[n] for n in (*valid, *test)}, {codes[n] for n in division.train}
    assert not held & trained
    # 40 % of 5 superfamilies of each fold, whole.
    assert len(held) == 6 * 2
    assert len(valid) + len(test) == 6 * 2 * 10 * 2
    assert {code.rpartition(".")[0] for code in held} <= {code.rpartition(".")[0] for code in trained}


def test_the_superfamily_test_has_proteins_that_train_has_not_of_superfamilies_that_it_has():
    places, codes = made()
    division = divide(places, codes, seed=42)
    valid, test = division.tests["superfamily"]
    assert {codes[n] for n in (*valid, *test)} <= {codes[n] for n in division.train}
    assert not {places[n][0] for n in (*valid, *test)} & {places[n][0] for n in division.train}
    assert len(valid) + len(test) == 6 * 3 * 2 * 2


def test_parts_are_disjoint_whole_and_a_fifth_of_each_test_is_valid():
    places, codes = made()
    division = divide(places, codes, seed=42)
    parts = [division.train, *(part for pair in division.tests.values() for part in pair)]
    assert sorted(index for part in parts for index in part) == list(range(len(places)))
    for valid, test in division.tests.values():
        share = len(valid) / (len(valid) + len(test))
        assert 0.19 < share <= 0.2
    for part in parts:
        for name in {places[n][0] for n in part}:
            assert {places.index((name, "A")), places.index((name, "B"))} <= set(part)


def test_a_fold_with_too_few_superfamilies_is_trained_on():
    places, codes = made(folds=3, superfamilies=2)
    assert divide(places, codes, seed=42).tests["fold"] == ([], [])
    places, codes = made(folds=3, superfamilies=3)
    assert divide(places, codes, seed=42).tests["fold"] != ([], [])


def test_folds_and_superfamilies_that_share_numbers_are_not_merged():
    # Two superfamilies a fold, so nothing is held out whole, though there are six different H and three different T.
    places = [(f"f{fold}h{family}.pdb", "A") for fold in range(6) for family in range(2)]
    codes = [f"{fold}.40.{fold % 3}.{fold % 3 + 3 * family}" for fold in range(6) for family in range(2)]
    division = divide(places, codes, seed=42)
    assert division.train == list(range(12))


def test_other_shares_hold_out_more():
    places, codes = made(superfamilies=4)
    division = divide(places, codes, seed=42, shares=(0.5, 0.2, 0.4))
    valid, test = division.tests["fold"]
    assert len({codes[n] for n in (*valid, *test)}) == 6 * 2
    assert len(valid) == pytest.approx(0.4 * (len(valid) + len(test)))


def test_the_same_seed_splits_alike_in_any_order_and_another_does_not():
    places, codes = made()
    order = np.random.default_rng(0).permutation(len(places))
    first = divide(places, codes, seed=42)
    again = divide([places[n] for n in order], [codes[n] for n in order], seed=42)
    assert sorted(order[again.train]) == first.train
    assert sorted(order[again.tests["fold"][1]]) == first.tests["fold"][1]
    assert divide(places, codes, seed=1).train != first.train


def test_chains_without_a_code_or_with_two_superfamilies_are_in_no_part(tmp_path):
    table = tmp_path / "cath.csv"
    table.write_text("file,chain,code\n1abc,A,1.10.8.10\nx/1abc.pdb.gz,B,1.10.8.20\n2xyz,A,1.2.3.4\n2xyz,A,1.2.3.5\n")
    places = [("x/1abc.pdb.gz", "A"), ("x/1abc.pdb.gz", "B"), ("2xyz.pdb", "A"), ("3.pdb", "A")]
    codes = codes_for(places, read_cath(str(table)))
    assert codes == ["1.10.8.10", "1.10.8.20", None, None]
    assert divide(places, codes, seed=0).train == [0, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,chain,code\na,A,720\n", "'720'; give all of C.A.T.H"),
        ("file,chain\na,A\n", "it needs code"),
        ("", "no rows"),
    ],
)
def test_tables_of_another_form_are_refused(tmp_path, text, said):
    (tmp_path / "cath.csv").write_text(text)
    with pytest.raises(Refused, match=said):
        read_cath(str(tmp_path / "cath.csv"))
    with pytest.raises(Refused, match="does not exist"):
        read_cath(str(tmp_path / "gone.csv"))
