"""Parquet, saved data sets and text files; each written here as the libraries write them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_files import asset, image_bytes, inputs_of, labels_of, photo, write_images
from profiling_agent.acquisition.data import UNNAMED, UnreadableSample
from profiling_agent.acquisition.formats.cifar import open_cifar
from profiling_agent.acquisition.formats.classes import ClassList
from profiling_agent.acquisition.formats.table import is_table, open_table
from profiling_agent.acquisition.images import load_image
from profiling_agent.errors import DataError, MissingDependency
from profiling_agent.records.workload import ImageTransform

PLAIN = ImageTransform()


IMAGE = {"_type": "Image"}


@pytest.fixture(scope="module")
def arrow() -> Any:
    return pytest.importorskip("pyarrow")


def class_label(*names: str) -> dict[str, Any]:
    return {"names": list(names), "_type": "ClassLabel"}


def stated(table: Any, **features: Any) -> Any:
    """With Hugging Face's features in the schema's metadata."""
    info = {"info": {"features": features}}
    return table.replace_schema_metadata({b"huggingface": json.dumps(info).encode()})


def image_table(arrow: Any, num: int, offset: int = 0) -> Any:
    images = [{"bytes": image_bytes(photo(8, 8, offset + n)), "path": None} for n in range(num)]
    labels = arrow.array([n % 2 for n in range(num)], arrow.int64())
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    table = arrow.table({"image": arrow.array(images, kind), "label": labels})
    return stated(table, image=IMAGE, label=class_label("cat", "dog"))


def write_stream(arrow: Any, table: Any, path: Path) -> None:
    with (
        arrow.OSFile(str(path), "wb") as file,
        arrow.ipc.new_stream(file, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=3)


def save_to_disk(arrow: Any, table: Any, folder: Path, num_files: int = 2) -> Path:
    """As the library ``datasets`` writes one split."""
    folder.mkdir(parents=True)
    size = -(-table.num_rows // num_files)
    names = [f"data-{n:05}-of-{num_files:05}.arrow" for n in range(num_files)]
    for number, name in enumerate(names):
        part = table.slice(number * size, size)
        write_stream(arrow, part, folder / name)
    features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    info = {"features": features.get("info", {}).get("features", {}), "citation": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0",
             "_format_columns": None, "_format_kwargs": {}, "_format_type": None,
             "_output_all_columns": False, "_split": "train"}  # fmt: skip
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def write_parquet(table: Any, path: Path, rows: int = 3) -> Path:
    import pyarrow.parquet as parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=rows)
    return path


def test_parquet_of_images(arrow: Any, tmp_path: Path) -> None:
    path = write_parquet(image_table(arrow, 7), tmp_path / "data.parquet")
    assert is_table(path)
    bundle = open_table(path)
    source = bundle.parts["all"]
    assert bundle.class_names == ("cat", "dog") and source.length == 7 and source.is_threadsafe
    assert labels_of(source) == [0, 1, 0, 1, 0, 1, 0]
    for index in (6, 0, 3):
        pixels = load_image(source.get(index).inputs[UNNAMED], PLAIN)
        assert np.array_equal(pixels, np.array(photo(8, 8, index)))


def test_the_models_order_of_classes_holds(arrow: Any, tmp_path: Path) -> None:
    path = write_parquet(image_table(arrow, 4), tmp_path / "data.parquet")
    known = ClassList(names=("Dog", "bird", "cat"), num_classes=3)
    bundle = open_table(path, known)
    assert labels_of(bundle.parts["all"]) == [2, 0, 2, 0]
    assert bundle.class_names == known.names
    assert any("number them differently" in note for note in bundle.notes)
    assert labels_of(open_table(path, ClassList(num_classes=2)).parts["all"]) == [0, 1, 0, 1]
    with pytest.raises(DataError, match=r"2 classes \(cat, dog, ...\) but the model has 1,000"):
        open_table(path, ClassList(num_classes=1000))


def test_opening_parquet_reads_only_the_labels(
    arrow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as parquet

    path = write_parquet(image_table(arrow, 9), tmp_path / "data.parquet")
    read: list[Any] = []
    groups: list[int] = []
    plain_read, plain_group = parquet.ParquetFile.read, parquet.ParquetFile.read_row_group

    def see(self: Any, columns: Any = None) -> Any:
        read.append(columns)
        return plain_read(self, columns=columns)

    def see_group(self: Any, group: int, columns: Any = None) -> Any:
        groups.append(group)
        return plain_group(self, group, columns=columns)

    monkeypatch.setattr(parquet.ParquetFile, "read", see)
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", see_group)
    source = open_table(path).parts["all"]
    assert read == [["label"]] and groups == []
    for index in range(9):
        source.get(index)
    assert groups == [0, 1, 2]


def test_splits_of_parquet_files(arrow: Any, tmp_path: Path) -> None:
    for name, num in (("train-00000-of-00002", 4), ("train-00001-of-00002", 3),
                      ("validation-00000-of-00001", 2), ("test-00000-of-00001", 1)):  # fmt: skip
        write_parquet(image_table(arrow, num), tmp_path / "hub" / "data" / f"{name}.parquet")
    (tmp_path / "hub" / ".cache").mkdir()
    (tmp_path / "hub" / ".cache" / "x.parquet").write_bytes(b"")
    assert is_table(tmp_path / "hub")
    bundle = open_table(tmp_path / "hub")
    lengths = {part: source.length for part, source in bundle.parts.items()}
    assert lengths == {"train": 7, "search": 2, "test": 1}
    pixels = load_image(bundle.parts["train"].get(5).inputs[UNNAMED], PLAIN)
    assert np.array_equal(pixels, np.array(photo(8, 8, 1)))
    for split in ("train", "test"):
        write_parquet(image_table(arrow, 2), tmp_path / "folders" / split / "0.parquet")
    assert set(open_table(tmp_path / "folders").parts) == {"train", "test"}
    write_parquet(image_table(arrow, 2), tmp_path / "flat" / "0000.parquet")
    assert open_table(tmp_path / "flat").parts["all"].length == 2
    for name in ("cola", "sst2"):
        write_parquet(image_table(arrow, 2), tmp_path / "several" / name / "train-0.parquet")
    with pytest.raises(DataError, match=r"several tables \(cola, sst2\)"):
        open_table(tmp_path / "several")


def test_parquet_that_is_none(arrow: Any, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match=r"a\.parquet' is damaged"):
        open_table(tmp_path / "a.parquet")
    (tmp_path / "lfs.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(DataError, match="git lfs pull"):
        open_table(tmp_path / "lfs.parquet")
    write_parquet(image_table(arrow, 2), tmp_path / "two" / "train-0.parquet")
    other = arrow.table({"text": ["a"], "label": [0]})
    write_parquet(other, tmp_path / "two" / "train-1.parquet")
    with pytest.raises(DataError, match="other columns"):
        open_table(tmp_path / "two")
    with pytest.raises(DataError, match="no rows"):
        open_table(write_parquet(other.slice(0, 0), tmp_path / "empty.parquet"))
    odd = arrow.table({"height": [1.0], "width": [2.0], "label": [0]})
    with pytest.raises(DataError, match=r"'height' \(float\).*'text'"):
        open_table(write_parquet(odd, tmp_path / "odd.parquet"))


def test_a_saved_dataset(arrow: Any, tmp_path: Path) -> None:
    folder = save_to_disk(arrow, image_table(arrow, 10), tmp_path / "saved")
    assert is_table(folder)
    bundle = open_table(folder)
    source = bundle.parts["all"]
    assert source.length == 10 and bundle.class_names == ("cat", "dog")
    assert labels_of(source) == [n % 2 for n in range(10)]
    assert np.array_equal(
        load_image(source.get(8).inputs[UNNAMED], PLAIN), np.array(photo(8, 8, 8))
    )
    # Older versions of the library keep a selection beside the data.
    indices = arrow.table({"indices": arrow.array([9, 2, 4], arrow.uint64())})
    write_stream(arrow, indices, folder / "indices.arrow")
    state = json.loads((folder / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (folder / "state.json").write_text(json.dumps(state))
    chosen = open_table(folder).parts["all"]
    assert labels_of(chosen) == [1, 0, 0]
    assert chosen.get(0).inputs[UNNAMED] == source.get(9).inputs[UNNAMED]


def test_a_saved_dict_of_datasets(arrow: Any, tmp_path: Path) -> None:
    def texts(num: int, labels: list[int]) -> Any:
        table = arrow.table({"sentence": [f"text {n}" for n in range(num)], "label": labels,
                             "idx": list(range(num))})  # fmt: skip
        return stated(table, label=class_label("negative", "positive"))

    for name, labels in (("train", [0, 1, 1]), ("validation", [1, 0]), ("test", [-1, -1]),
                         ("unsupervised", [-1])):  # fmt: skip
        save_to_disk(arrow, texts(len(labels), labels), tmp_path / "glue" / name, 1)
    listed = {"splits": ["train", "validation", "test", "unsupervised"]}
    (tmp_path / "glue" / "dataset_dict.json").write_text(json.dumps(listed))
    bundle = open_table(tmp_path / "glue", ClassList(names=("POSITIVE", "NEGATIVE"), num_classes=2))
    assert set(bundle.parts) == {"train", "search"}
    assert labels_of(bundle.parts["train"]) == [1, 0, 0]
    assert inputs_of(bundle.parts["search"]) == ["text 0", "text 1"]
    notes = "; ".join(bundle.notes)
    assert "parts without labels left out: test" in notes and "unsupervised" in notes
    (tmp_path / "glue" / "dataset_dict.json").write_text(json.dumps({"splits": ["a", "b"]}))
    with pytest.raises(DataError, match=r"splits a, b, none of which is"):
        open_table(tmp_path / "glue")
    (tmp_path / "glue" / "dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match="can't be read"):
        open_table(tmp_path / "glue")


@pytest.mark.parametrize(
    "pair",
    [
        ("premise", "hypothesis"),
        ("question", "sentence"),
        ("sentence1", "sentence2"),
        ("question1", "question2"),
    ],
)
def test_pairs_of_texts(arrow: Any, tmp_path: Path, pair: tuple[str, str]) -> None:
    table = arrow.table({"idx": ["7"], pair[1]: ["second"], pair[0]: ["first"], "label": [2]})
    source = open_table(write_parquet(table, tmp_path / "t.parquet")).parts["all"]
    assert inputs_of(source) == [("first", "second")] and labels_of(source) == [2]


def test_named_arrays(arrow: Any, tmp_path: Path) -> None:
    table = arrow.table({
        "input_ids": [[1, 2, 3], [4, 5, 6]], "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "sentence": ["a", "b"], "labels": [0, 1],
    })  # fmt: skip
    for path in (write_parquet(table, tmp_path / "t.parquet"),
                 save_to_disk(arrow, table, tmp_path / "saved", 1)):  # fmt: skip
        bundle = open_table(path)
        sample = bundle.parts["all"].get(1)
        assert set(sample.inputs) == {"input_ids", "attention_mask"}
        assert sample.inputs["input_ids"].dtype == np.int64
        assert sample.inputs["attention_mask"].tolist() == [1, 1, 0]
        assert any("left out: sentence" in note for note in bundle.notes)
    nested = arrow.table({"x": [[[1.0, 2.0], [3.0, 4.0]], [[1.0], [2.0, 3.0]]]})
    source = open_table(write_parquet(nested, tmp_path / "n.parquet")).parts["all"]
    assert source.get(0).inputs[UNNAMED].tolist() == [[1, 2], [3, 4]]
    with pytest.raises(UnreadableSample, match="different lengths"):
        source.get(1)
    gaps = arrow.table({"x": [[1, None]]})
    with pytest.raises(UnreadableSample, match="missing numbers"):
        open_table(write_parquet(gaps, tmp_path / "g.parquet")).parts["all"].get(0)


def test_label_columns_of_all_kinds(arrow: Any, tmp_path: Path) -> None:
    def labels(values: Any, known: ClassList | None = None, name: str = "label") -> list[Any]:
        table = arrow.table({"text": ["t"] * len(values), name: values})
        return labels_of(
            open_table(write_parquet(table, tmp_path / "t.parquet"), known).parts["all"]
        )

    assert labels(["pos", "neg", None]) == [1, 0, None]
    assert labels(["pos", "neg"], ClassList(names=("Pos", "Neg"))) == [0, 1]
    assert labels([True, False]) == [1, 0]
    assert labels([1.0, 0.0, -1.0]) == [1, 0, None]
    assert labels([3.8, 0.5]) == [3.8, 0.5]
    assert labels([3, 1], name="Target") == [3, 1]
    assert labels(arrow.array(["b", "a"]).dictionary_encode()) == [1, 0]
    assert labels([[1, 2], [3]]) == [pytest.approx([1, 2]), pytest.approx([3])]
    table = arrow.table({"text": ["t"], "coarse_label": [0], "fine_label": [3]})
    coarse, fine = class_label("a", "b"), class_label("a", "b", "c", "d")
    path = write_parquet(
        stated(table, coarse_label=coarse, fine_label=fine), tmp_path / "c.parquet"
    )
    assert labels_of(open_table(path).parts["all"]) == [3]
    assert labels_of(open_table(path, ClassList(num_classes=2)).parts["all"]) == [0]


def test_cifar_from_parquet(arrow: Any, tmp_path: Path) -> None:
    table = image_table(arrow, 3).rename_columns(["img", "fine_label"])
    write_parquet(table, tmp_path / "cifar100" / "train-00000-of-00001.parquet")
    bundle = open_cifar("cifar100", tmp_path)
    assert labels_of(bundle.parts["train"]) == [0, 1, 0]


def test_missing_values_are_unreadable_samples(arrow: Any, tmp_path: Path) -> None:
    table = arrow.table({"text": ["a", None], "label": [0, 1]})
    source = open_table(write_parquet(table, tmp_path / "t.parquet")).parts["all"]
    with pytest.raises(UnreadableSample, match="Row 1 has no 'text'"):
        source.get(1)


@pytest.mark.parametrize(
    ("name", "text", "inputs", "labels"),
    [
        ("a.csv", 'text,label\n"a, ""b""",1\nc,0\n', ['a, "b"', "c"], [1, 0]),
        ("a.csv", "id,review,sentiment\n0,good,pos\n1,bad,neg\n", ["good", "bad"], [1, 0]),
        ("a.csv", "\ufeffsentence,label\r\na\u2028b,1\r\n\r\nc,0\r\n", ["a\u2028b", "c"], [1, 0]),
        ("a.tsv", 'a "quoted\t0\nb\t1\n', ['a "quoted', "b"], [0, 1]),
        ("a.tsv", "1\ta\n0\tb\n", ["a", "b"], [1, 0]),
        ("a.tsv", "so good\tpos\nso bad\tneg\nmeh\tneg\nno\tneg\n",
         ["so good", "so bad", "meh", "no"], [1, 0, 0, 0]),
        ("a.tsv", "one\ttwo\t0\nthree\tfour\t1\n", [("one", "two"), ("three", "four")], [0, 1]),
        ("a.tsv", "premise\thypothesis\tlabel\np\th\t0\n", [("p", "h")], [0]),
        ("a.tsv", 'text\tlabel\n"a\nb"\t1\nc\t0\n', ["a\nb", "c"], [1, 0]),
        ("a.csv", "words\nhello\n", ["hello"], [None]),
        ("a.jsonl", '{"text": "a", "label": "x"}\n\n{"label": "w", "text": "b"}\n',
         ["a", "b"], [1, 0]),
    ],
)  # fmt: skip
def test_text_files(tmp_path: Path, name: str, text: str, inputs: Any, labels: Any) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    source = open_table(path).parts["all"]
    assert inputs_of(source) == inputs and labels_of(source) == labels


