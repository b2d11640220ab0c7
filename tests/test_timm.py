"""Models of timm by their structure, where timm and a torchvision that fits torch are installed."""

import pytest
import torch

import halve

try:
    import timm
except Exception as error:  # noqa: BLE001 - a torchvision built for another torch raises RuntimeError
    pytest.skip(f"timm cannot be imported: {type(error).__name__}: {error}", allow_module_level=True)


@pytest.mark.parametrize(
    ("name", "side", "matrices"),
    [
        ("vit_tiny_patch16_224", 224, 12 * 4),  # qkv, proj, fc1, fc2
        ("deit_tiny_patch16_224", 224, 12 * 4),
        ("convnext_atto", 64, (2 + 2 + 6 + 2) * 2 + 3),  # two pointwise in each block, and downsampling between stages
        ("resnet18", 64, 8 * 2 + 3),  # two in each block, and the shortcuts
    ],
)
def test_a_model_of_timm_is_pruned_on_a_tensor_of_pictures(name, side, matrices):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10).eval()
    pictures = torch.randn(8, 3, side, side)
    pruned = halve.prune(model, calibration=pictures, method="wanda", refit="none", device="cpu")
    assert pruned.record["calibration"]["pictures"] == [f"3 x {side} x {side}"]
    assert len(pruned.report.matrices) == matrices
    for matrix in pruned.report.matrices:
        groups = model.get_parameter(matrix.parameter).movedim(1, -1).reshape(-1, 4)  # channels at one tap
        assert int((groups != 0).sum(dim=1).max()) == 2
    assert model(pictures[:2]).isfinite().all()
