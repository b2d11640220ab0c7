"""Models of timm by their structure, where timm and a torchvision that fits torch are installed."""

import pytest
import torch

import halve
from halve.maths.pattern import Pattern

try:
    import timm
except Exception as error:  # noqa: BLE001 - a torchvision built for another torch raises RuntimeError
    pytest.skip(f"timm cannot be imported: {type(error).__name__}: {error}", allow_module_level=True)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_a_model_of_timm_is_pruned_on_a_tensor_of_pictures(name):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10, depth=2).eval()
    pictures = torch.randn(8, 3, 224, 224)
    pruned = halve.prune(model, calibration=pictures, method="wanda", refit="none", device="cpu")
    assert pruned.record["calibration"]["pictures"] == ["3 x 224 x 224"]
    assert len(pruned.report.matrices) == 2 * 4  # qkv, proj, fc1, fc2
    for matrix in pruned.report.matrices:
        weight = model.get_parameter(matrix.parameter)
        assert Pattern("2:4").satisfied_by(weight)
    assert model(pictures[:2]).isfinite().all()
