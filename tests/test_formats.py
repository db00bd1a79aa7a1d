"""Classes by name, folders of images, and CIFAR's archives; each written here."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from data_files import asset, inputs_of, labels_of, write_images
from profiling_agent.acquisition.data import UNNAMED, Bundle
from profiling_agent.acquisition.formats.cifar import open_cifar
from profiling_agent.acquisition.formats.classes import ClassList, index_of, read_classes
from profiling_agent.acquisition.formats.folder import open_folder
from profiling_agent.acquisition.formats.table import is_table
from profiling_agent.acquisition.images import load_image
from profiling_agent.errors import DataError
from profiling_agent.records.workload import ImageTransform

PLAIN = ImageTransform()


# --- classes

BIRDS = ClassList(
    names=(
        "tench, Tinca tinca",
        "great_white_shark",
        "crane",
        "crane",
        "cardigan",
        "shark, Cardigan",
    ),
    ids=tuple(f"n0000000{number}" for number in range(6)),
    num_classes=6,
)


def test_classes_by_id_and_by_name() -> None:
    assert index_of(["n00000004", "n00000001"], BIRDS)[0] == {"n00000004": 4, "n00000001": 1}
    index, how = index_of(["Tinca tinca", "Great White_Shark", "cardigan"], BIRDS)
    assert index == {"Tinca tinca": 0, "Great White_Shark": 1, "cardigan": 4}
    assert "names" in how
    with pytest.raises(DataError, match=r"'crane' stands for 2 classes .*\(2, 3\)"):
        index_of(["crane", "tench"], BIRDS)
    with pytest.raises(DataError, match="'dodo' is none of the model's classes"):
        index_of(["dodo", "tench", "cardigan"], BIRDS)


def test_classes_by_number_and_by_rank() -> None:
    known = ClassList(num_classes=12)
    index, how = index_of([str(number) for number in range(12)], known)
    assert index["10"] == 10 and "ImageFolder" in how and "--classes" in how
    assert "ImageFolder" not in index_of(["0", "1", "7"], known)[1]
    index, how = index_of([f"{number:02}" for number in range(1, 13)], known)
    assert index["01"] == 0 and index["12"] == 11 and "counted from 0" in how
    assert "one too high" in index_of(["1", "2"], None)[1]
    index, how = index_of(["dog", "cat"], ClassList(num_classes=2))
    assert index == {"cat": 0, "dog": 1} and "rank" in how
    assert index_of(["b", "a"], None)[0] == {"a": 0, "b": 1}
    with pytest.raises(DataError, match=r"3 classes .* model has 1,000.*--classes FILE"):
        index_of(["a", "b", "c"], ClassList(num_classes=1000))
    with pytest.raises(DataError, match=r"3 classes .* model has 2"):
        index_of(["a", "b", "c"], ClassList(num_classes=2))


@pytest.mark.parametrize(
    ("text", "names", "ids"),
    [
        ("n00000001 tench, fish\nn00000002 great_white_shark\n",
         ("tench, fish", "great_white_shark"), ("n00000001", "n00000002")),
        ("n00000001\tcat\nn00000002: dog", ("cat", "dog"), ("n00000001", "n00000002")),
        ("\ufeffgolden retriever\r\ncat\r\n\r\n", ("golden retriever", "cat"), ()),
        ("1 dog\n0 cat\n", ("cat", "dog"), ()),
        ("n00000001\nn00000002", ("n00000001", "n00000002"), ("n00000001", "n00000002")),
    ],
)  # fmt: skip
def test_classes_files(tmp_path: Path, text: str, names: Any, ids: Any) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(text, encoding="utf-8", newline="")
    assert read_classes(path) == ClassList(names=names, ids=ids, num_classes=2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"  \n", "is empty"),
        (b"cat\n\ndog\n", "Line 2"),
        (b"n00000001 a\nn00000001 b", "twice"),
        (b"\xff\xfe\x00", "UTF-8"),
        (None, "doesn't exist"),
    ],
)
def test_bad_classes_files(tmp_path: Path, data: bytes | None, message: str) -> None:
    path = tmp_path / "classes.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_classes(path)


# --- folders


def test_a_folder_per_class(tmp_path: Path) -> None:
    write_images(tmp_path, ["dog/b.png", "dog/a.JPG", "cat/deep/er/c.jpeg", "cat/.hidden.png"])
    (tmp_path / "dog" / "notes.txt").write_text("x")
    bundle = open_folder(tmp_path)
    source = bundle.parts["all"]
    assert source.is_threadsafe and source.length == 3
    assert [path.name for path in inputs_of(source)] == ["c.jpeg", "a.JPG", "b.png"]
    assert labels_of(source) == [0, 1, 1] and bundle.class_names == ("cat", "dog")
    assert any("1 hidden, 1 that are no images" in note for note in bundle.notes)
    known = ClassList(names=("bird", "dog", "cat"), num_classes=3)
    assert labels_of(open_folder(tmp_path, known).parts["all"]) == [2, 1, 1]
    assert open_folder(tmp_path, known).class_names == ("bird", "dog", "cat")


def test_splits_as_imagenet_and_imagenette_have_them(tmp_path: Path) -> None:
    top = tmp_path / "imagenette2-320"
    write_images(top, [f"{split}/{wnid}/{split}_0.JPEG" for split in ("train", "val")
                       for wnid in ("n00000003", "n00000001")])  # fmt: skip
    write_images(top, ["test/ILSVRC_test_0.JPEG", "extras/readme.png"])
    (top / "noisy_imagenette.csv").write_text("path,label\n")
    assert not is_table(tmp_path) and not is_table(top)
    for path in (tmp_path, top):
        bundle = open_folder(path, BIRDS)
        assert set(bundle.parts) == {"train", "search"}
        assert labels_of(bundle.parts["search"]) == [1, 3]
        assert any("test" in note and "left out" in note for note in bundle.notes)
        assert any("extras" in note for note in bundle.notes)
    # One numbering for all parts, even when a part has fewer classes.
    (top / "val" / "n00000001" / "val_0.JPEG").unlink()
    assert labels_of(open_folder(top).parts["search"]) == [1]


def test_images_without_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "flat", ["b.png", "a.png"])
    write_images(tmp_path / "below", ["images/a.png"])
    write_images(tmp_path / "splits", ["val/a.png", "test/b.png"])
    for name in ("flat", "below"):
        bundle = open_folder(tmp_path / name)
        assert labels_of(bundle.parts["all"]) == [None] * len(inputs_of(bundle.parts["all"]))
        assert any("no labels" in note for note in bundle.notes)
    assert set(open_folder(tmp_path / "splits").parts) == {"search", "test"}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_images(tmp_path, ["bus/a.png", "train/b.png"])
    assert open_folder(tmp_path).class_names == ("bus", "train")


def test_links_and_empty_folders(tmp_path: Path) -> None:
    write_images(tmp_path / "real", ["a.png"])
    (tmp_path / "top" / "cat").mkdir(parents=True)
    (tmp_path / "top" / "bird").mkdir()
    (tmp_path / "top" / "cat" / "up").symlink_to(tmp_path / "top" / "cat")
    (tmp_path / "top" / "cat" / "link.png").symlink_to(tmp_path / "real" / "a.png")
    (tmp_path / "top" / "dog").symlink_to(tmp_path / "real")
    bundle = open_folder(tmp_path / "top")
    assert bundle.class_names == ("cat", "dog") and labels_of(bundle.parts["all"]) == [0, 1]
    assert any("1 folders hold no image" in note for note in bundle.notes)
    # An empty folder counts when the model has that many classes.
    three = open_folder(tmp_path / "top", ClassList(num_classes=3))
    assert labels_of(three.parts["all"]) == [1, 2]


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no image"):
        open_folder(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="no images by their names"):
        open_folder(tmp_path)
    with pytest.raises(DataError, match="can't be listed"):
        open_folder(tmp_path / "nowhere")


def test_opening_a_folder_opens_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(300):
        path = tmp_path / f"class{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")

    def refuse(*_: object) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", refuse)
    assert open_folder(tmp_path).parts["all"].length == 300


def test_the_validation_images_have_their_indices() -> None:
    folder, file = asset("imagenet_val_650"), asset("imagenet_classes.txt")
    known = read_classes(file)
    assert known.num_classes == 1000 and known.names[1] == "goldfish"
    bundle = open_folder(folder, known)
    source = bundle.parts["all"]
    lines = file.read_text().splitlines()
    for path, label in zip(inputs_of(source), labels_of(source), strict=True):
        assert lines[label].split()[0] == path.parent.name
    assert source.length == 650
    with pytest.raises(DataError, match=r"456 classes .* 1,000.*--classes FILE"):
        open_folder(folder, ClassList(num_classes=1000))
    transform = ImageTransform(resize=248, crop=(224, 224), interpolation="bicubic")
    assert load_image(inputs_of(source)[0], transform).shape == (224, 224, 3)


# --- CIFAR


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes bytes as Python 2 wrote its strings, which is how the archives were published."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_bytes(self, value: bytes) -> None:
        if len(value) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(value)]) + value)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def python2_pickle(value: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar_batch(num: int, seed: int, classes: int = 10) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (num, 3072)).astype(np.uint8)
    return pixels, [int(label) for label in rng.integers(0, classes, num)]


def python_files(name: str) -> dict[str, bytes]:
    if name == "cifar100":
        files = {"meta": python2_pickle({b"fine_label_names": [b"c%d" % n for n in range(100)]})}
        for number, part in enumerate(("train", "test")):
            pixels, labels = cifar_batch(7, number, 100)
            files[part] = python2_pickle(
                {b"filenames": [b"x.png"] * 7, b"batch_label": b"b", b"fine_labels": labels,
                 b"coarse_labels": [0] * 7, b"data": pixels}
            )  # fmt: skip
        return files
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    files = {
        "batches.meta": python2_pickle(
            {b"num_cases_per_batch": 7, b"label_names": [b"class%d" % n for n in range(10)],
             b"num_vis": 3072}
        )
    }  # fmt: skip
    for seed, each in enumerate(names):
        pixels, labels = cifar_batch(7, seed)
        files[each] = python2_pickle(
            {b"batch_label": b"batch", b"labels": labels, b"data": pixels,
             b"filenames": [b"x.png"] * 7}
        )  # fmt: skip
    return files


def binary_files(name: str) -> dict[str, bytes]:
    fine = name == "cifar100"
    parts = ["train", "test"] if fine else [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]
    files = {"fine_label_names.txt" if fine else "batches.meta.txt": b"a\nb\n\n"}
    for seed, each in enumerate(parts):
        pixels, labels = cifar_batch(7, seed, 100 if fine else 10)
        columns = [np.array(labels, np.uint8)[:, None], pixels]
        if fine:
            columns.insert(0, np.zeros((7, 1), np.uint8))
        files[f"{each}.bin"] = np.hstack(columns).tobytes()
    return files


def write_archive(path: Path, folder: str, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def check_cifar(bundle: Bundle, classes: int, num_train: int) -> None:
    for part, seed in (("train", 0), ("test", 1 if classes == 100 else 5)):
        source = bundle.parts[part]
        pixels, labels = cifar_batch(7, seed, classes)
        sample = source.get(3)
        assert sample.inputs[UNNAMED].shape == (32, 32, 3)
        assert np.array_equal(
            sample.inputs[UNNAMED], pixels[3].reshape(3, 32, 32).transpose(1, 2, 0)
        )
        assert labels_of(source)[:7] == labels and source.is_threadsafe
    assert bundle.parts["train"].length == num_train


@pytest.mark.parametrize(("name", "classes", "num"), [("cifar10", 10, 35), ("cifar100", 100, 7)])
@pytest.mark.parametrize("is_binary", [False, True])
def test_cifar_in_all_its_forms(
    tmp_path: Path, name: str, classes: int, num: int, is_binary: bool
) -> None:
    files = binary_files(name) if is_binary else python_files(name)
    dashed = f"cifar-{classes}"
    inner = {
        ("cifar10", False): "cifar-10-batches-py",
        ("cifar10", True): "cifar-10-batches-bin",
        ("cifar100", False): "cifar-100-python",
        ("cifar100", True): "cifar-100-binary",
    }
    folder = inner[name, is_binary]
    archive = f"{dashed}-{'binary' if is_binary else 'python'}.tar.gz"
    extracted = write_files(tmp_path / "out" / folder, files)
    packed = write_archive(tmp_path / archive, folder, files)
    for path in (extracted, tmp_path / "out", packed, tmp_path):
        bundle = open_cifar(name, path)
        check_cifar(bundle, classes, num)
        first = "a" if is_binary else {10: "class0", 100: "c0"}[classes]
        assert bundle.class_names[0] == first


def test_a_part_of_cifar_is_enough(tmp_path: Path) -> None:
    write_files(tmp_path / "some", {"test_batch": python_files("cifar10")["test_batch"]})
    bundle = open_cifar("cifar10", tmp_path / "some")
    assert set(bundle.parts) == {"test"} and "data_batch_1 is not there" in bundle.notes


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


class CopyOfNumpy:
    def __reduce__(self) -> tuple[Any, ...]:
        return np.frombuffer, (b"abc",)


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    pickle.loads(pickle.dumps(Hostile(tmp_path / "proof"), 2)).close()
    assert (tmp_path / "proof").exists(), "the attack works on an unpickler that trusts"
    good = python_files("cifar10")
    for number, (attack, named) in enumerate(
        [
            (pickle.dumps(Hostile(target), 2), r"io\.open"),
            (pickle.dumps({"data": Hostile(target)}, 0), r"io\.open"),
            (pickle.dumps(CopyOfNumpy(), 4), "frombuffer"),
            (b"cos\nsystem\n(S'touch " + str(target).encode() + b"'\ntR.", r"os\.system"),
            (b"cnumpy\nndarray\n(I1000000000000\ntR.", r"numpy\.ndarray"),
            (b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.", "__globals__"),
        ]
    ):
        folder = write_files(tmp_path / f"f{number}", {**good, "test_batch": attack})
        with pytest.raises(DataError, match=named):
            open_cifar("cifar10", folder)
        assert not target.exists()
    packed = write_archive(
        tmp_path / "cifar-10-python.tar.gz", "x", {"data_batch_1": pickle.dumps(Hostile(target))}
    )
    with pytest.raises(DataError, match="was not loaded"):
        open_cifar("cifar10", packed)
    assert not target.exists()


@pytest.mark.parametrize(
    "attack",
    [
        b"", b"\x80\x02}", b"\x80\x02K\x01.", b"not a pickle",
        # States for the stand-ins that are none.
        b"cnumpy\ndtype\n}(S'_make'\nI1\nsb.",
        b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I4\ntS'x'\nI00\nS'abcd'\ntb.",
        b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.",
        # A memo of sixteen gigabytes, and a dict that holds itself.
        b"\x80\x02}r\xff\xff\xff\x7f.", b"}p0\nS'a'\ng0\ns.",
    ],
)  # fmt: skip
def test_damaged_pickles_are_refused(tmp_path: Path, attack: bytes) -> None:
    folder = write_files(tmp_path / "f", {"test_batch": attack})
    with pytest.raises(DataError, match="test_batch"):
        open_cifar("cifar10", folder)


def test_cifar_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"doesn't exist.*cifar-10-python.tar.gz"):
        open_cifar("cifar10", tmp_path / "nowhere")
    with pytest.raises(DataError, match="cifar100:PATH if"):
        open_cifar("cifar10", write_files(tmp_path / "hundred", python_files("cifar100")))
    (tmp_path / "broken.tar.gz").write_bytes(b"\x1f\x8b\x08 nothing")
    with pytest.raises(DataError, match="damaged or no archive"):
        open_cifar("cifar10", tmp_path / "broken.tar.gz")
    whole = write_archive(tmp_path / "cut.tar.gz", "c", python_files("cifar10"))
    whole.write_bytes(whole.read_bytes()[:-20_000])
    with pytest.raises(DataError, match="damaged"):
        open_cifar("cifar10", whole)
    odd = binary_files("cifar10")["test_batch.bin"] + b"x"
    with pytest.raises(DataError, match="not a multiple"):
        open_cifar("cifar10", write_files(tmp_path / "odd", {"test_batch.bin": odd}))
    pixels, _ = cifar_batch(7, 0)
    for number, labels in enumerate(([10] * 7, [0] * 6, "x", [[0]] * 7, None)):
        data = python2_pickle({b"data": pixels, b"labels": labels})
        with pytest.raises(DataError, match="labels"):
            open_cifar("cifar10", write_files(tmp_path / f"l{number}", {"test_batch": data}))
