"""Equivalence classes of formats."""

from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantdet.metrics import classes

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=40)
MEMBERS = ["fp8", "awq", "gptq", "ct", "nf4", "bf16"]


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[str], list[tuple[str, str]]]:
    members = draw(st.permutations(MEMBERS))
    pairs = st.tuples(st.sampled_from(MEMBERS), st.sampled_from(MEMBERS))
    return members, draw(st.lists(pairs, max_size=10))


def reached(start: str, pairs: list[tuple[str, str]]) -> set[str]:
    """Members that a chain of pairs joins to `start`, by plain search."""
    seen = {start}
    while grown := {n for pair in pairs if seen & set(pair) for n in pair} - seen:
        seen |= grown
    return seen


class TestEquivalenceClasses:
    def test_classes_keep_the_order_of_members(self) -> None:
        """Classes come by their first member and members in the given order, whatever the order of the pairs."""
        assert [("a", "d"), ("b", "c", "e")] == classes.equivalence_classes(
            ["a", "b", "c", "d", "e"], iter([("e", "c"), ("d", "a"), ("c", "b")])
        )

    def test_without_pairs_everybody_is_alone(self) -> None:
        """Nothing identical: one class a member; no members: no class."""
        assert [("b",), ("a",)] == classes.equivalence_classes(["b", "a"], [("a", "a")])
        assert [] == classes.equivalence_classes([], [])

    @repeatable
    @given(graphs())
    def test_is_the_partition_into_connected_members(self, graph: tuple[list[str], list[tuple[str, str]]]) -> None:
        """Every member is in exactly one class, together with those that a chain of pairs reaches, in order."""
        members, pairs = graph
        found = classes.equivalence_classes(members, pairs)
        assert sorted(members) == sorted(name for group in found for name in group)
        for group in found:
            assert tuple(name for name in members if name in reached(group[0], pairs)) == group
        assert sorted((group[0] for group in found), key=members.index) == [group[0] for group in found]

    @repeatable
    @given(graphs(), st.randoms(use_true_random=False))
    def test_order_and_direction_of_pairs_do_not_matter(
        self, graph: tuple[list[str], list[tuple[str, str]]], random: Random
    ) -> None:
        """Shuffled, turned round and repeated pairs give the same classes."""
        members, pairs = graph
        other = [(b, a) for a, b in pairs] + pairs
        random.shuffle(other)
        assert classes.equivalence_classes(members, pairs) == classes.equivalence_classes(members, other)

    @pytest.mark.parametrize("function", [classes.equivalence_classes, classes.intransitive])
    def test_strangers_and_doubles_are_refused(self, function: object) -> None:
        """A pair that names no member, or a member named twice, raises and names it."""
        assert callable(function)
        with pytest.raises(ValueError, match="zzz"):
            function(["a"], [("a", "zzz")])
        with pytest.raises(ValueError, match="twice: a"):
            function(["a", "b", "a"], [])


class TestIntransitive:
    def test_a_broken_chain_is_reported_once(self) -> None:
        """a~b and b~c without a~c is one triple, with b in the middle; the missing pair mends it."""
        chain = [("b", "c"), ("b", "a")]
        assert [("a", "b", "c")] == classes.intransitive(["a", "b", "c"], iter(chain))
        assert [("c", "b", "a")] == classes.intransitive(["b", "c", "a"], chain)
        assert [] == classes.intransitive(["a", "b", "c"], [*chain, ("c", "a")])

    @repeatable
    @given(graphs())
    def test_is_every_triple_that_breaks_transitivity(self, graph: tuple[list[str], list[tuple[str, str]]]) -> None:
        """Exactly the triples of the definition, each once, the first before the third in the members' order."""
        members, pairs = graph
        same = {frozenset(p) for p in pairs}
        expected = {
            (a, b, c)
            for a, c in combinations(members, 2)
            for b in members
            if b not in (a, c) and {frozenset((a, b)), frozenset((b, c))} <= same and frozenset((a, c)) not in same
        }
        found = classes.intransitive(members, pairs)
        assert sorted(expected, key=lambda t: [members.index(name) for name in t]) == found

    @repeatable
    @given(graphs())
    def test_closed_pairs_have_none(self, graph: tuple[list[str], list[tuple[str, str]]]) -> None:
        """All pairs inside the classes together are transitive."""
        members, pairs = graph
        groups = classes.equivalence_classes(members, pairs)
        closed = [pair for group in groups for pair in combinations(group, 2)]
        assert [] == classes.intransitive(members, closed)
        assert groups == classes.equivalence_classes(members, closed)
