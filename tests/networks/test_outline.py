"""Networks that are only outlined: names and shapes, no memory, no random numbers, and not torch's compiler."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

from sfumato.networks.outline import made_on
from sfumato.networks.unet_2d import UNet2DConfig, UNet2DModel

CONFIG = UNet2DConfig(
    sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, num_class_embeds=3,
    down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
)  # fmt: skip


def test_names_and_shapes_are_those_of_the_network() -> None:
    before = torch.get_rng_state()
    with made_on("meta"):
        outlined = UNet2DModel(CONFIG).state_dict()
    assert torch.equal(torch.get_rng_state(), before) and all(t.is_meta for t in outlined.values())
    made = UNet2DModel(CONFIG).state_dict()
    assert {name: t.shape for name, t in outlined.items()} == {name: t.shape for name, t in made.items()}


def test_elsewhere_weights_are_drawn() -> None:
    found = []
    for device in (None, "cpu"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            if device is None:
                made = nn.ModuleList([nn.Embedding(4, 3), nn.Linear(3, 2)])
            else:
                with made_on(device):
                    made = nn.ModuleList([nn.Embedding(4, 3), nn.Linear(3, 2)])
        found.append(made.state_dict())
    assert all(torch.equal(t, found[1][name]) and t.std() > 0 for name, t in found[0].items())


def test_the_compiler_is_not_imported() -> None:
    code = (
        "import sys\nfrom torch import nn\nfrom sfumato.networks.outline import made_on\n"
        "with made_on('meta'):\n    nn.Embedding(3, 2).weight.data.normal_()\nprint('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"
