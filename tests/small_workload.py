"""A network small enough to train in a second, written to files as a user would have them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from profiling_agent.acquisition.workload import Split, Workload
from profiling_agent.records.workload import (
    InputSpec,
    Preprocessing,
    SplitInfo,
    Task,
    WorkloadRecord,
    WorkloadSource,
)

NUM_CLASSES, NUM_FEATURES, HIDDEN = 4, 16, 768

MODEL_FILE = f"""
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear({NUM_FEATURES}, {HIDDEN})
        self.fc2 = nn.Linear({HIDDEN}, {HIDDEN})
        self.head = nn.Linear({HIDDEN}, {NUM_CLASSES})

    def forward(self, x):
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))))

def model():
    return Net()

def broken():
    class Broken(Net):
        def forward(self, x):
            raise RuntimeError("no such luck")
    return Broken()
"""

DATA_FILE = """
from pathlib import Path
import numpy as np

def val():
    data = np.load(Path(__file__).with_name("data.npz"))
    return [(x, int(y)) for x, y in zip(data["x"], data["y"])]

def one_class():
    return [(x, 0) for x, _ in val()]

def empty():
    return []

def outside():
    return [(x, y + 2) for x, y in val()]

def shuffled():
    rng = np.random.default_rng(0)
    return [(x, int(rng.integers(4))) for x, _ in val()]
"""


class Net(nn.Module):
    """As in ``MODEL_FILE``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(NUM_FEATURES, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


def make_data(num_samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points (n, 16) labelled by the largest of four fixed directions."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(99).normal(size=(NUM_FEATURES, NUM_CLASSES))
    x = rng.normal(size=(num_samples, NUM_FEATURES)).astype(np.float32)
    return x, (x @ directions).argmax(axis=1)


def train() -> Net:
    """A network that is right on about 95 % of new points; trained once, a new copy each time."""
    net = Net()
    net.load_state_dict(_trained())
    return net.eval()


@cache
def _trained() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    x, y = (torch.from_numpy(array) for array in make_data(2500, seed=1))
    for _ in range(40):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.state_dict()


def write_project(folder: Path, num_samples: int = 3000) -> Path:
    """``model.py``, ``data.py``, ``data.npz`` and ``weights.safetensors`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(MODEL_FILE)
    (folder / "data.py").write_text(DATA_FILE)
    x, y = make_data(num_samples)
    np.savez(folder / "data.npz", x=x, y=y)
    save_file(train().state_dict(), folder / "weights.safetensors")
    return folder


def random_workload(
    model: nn.Module, shape: Sequence[int], num_samples: int = 33, num_classes: int = 4
) -> Workload:
    """A workload of a live model whose only data are random inputs to calibrate with."""
    info = SplitInfo(name="calibration", num_samples=num_samples, labelled=False, sha256="0")
    record = WorkloadRecord(
        name="tiny",
        source=WorkloadSource(model=None),
        num_parameters=sum(p.numel() for p in model.parameters()),
        weight_bytes=0,
        model_sha256="",
        inputs=(InputSpec(name="x", shape=tuple(shape), dtype="float32"),),
        preprocessing=Preprocessing(),
        task=Task(num_classes=num_classes),
        splits=(info,),
    )
    arrays = np.random.default_rng(0).standard_normal((num_samples, *shape), dtype=np.float32)
    split = Split(info=info, inputs={"x": arrays}, labels=None)
    return Workload(model=model.eval(), record=record, splits={"calibration": split})
