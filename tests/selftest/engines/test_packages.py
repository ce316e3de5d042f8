"""What is hidden from engine processes, and from which."""

import sys

import pytest

from quantdet.engines.child import packages


@pytest.mark.parametrize(
    ("versions", "hidden"),
    [
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.11.0", "torchcodec": "0.17.0"}, True),
        ({"torch": "2.13.0+cpu"}, True),  # nothing installed: hiding it changes nothing
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu", "torchaudio": "2.13+cpu", "torchcodec": "0.17+cpu"}, False),
        ({"torch": "2.11.0+cu130", "torchvision": "0.26.0+cu130"}, False),  # vLLM 0.26 imports it while it warms up
        ({"torch": "2.11.0"}, False),
        ({}, False),
    ],
)
def test_companions_of_torch_are_hidden_where_their_build_does_not_match(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], hidden: bool
) -> None:
    """A CPU build of torch beside CUDA builds of the others: hidden. Beside a CUDA build of torch: never."""
    monkeypatch.setattr(packages, "_version", lambda name: versions.get(name, ""))

    assert (packages.COMPANIONS if hidden else ()) == packages.broken()
    assert "torchao" in packages.in_forkserver()


def test_hidden_packages_cannot_be_imported_and_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import fails; what is imported already stays."""
    for name in (*packages.COMPANIONS, *packages.NOT_IN_FORKSERVER):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "torchaudio", sys)

    packages.hide(("torchvision", "torchaudio"))

    with pytest.raises(ImportError):
        import torchvision  # noqa: F401
    assert ("torchvision",) == packages.hidden()
    monkeypatch.delitem(sys.modules, "torchvision")
