"""The store: only whole observations are found, by their key; two runs may write at once; damage costs a measurement."""

import multiprocessing
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantdet.matrix.cell import Cell
from quantdet.observations.observation import HEADER_FILE, TENSORS_FILE, Observation, ObservationError, write
from quantdet.observations.store import Store, copy_into, key_of
from selftest.fakes.observation import observation, write_often

KEY = "a" * 64
CELL = Cell("alpha", "bf16", "cpu-here")
ENVIRONMENT = "vllm-1-torch-2-00000000"


def keyed(key: str = KEY, numerics: str = "bf16") -> Observation:
    return observation(numerics=numerics, key=key)


def fill(store: Store, whole: Observation) -> Path:
    with store.writing(CELL, ENVIRONMENT, whole.header.key) as folder:
        write(folder, whole.header, whole.prompts)
    return store.place(CELL, ENVIRONMENT, whole.header.key)


def test_what_is_written_is_found(tmp_path: Path) -> None:
    """An observation comes back by cell, environment and key; its folder names all of them."""
    store = Store(tmp_path)
    place = fill(store, keyed())

    found = store.find(CELL, ENVIRONMENT, KEY)

    assert found is not None
    assert keyed().logits_sha256("decode") == found.logits_sha256("decode")
    assert ("cpu-here", ENVIRONMENT, "alpha", "bf16", KEY[:16]) == place.relative_to(tmp_path).parts
    assert [KEY] == [one.header.key for one in store.all()]


@pytest.mark.parametrize("parts", [(), (TENSORS_FILE,)])
def test_a_half_written_one_is_never_found(tmp_path: Path, parts: tuple[str, ...]) -> None:
    """Whatever stands in the folder before the header: nothing is found while it is written, nor after."""
    store = Store(tmp_path)
    with store.writing(CELL, ENVIRONMENT, KEY) as folder:
        for name in parts:
            (folder / name).write_bytes(b"x")
        assert store.find(CELL, ENVIRONMENT, KEY) is None

    assert store.find(CELL, ENVIRONMENT, KEY) is None
    assert [] == store.all()
    assert [] == [path for path in tmp_path.rglob("*") if path.is_file()]


def test_one_that_is_being_written_is_not_listed(tmp_path: Path) -> None:
    """Even with its header there, a folder is not an observation before it has its name."""
    store, whole = Store(tmp_path), keyed()
    with store.writing(CELL, ENVIRONMENT, KEY) as folder:
        write(folder, whole.header, whole.prompts)

        assert store.find(CELL, ENVIRONMENT, KEY) is None
        assert [] == store.all()
    assert 1 == len(store.all())


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    """A run that ends while it writes (here Ctrl-C) leaves neither observation nor half of one."""
    store, whole = Store(tmp_path), keyed()
    with pytest.raises(KeyboardInterrupt), store.writing(CELL, ENVIRONMENT, KEY) as folder:
        write(folder, whole.header, whole.prompts)
        raise KeyboardInterrupt

    assert store.find(CELL, ENVIRONMENT, KEY) is None
    assert [] == [path for path in tmp_path.rglob("*") if path.is_file()]


def test_another_key_is_not_found(tmp_path: Path) -> None:
    """The whole key counts, also where its first sixteen digits, which name the folder, are the same."""
    store = Store(tmp_path)
    fill(store, keyed())

    other = KEY[:-1] + "b"

    assert store.place(CELL, ENVIRONMENT, KEY) == store.place(CELL, ENVIRONMENT, other)
    assert store.find(CELL, ENVIRONMENT, other) is None
    assert store.find(CELL, "another-environment", KEY) is None


def test_the_folder_of_another_key_gives_way(tmp_path: Path) -> None:
    """A new observation replaces one of another key that is in its place."""
    store = Store(tmp_path)
    fill(store, keyed())
    other = KEY[:-1] + "b"

    fill(store, keyed(other))

    assert store.find(CELL, ENVIRONMENT, other) is not None
    assert store.find(CELL, ENVIRONMENT, KEY) is None


@pytest.mark.parametrize("name", [HEADER_FILE, TENSORS_FILE])
def test_a_damaged_one_is_set_aside_and_measured_again(tmp_path: Path, name: str) -> None:
    """A damaged observation is not found, its bytes are kept, and a new one takes its place."""
    store = Store(tmp_path)
    place = fill(store, keyed())
    path = place / name
    path.write_bytes(path.read_bytes()[:-9])
    damaged = path.read_bytes()

    assert store.find(CELL, ENVIRONMENT, KEY) is None
    assert not place.exists()
    assert [damaged] == [kept.read_bytes() for kept in tmp_path.rglob(name)]
    assert [] == store.all()
    fill(store, keyed())
    assert store.find(CELL, ENVIRONMENT, KEY) is not None


