"""What is known of a workload once acquisition has seen it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from profiling_agent.records.base import Record

SplitName = Literal["calibration", "search", "test"]


class InputSpec(Record):
    """One input of the model's forward; ``shape`` without the batch axis.

    ``shape`` and ``dtype`` are those after preprocessing, ``raw_dtype`` that of the arrays before
    it, which ``serve.py`` is given: images are bytes there and floats in the model.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = Field(description="numpy's name, such as float32 or int64")
    raw_dtype: str | None = Field(default=None, description="likewise; None where it isn't known")
    found_by: str = Field(default="data", description="data, configuration or probing")


ImageMode = Literal["RGB", "BGR", "L"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


class ImageTransform(Record):
    """From an image file to the raw array of one sample: decode, resize, crop, all by Pillow.

    ``resize`` is the length of the shorter side, or (height, width); ``crop`` the (height, width)
    cut from the middle, with zeros beyond the border. The result is bytes, (height, width) for the
    mode L and (height, width, 3) for RGB and BGR (RGB with its channels reversed).
    """

    mode: ImageMode = "RGB"
    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    interpolation: Interpolation = "bilinear"
    source: str = Field(default="none stated", description="where these values come from")


class Preprocessing(Record):
    """From raw arrays to the model's input: ``(x * scale - mean) / std``, then layout.

    ``layout`` is that of the raw array of one sample: ``hw``, ``hwc``, ``chw`` (images; the model
    gets ``chw``) or ``none`` (passed on as it is). Mean and std are per channel, or empty.
    """

    layout: Literal["none", "hw", "hwc", "chw"] = "none"
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    source: str = Field(default="none stated", description="where these values come from")
    image: ImageTransform | None = Field(
        default=None, description="how files became raw arrays; None when the data were arrays"
    )


class Overrides(Record):
    """Preprocessing the user asked for in place of what the model and the data state.

    A single number does for mean and std, and for a crop that is square.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    mode: ImageMode | None = None
    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    interpolation: Interpolation | None = None

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _one_for_all(cls, value: object) -> object:
        return (value,) if isinstance(value, int | float) else value

    @field_validator("crop", mode="before")
    @classmethod
    def _square(cls, value: object) -> object:
        return (value, value) if isinstance(value, int) else value


class WorkloadSource(Record):
    """What the user named, so that a fresh process finds it again; None for a live object."""

    model: str | None
    weights: str | None = Field(default=None, description="a file, or 'random'")
    data: str | None = None
    test_data: str | None = None
    classes: str | None = Field(default=None, description="a file, one class a line")
    answers: Literal["all", "present"] = Field(
        default="all", description="whether a prediction may be any class or one of those present"
    )
    metric: str = Field(default="accuracy", description="accuracy, agreement or a file's function")
    metric_name: str = "accuracy"
    metric_sha256: str | None = Field(default=None, description="of a user's metric, as written")
    unit: str = "points"
    higher_is_better: bool = True
    overrides: Overrides = Overrides()
    max_length: int | None = Field(default=None, description="tokens of a text at most")
    trust_remote_code: bool = False


class SplitInfo(Record):
    """One split: which samples, proven by a hash of their bytes."""

    name: SplitName
    num_samples: int
    labelled: bool
    sha256: str


class Reading(Record):
    """How fast samples were read and decoded, and how many could not be."""

    samples_per_s: float
    num_workers: int
    num_unreadable: int = 0


class Task(Record):
    """What is asked of the model; ``unit`` is that of ``max_drop``.

    ``accuracy`` and ``agreement`` (with the original's own answers) are in percent and their drop
    in points; any other metric is a function of the user's, in its own unit. ``num_classes`` is
    None for outputs that are not logits of classes. ``answers`` are the classes a prediction may
    be; empty means all.
    """

    metric: str = "accuracy"
    unit: str = "points"
    higher_is_better: bool = True
    num_classes: int | None
    output_shape: tuple[int, ...] = Field(default=(), description="of one sample's output")
    class_names: tuple[str, ...] = ()
    answers: tuple[int, ...] = ()

    @property
    def has_classes(self) -> bool:
        """Whether outputs are logits of classes to choose from."""
        return (self.num_classes or 0) > 1


class WorkloadRecord(Record):
    """The workload without its tensors."""

    schema_version: Literal[1] = 1
    name: str
    source: WorkloadSource
    num_parameters: int
    weight_bytes: int
    model_sha256: str = Field(description="of the names and values of all weights and buffers")
    inputs: tuple[InputSpec, ...]
    preprocessing: Preprocessing
    task: Task
    splits: tuple[SplitInfo, ...]
    available: dict[SplitName, int] = Field(
        default={}, description="samples of each split before any were left out to thin them"
    )
    reading: Reading | None = None
    notes: tuple[str, ...] = ()

    def same_as(self, other: WorkloadRecord | None) -> bool:
        """Whether two acquisitions gave the same, however long they took."""
        drop = {"reading": None}
        return other is not None and self.model_copy(update=drop) == other.model_copy(update=drop)

    def split(self, name: SplitName) -> SplitInfo:
        return next(split for split in self.splits if split.name == name)
