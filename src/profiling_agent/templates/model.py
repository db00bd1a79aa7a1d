"""Your model: a function without arguments that returns an nn.Module with its weights in it.

It is called in several processes, so it must build the same model every time. Pass it as
``model.py:model``, or leave this file out for ``hf:NAME``, ``timm:NAME`` or ``torchvision:NAME``.
"""

from __future__ import annotations

import torch
from torch import nn

NUM_CLASSES = 3


def model() -> nn.Module:
    """Replace this by your own, for instance:

    from my_package import Net
    net = Net()
    net.load_state_dict(torch.load(Path(__file__).with_name("weights.pt"), weights_only=True))
    return net.eval()

    Without ``load_state_dict``, --weights FILE (.safetensors or .pt) fills the model as well.
    """
    net = nn.Sequential(
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(3 * 8 * 8, 3 * 64),
        nn.ReLU(),
        nn.Linear(3 * 64, NUM_CLASSES),
    )
    _answer_the_brightest_channel(net)
    return net.eval()  # eval mode: no dropout, batch norms with what they learnt


def _answer_the_brightest_channel(net: nn.Sequential) -> None:
    """Stands in for training: the class of an image is its brightest colour."""
    first, last = net[2], net[4]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    with torch.no_grad():
        first.weight.copy_(torch.eye(3 * 64))
        first.bias.fill_(2.0)  # keeps what is normalised above zero, where relu lets it pass
        last.weight.copy_(torch.eye(NUM_CLASSES).repeat_interleave(64, dim=1) / 8)
        last.bias.zero_()
