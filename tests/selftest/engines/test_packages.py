"""What is hidden from engine processes, and from which."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantdet.engines.child import packages
from quantdet.engines.process import process
from selftest.fakes.matrix import TESTS


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


SHIM = Path(process.__file__).parent / "shim"
ASKED = "import sys; print('hidden' if sys.modules.get('torchvision', 0) is None else 'not hidden', 'other' in sys.modules)"


def started(tmp_path: Path, *path: Path, shim: Path = SHIM) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with the shim first on its path, beside a CPU build of torch and a CUDA build of torchvision."""
    for name, version in ("torch", "2.13.0+cpu"), ("torchvision", "0.28.0"):
        folder = tmp_path / "site" / f"{name}-{version}.dist-info"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    place = os.pathsep.join(map(str, (shim, *path, tmp_path / "site")))
    environment = {**os.environ, "PYTHONPATH": place}
    return subprocess.run([sys.executable, "-c", ASKED], env=environment, capture_output=True, text=True, check=True)


def test_the_shim_hides_in_processes_that_vllm_starts(tmp_path: Path) -> None:
    """And hands on to the sitecustomize that it shadows."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys; sys.modules['other'] = sys\n", encoding="utf-8")

    run = started(tmp_path, TESTS)

    assert ("hidden True", "") == (run.stdout.strip(), run.stderr)


def test_a_shim_that_cannot_import_its_module_says_so(tmp_path: Path) -> None:
    """A module that was renamed is not passed over: nothing would be hidden, and nobody would know."""
    shim = tmp_path / "shim"
    shim.mkdir()
    text = (SHIM / "sitecustomize.py").read_text(encoding="utf-8")
    assert text.count("import packages") == 1
    (shim / "sitecustomize.py").write_text(text.replace("import packages", "import masks as packages"), encoding="utf-8")

    run = started(tmp_path, TESTS, shim=shim)

    assert "not hidden False" == run.stdout.strip()
    assert "sitecustomize" in run.stderr
    assert "masks" in run.stderr


def test_the_shim_leaves_others_alone(tmp_path: Path) -> None:
    """A process whose path is without the suite starts as if there were no shim."""
    site = tmp_path / "empty"
    site.mkdir()
    code = f"import runpy, sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p and {str(TESTS)!r} != p]\n"
    code += f"runpy.run_path({str(SHIM / 'sitecustomize.py')!r}); print('quantdet' in sys.modules)"
    run = subprocess.run([sys.executable, "-S", "-c", code], cwd=site, capture_output=True, text=True, check=False)

    assert (0, "False") == (run.returncode, run.stdout.strip()), run.stderr