def test_minus_one_is_a_secret_label_but_a_number_to_a_metric(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text("text,label\na,-1\nb,0.5\nc,1\n", encoding="utf-8")
    assert labels_of(open_table(path).parts["all"]) == [None, 0.5, 1]
    assert labels_of(open_table(path, has_classes=False).parts["all"]) == [-1, 0.5, 1]


def test_text_files_of_arrays_and_paths(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"input_ids": [1, 2], "mask": [1, 0], "label": 1}\n')
    sample = open_table(path).parts["all"].get(0)
    assert sample.inputs["input_ids"].tolist() == [1, 2] and sample.label == 1
    path.write_text(
        '{"x": [[1, 2], [3]], "label": [{"box": [1, 2]}]}\n{"x": [[1, 2]], "label": []}\n'
    )
    source = open_table(path).parts["all"]
    with pytest.raises(UnreadableSample, match="Row 0 has lists of different lengths in 'x'"):
        source.get(0)
    assert source.get(1).inputs[UNNAMED].tolist() == [[1, 2]]
    write_images(tmp_path, ["pictures/a.png"])
    (tmp_path / "list.csv").write_text("file_name,label\npictures/a.png,3\n")
    source = open_table(tmp_path / "list.csv").parts["all"]
    assert load_image(inputs_of(source)[0], PLAIN).shape == (8, 8, 3) and labels_of(source) == [3]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"text,label\na,1\nb\n", "Line 3"),
        ("a.csv", b"", "no rows"),
        ("a.csv", b"text,label\n", "no rows"),
        ("a.csv", b'text,label\n"a,1\n', "can't be read"),
        ("a.csv", b"\xff\xfe\x00", "UTF-8"),
        ("a.tsv", b"a\tb\tc\td\nw\tx\ty\tz\n", "no header"),
        ("a.csv", b"height,width,label\n1.5,2,0\n", "name one 'text'"),
        ("a.jsonl", b'{"text": "a"}\n{', "Line 2"),
        ("a.jsonl", b"[1]\n", "no JSON object"),
    ],
)
def test_bad_text_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        open_table(tmp_path / name)


def test_sst2_opens() -> None:
    bundle = open_table(asset("sst2/dev.tsv"))
    source = bundle.parts["all"]
    assert source.length == 872 and set(labels_of(source)) == {0, 1}
    assert inputs_of(source)[0] == "one long string of cliches" and labels_of(source)[0] == 0
    folder = asset("sst2")
    assert is_table(folder)
    lengths = {part: each.length for part, each in open_table(folder).parts.items()}
    assert lengths == {"train": 6920, "search": 872, "test": 1821}


def test_without_pyarrow_the_install_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=r"pip install 'profiling-agent\[parquet\]'"):
        open_table(tmp_path / "a.parquet")