def test_damage_found_while_writing_is_replaced(tmp_path: Path) -> None:
    """A damaged observation in the way of a finished one does not win."""
    store, whole = Store(tmp_path), keyed()
    place = fill(store, whole)
    with store.writing(CELL, ENVIRONMENT, KEY) as folder:
        (place / TENSORS_FILE).write_bytes(b"")
        write(folder, whole.header, whole.prompts)

    assert store.find(CELL, ENVIRONMENT, KEY) is not None


def test_of_two_writers_the_first_stays(tmp_path: Path) -> None:
    """Who finishes second finds a whole observation there and leaves it."""
    store, first, second = Store(tmp_path), keyed(), keyed(numerics="other")
    with store.writing(CELL, ENVIRONMENT, KEY) as slow:
        write(slow, second.header, second.prompts)
        fill(store, first)

    found = store.find(CELL, ENVIRONMENT, KEY)
    assert found is not None
    assert first.logits_sha256("decode") == found.logits_sha256("decode")
    assert [] == [path for path in tmp_path.rglob(".*") if path.is_dir()]


def test_concurrent_writers(tmp_path: Path) -> None:
    """Three processes writing the same observation over and over never see a half one, and leave one whole one."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    writers = [context.Process(target=write_often, args=(str(tmp_path), results)) for _ in range(3)]
    for writer in writers:
        writer.start()
    said = [results.get(timeout=30) for _ in writers]
    for writer in writers:
        writer.join()

    assert ["", "", ""] == said
    assert 1 == len(Store(tmp_path).all())
    assert [] == [path for path in tmp_path.rglob(".*") if path.is_dir()]


def test_forget(tmp_path: Path) -> None:
    """A forgotten observation is not found; forgetting what is not there is no error."""
    store = Store(tmp_path)
    fill(store, keyed())

    store.forget(CELL, ENVIRONMENT, KEY)
    store.forget(CELL, ENVIRONMENT, KEY)

    assert store.find(CELL, ENVIRONMENT, KEY) is None


def test_all_of_a_folder_with_a_bad_one_names_it(tmp_path: Path) -> None:
    """Replaying a folder with one bad observation is an error that names the file."""
    store = Store(tmp_path)
    place = fill(store, keyed())
    (place / TENSORS_FILE).unlink()

    with pytest.raises(ObservationError, match=str(place / TENSORS_FILE)):
        store.all()


def test_all_of_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    """A mistyped folder is not an empty recording."""
    with pytest.raises(ObservationError, match="no such folder"):
        Store(tmp_path / "nothing").all()


def test_a_recording_has_the_shape_of_the_store(tmp_path: Path) -> None:
    """A copied observation is found in the copy by the same cell, environment and key."""
    store = Store(tmp_path / "store")
    fill(store, keyed())
    found = store.find(CELL, ENVIRONMENT, KEY)
    assert found is not None

    copy_into(found, tmp_path / "recordings")
    copy_into(found, tmp_path / "recordings")

    assert Store(tmp_path / "recordings").find(CELL, ENVIRONMENT, KEY) is not None


def test_a_copy_that_fails_leaves_the_recording_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: the one that is there stays whole, and half of another does not."""
    store, recordings = Store(tmp_path / "store"), Store(tmp_path / "recordings")
    fill(store, keyed())
    (found,) = store.all()
    copy_into(found, recordings.root)

    def full(source: Path, target: Path, **options: object) -> None:
        (Path(target) / TENSORS_FILE).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(OSError, match="No space left"):
        copy_into(found, recordings.root)

    assert [KEY] == [one.header.key for one in recordings.all()]
    assert [] == list(recordings.root.rglob(".*"))


def test_one_place_may_be_damaged_twice(tmp_path: Path) -> None:
    """Each time what was damaged is kept aside, and its place is free."""
    store = Store(tmp_path)
    for _ in range(2):
        place = fill(store, keyed())
        (place / TENSORS_FILE).write_bytes(b"")
        assert store.find(CELL, ENVIRONMENT, KEY) is None
        assert not place.exists()

    assert 2 == len(store.set_aside) == len(list(place.parent.glob(".damaged-*/observation.json")))


@given(
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.booleans(), min_size=1, max_size=4),
    st.data(),
)
def test_the_key_covers_every_value(identity: dict[str, object], data: st.DataObject) -> None:
    """Any changed value changes the key; the order of the fields does not."""
    name = data.draw(st.sampled_from(sorted(identity)))

    assert key_of(identity) == key_of(dict(reversed(identity.items())))
    assert key_of(identity) != key_of({**identity, name: [identity[name]]})
    assert key_of(identity) != key_of({k: v for k, v in identity.items() if k != name})
