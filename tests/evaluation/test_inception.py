"""The Inception network of FID: names and shapes of the published file, its three peculiarities, its loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from sfumato.errors import ModelFileError
from sfumato.evaluation import inception as ours


@pytest.fixture(scope="module")
def network() -> ours.Inception:
    torch.manual_seed(0)
    return ours.Inception().eval()


def test_size_and_shapes(network: ours.Inception) -> None:
    """Inception v3 without its side branch has 23,834,568 parameters; eight more classes take 2,049 each."""
    assert sum(p.numel() for p in network.parameters()) == 23_834_568 + 8 * 2049
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in network.named_children():
        module.register_forward_hook(lambda m, i, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 299, 299)).shape == (1, 2048)
    expected = {
        "Conv2d_4a_3x3": (192, 71, 71), "Mixed_5d": (288, 35, 35), "Mixed_6a": (768, 17, 17),
        "Mixed_6e": (768, 17, 17), "Mixed_7a": (1280, 8, 8), "Mixed_7c": (2048, 8, 8),
    }  # fmt: skip
    assert expected.items() <= shapes.items()


def test_names_are_the_published_ones(network: ours.Inception) -> None:
    names = [n for n in network.state_dict() if not n.endswith("num_batches_tracked")]
    assert len(names) == 94 * 5 + 2  # 94 convolutions with the four tensors of their normalisation; fc
    for name in (
        "Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch3x3dbl_3.bn.running_var", "Mixed_6a.branch3x3.conv.weight",
        "Mixed_6c.branch7x7dbl_5.conv.weight", "Mixed_7a.branch7x7x3_4.bn.bias", "Mixed_7b.branch3x3dbl_3b.conv.weight",
        "Mixed_7c.branch_pool.bn.weight", "fc.bias",
    ):  # fmt: skip
        assert name in names, name


def test_averages_leave_the_border_out_and_the_last_block_takes_a_maximum(network: ours.Inception) -> None:
    """With zeros at the border an average of ones would not be ones everywhere; a maximum of a peak is a plateau."""
    with torch.no_grad():
        flat = network.Mixed_7b(torch.ones(1, 1280, 8, 8))[:, -192:]
        assert torch.allclose(flat, flat[:, :, :1, :1].expand_as(flat), atol=1e-6)
        x = torch.rand(1, 2048, 8, 8, generator=torch.Generator().manual_seed(0))
        highest = network.Mixed_7c.branch_pool(F.max_pool2d(x, 3, 1, 1))
        assert torch.equal(network.Mixed_7c(x)[:, -192:], highest)


def test_loading(network: ours.Inception, tmp_path: Path) -> None:
    own = {n: t for n, t in network.state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(own, tmp_path / "inception.safetensors")
    features = ours.inception(tmp_path / "inception.safetensors")
    picture = torch.randint(256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x = F.interpolate(picture / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    with torch.no_grad():
        assert torch.equal(features(picture), network(x))
    assert features.name == "Inception" and len(features.sha256) == 64


def test_other_pickles_and_other_networks_are_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ModelFileError, match="pickle"):
        ours.inception(tmp_path / "other.pth")
    save_file({"fc.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelFileError, match="do not fit"):
        ours.inception(tmp_path / "other.safetensors")
