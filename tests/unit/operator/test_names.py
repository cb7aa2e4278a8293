"""Model names: who has one keeps it; of those that want a free one the first gets it."""

from hypothesis import given
from hypothesis import strategies as st

from pointsman_operator.names import Claim, settle
from pointsman_operator.observed import Key

A, B, C = (Key("default", name) for name in "abc")
MODELS = ["m", "n", "o", "p"]


def test_the_first_gets_a_free_name():
    names = settle([Claim(A, wanted=("m",)), Claim(B, wanted=("m", "n")), Claim(C, wanted=("n",))])
    assert names.granted == {A, C}
    assert names.kept == set()
    assert names.owners == {"m": A, "n": C}


def test_who_has_a_name_keeps_it():
    names = settle([Claim(A, wanted=("m",)), Claim(B, in_force=("m",), wanted=("m", "n"))])
    assert names.granted == {B}
    assert names.owners == {"m": B, "n": B}


def test_a_chain_moves_up_in_any_order():
    chain = [
        Claim(A, in_force=("m",), wanted=("n",)),
        Claim(B, in_force=("n",), wanted=("o",)),
        Claim(C, in_force=("o",), wanted=("p",)),
    ]
    for claims in (chain, chain[::-1]):
        assert settle(claims).granted == {A, B, C}


def test_two_that_want_each_other_s_name_both_stay():
    """One after the other as the API server tells of them, neither could move either."""
    swap = [Claim(A, in_force=("m",), wanted=("n",)), Claim(B, in_force=("n",), wanted=("m",))]
    assert settle(swap).kept == {A, B}


@st.composite
def claims(draw):
    """Any wishes, and names in force that nobody else has."""
    owners = draw(st.lists(st.sampled_from([None, A, B, C]), min_size=4, max_size=4))
    found = []
    for key in draw(st.permutations([A, B, C])):
        in_force = tuple(m for m, owner in zip(MODELS, owners, strict=True) if owner == key)
        wishes = st.lists(st.sampled_from(MODELS), min_size=1, unique=True).map(tuple)
        found.append(Claim(key, in_force, draw(st.none() | wishes)))
    return found


@given(found=claims())
def test_nobody_loses_what_is_in_force_and_a_second_look_changes_nothing(found):
    names = settle(found)
    in_force = {}
    for claim in found:
        if claim.policy in names.granted:
            in_force[claim.policy] = claim.wanted
        else:
            assert (claim.policy in names.kept) == bool(claim.in_force)
            in_force[claim.policy] = claim.in_force
            if claim.wanted is not None:
                assert any(names.owners.get(m, claim.policy) != claim.policy for m in claim.wanted)
    everything = [name for held in in_force.values() for name in held]
    assert len(everything) == len(set(everything))
    assert settle([Claim(c.policy, in_force[c.policy], c.wanted) for c in found]) == names
