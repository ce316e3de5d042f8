"""Equivalence classes of formats whose outputs are identical."""

from collections.abc import Iterable, Sequence


def equivalence_classes(members: Sequence[str], identical: Iterable[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Partition `members` into classes: two are together when a chain of identical pairs joins them.

    Args:
        members: names, each once.
        identical: unordered pairs of members; a pair may be repeated.

    Returns:
        every member in exactly one class; members of a class, and classes by their first member, in the order of
        `members`.

    Raises:
        ValueError: a member is named twice, or a pair names something that is no member.
    """
    pairs = _checked(members, identical)
    parent = {member: member for member in members}

    def root(member: str) -> str:
        while parent[member] != member:
            parent[member] = parent[parent[member]]
            member = parent[member]
        return member

    for a, b in pairs:
        parent[root(b)] = root(a)
    classes: dict[str, list[str]] = {}
    for member in members:
        classes.setdefault(root(member), []).append(member)
    return [tuple(group) for group in classes.values()]


def intransitive(members: Sequence[str], identical: Iterable[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Triples (a, b, c) with a and b identical, b and c identical, but a and c not.

    Each is evidence that "identical" is no equivalence on this data, for example because the pairs were judged on
    different positions, and that the classes joined through b claim more than was measured.

    Args:
        members, identical: as `equivalence_classes`.

    Returns:
        each triple once, `a` before `c` in the order of `members`, sorted in that order by (a, b, c).

    Raises:
        ValueError: as `equivalence_classes`.
    """
    related = {frozenset(pair) for pair in _checked(members, identical)}
    return [
        (a, b, c)
        for index, a in enumerate(members)
        for b in members
        if b != a and frozenset((a, b)) in related
        for c in members[index + 1 :]
        if c != b and frozenset((b, c)) in related and frozenset((a, c)) not in related
    ]


def _checked(members: Sequence[str], identical: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    known = set(members)
    if len(known) != len(members):
        raise ValueError(f"members named twice: {', '.join(sorted({m for m in members if members.count(m) > 1}))}")
    pairs = list(identical)
    strangers = sorted({name for pair in pairs for name in pair} - known)
    if strangers:
        raise ValueError(f"identical pairs name no member: {', '.join(strangers)}")
    return pairs
