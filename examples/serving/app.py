"""An artefact behind HTTP: an uploaded image in, its label and the likeliest classes out.

    ARTEFACT=result/artefact uvicorn --factory app:create_app

``serve.py`` of the artefact starts where the image is an array. What is added here is what the
manifest leaves to whoever serves: decoding, resizing and cropping, with Pillow as acquisition does
it, to the bit. Needs numpy, pillow and the artefact's runtime; FastAPI for ``create_app`` alone.
"""

import importlib.util
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Pillow knows more, and starts other programs for some of them."""
MODES = {1: "L", 3: "RGB"}
"""By channels, where the manifest states no image transform."""


class BadImage(ValueError):
    """What was sent can't be used; the message is for whoever sent it."""


class Classifier:
    """The artefact in a folder, answering images as files have them; safe to share by threads.

    ``ValueError`` when the artefact takes anything but images or answers anything but classes.
    """

    def __init__(self, folder, threads=None):
        self.model = load_serve(Path(folder)).Model(folder, threads)
        self.manifest = self.model.manifest
        self.channels, *self.size = image_shape(self.manifest)
        if self.manifest["num_classes"] is None:
            raise ValueError("This artefact's outputs are not classes.")
        answers = self.manifest["answers"] or range(self.manifest["num_classes"])
        self.answers = np.array(answers)

    def describe(self):
        """What is served, for a health check."""
        return {name: self.manifest[name] for name in ("name", "runtime", "scheme")}

    def answer(self, content, top=5):
        """Label and the ``top`` likeliest classes of one image, given as the bytes of its file.

        Probabilities are the softmax of the logits over the classes that may be answered.
        ``BadImage`` when it can't be decoded or has another size than the artefact takes.
        """
        logits = self.model.logits(self.read(content)[None])[0]
        scores = logits[self.answers].astype(np.float64)
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        best = np.argsort(-shares, kind="stable")[: max(1, top)]
        classes = [
            {"label": self.label(self.answers[i]), "probability": float(shares[i])} for i in best
        ]
        return {"label": classes[0]["label"], "classes": classes}

    def label(self, index):
        """The name of a class, or its index where the manifest has no names."""
        names = self.manifest["class_names"]
        return names[index] if names else int(index)

    def read(self, content):
        """The raw array of one image, uint8, in the manifest's layout."""
        steps = self.manifest["preprocessing"]
        transform = steps["image"] or {"mode": MODES[self.channels], "resize": None, "crop": None}
        pixels = load_image(content, transform)
        height, width = pixels.shape[:2]
        if [height, width] != self.size:
            raise BadImage(
                f"The image comes to {width} x {height} pixels and must be {self.size[1]} x "
                f"{self.size[0]}; send it in that size."
            )
        if steps["layout"] == "hw":
            return pixels
        pixels = pixels.reshape(height, width, -1)
        return pixels.transpose(2, 0, 1) if steps["layout"] == "chw" else pixels


def load_serve(folder):
    """The module ``serve.py`` of an artefact."""
    spec = importlib.util.spec_from_file_location("artefact_serve", folder / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def image_shape(manifest):
    """(channels, height, width) of the artefact's one input; ``ValueError`` when it is no image."""
    specs, layout = manifest["inputs"], manifest["preprocessing"]["layout"]
    if len(specs) != 1 or layout == "none" or specs[0]["shape"][0] not in MODES:
        names = ", ".join(f"{spec['name']} {tuple(spec['shape'])}" for spec in specs)
        raise ValueError(f"This artefact takes {names} with the layout {layout!r}, not an image.")
    raw = specs[0].get("raw_dtype") or "uint8"  # older manifests don't say
    if raw != "uint8":
        raise ValueError(
            f"This artefact was made with images as arrays of {raw}, and the manifest does not say "
            "how the bytes of a file become those."
        )
    return specs[0]["shape"]


def load_image(content, transform):
    """Decode, resize and crop as the manifest states; (height, width) or (height, width, 3)."""
    mode = "L" if transform["mode"] == "L" else "RGB"
    image = decode(content, mode)
    if transform["resize"] is not None:
        image = resize(image, transform["resize"], transform["interpolation"])
    if transform["crop"] is not None:
        image = crop(image, *transform["crop"])
    pixels = np.array(image)
    return pixels[..., ::-1] if transform["mode"] == "BGR" else pixels


def decode(content, mode):
    """The image in a file's bytes. Orientation in EXIF is not applied, as in training."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            refuse_large(image.width, image.height)
            if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
                image = image.convert("RGBA")  # the same pixels, without Pillow's warning
            return image.convert(mode)
    except BadImage:
        raise
    except Exception as error:  # Pillow's plugins raise many kinds at damaged files
        kinds = ", ".join(FORMATS)
        raise BadImage(
            f"The file can't be decoded as an image ({type(error).__name__}); send one of {kinds}."
        ) from error


def refuse_large(width, height):
    """``BadImage`` for an image that would take too much memory."""
    if width * height > MAX_PIXELS:
        raise BadImage(
            f"The image has or would be resized to {width} x {height} pixels; at most "
            f"{MAX_PIXELS:,} are taken."
        )


def resize(image, size, interpolation):
    """To (height, width), or with one number the shorter side to it, the longer rounded down."""
    if isinstance(size, int):
        longer = int(size * max(image.size) / min(image.size))
        size = (longer, size) if image.width <= image.height else (size, longer)
    height, width = size
    if (width, height) == image.size:
        return image
    refuse_large(width, height)
    return image.resize((width, height), resample=Image.Resampling[interpolation.upper()])


def crop(image, height, width):
    """The middle, rounded as torchvision does; zeros beyond the border."""
    top, left = margin(image.height, height), margin(image.width, width)
    return image.crop((left, top, left + width, top + height))


def margin(length, wanted):
    """Where the middle begins; negative when more is wanted than there is."""
    return -((wanted - length) // 2) if wanted > length else round((length - wanted) / 2)


def create_app(folder=None, threads=None):
    """The web application of ``$ARTEFACT`` (else ``artefact``), with ``$THREADS`` threads."""
    from fastapi import FastAPI, HTTPException, Query, UploadFile

    folder = folder or os.environ.get("ARTEFACT", "artefact")
    threads = threads or int(os.environ.get("THREADS", "0")) or None
    classifier = Classifier(folder, threads)
    app = FastAPI(title=str(classifier.manifest["name"]))

    @app.get("/health")
    def health():
        return {"status": "ok", **classifier.describe()}

    @app.post("/predict")
    def predict(file: UploadFile, top: int = Query(5, ge=1, le=100)):
        content = file.file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise HTTPException(413, f"The file is larger than {MAX_BYTES:,} bytes.")
        try:
            return classifier.answer(content, top)
        except BadImage as error:
            raise HTTPException(422, str(error)) from error

    return app
