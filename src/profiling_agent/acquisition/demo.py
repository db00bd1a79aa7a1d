"""``demo:vit`` and ``demo:resnet``: trained networks and their data, shipped with the package.

Made by the recipes in ``examples/fashion_mnist`` from Fashion-MNIST (Xiao et al. 2017, MIT).
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from profiling_agent.acquisition.demo_models import DemoResNet, DemoViT
from profiling_agent.errors import ModelError

DEMO_FOLDER = Path(__file__).parent / "demo_data"
DEMO_DATA = DEMO_FOLDER / "fashion_mnist.npz"
DEMO_REFERENCE = "demo"  # what stands in a source for the demo's data
DEMO_MODELS: dict[str, type[nn.Module]] = {"demo:vit": DemoViT, "demo:resnet": DemoResNet}


def is_demo(reference: str) -> bool:
    return reference.startswith("demo:")


def build_demo(reference: str) -> nn.Module:
    """The untrained network of a ``demo:`` reference; ``ModelError`` when there is none."""
    if reference not in DEMO_MODELS:
        known = " and ".join(repr(name) for name in DEMO_MODELS)
        raise ModelError(f"There is no demo called {reference!r}; there are {known}.")
    return DEMO_MODELS[reference]()


def demo_weights(reference: str) -> Path:
    """The shipped weights of a ``demo:`` reference."""
    return DEMO_FOLDER / f"{reference.removeprefix('demo:')}.safetensors"
