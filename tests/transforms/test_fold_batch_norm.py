"""The folded convolution against the two layers it replaces, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flyweight.records import Plan, Step
from flyweight.transforms import Context, apply, plain_site


def conv_norm(conv: nn.Module, norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    with torch.no_grad():
        norm.running_mean.normal_()  # type: ignore[union-attr, operator]
        norm.running_var.uniform_(0.1, 4)  # type: ignore[union-attr, operator]
        if norm.weight is not None:
            norm.weight.normal_()  # type: ignore[operator]
            norm.bias.normal_()  # type: ignore[union-attr, operator]
    return nn.Sequential(conv, norm).double().eval()


CASES = {
    "bias": (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), (2, 3, 6, 6)),
    "no bias": (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-3), (2, 3, 6, 6)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2, stride=2), nn.BatchNorm2d(8), (2, 4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), nn.BatchNorm2d(4), (2, 4, 6, 6)),
    "conv1d": (nn.Conv1d(3, 4, 3, padding_mode="circular", padding=1), nn.BatchNorm1d(4), (2, 3, 6)),
    "conv3d": (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), (1, 2, 4, 4, 4)),
    "not affine": (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), (2, 3, 6, 6)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_function_stays_the_same(name: str) -> None:
    conv, norm, shape = CASES[name]
    model = conv_norm(conv, norm)
    step = Step("fold_batch_norm", "0", {"norm": "1"})
    found = apply(model, Plan((step,)), [plain_site(model, "0")], Context())
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.allclose(found(x), model(x), rtol=1e-10, atol=1e-10)
    assert isinstance(found[1], nn.Identity)
    assert isinstance(model[1], type(norm))


def test_frozen_weights_stay_frozen() -> None:
    model = conv_norm(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).requires_grad_(False)
    found = apply(
        model, Plan((Step("fold_batch_norm", "0", {"norm": "1"}),)), [plain_site(model, "0")], Context()
    )
    assert not any(p.requires_grad for p in found.parameters())


def test_a_norm_without_statistics_is_refused() -> None:
    from flyweight.errors import UsageError

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    with pytest.raises(UsageError, match="running statistics of 4 channels"):
        apply(
            model, Plan((Step("fold_batch_norm", "0", {"norm": "1"}),)), [plain_site(model, "0")], Context()
        )
