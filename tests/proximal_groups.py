"""Groups that are hard for the proximal operator: ties, extremes, and borders between its faces."""

import torch
from torch import Tensor

from oracles import elementary


def face_boundaries() -> Tensor:
    """Groups on or beside the borders between 2:4's faces at lam = 1, built from the stationary points themselves."""
    generator = torch.Generator().manual_seed(4)
    a = torch.rand(600, 4, generator=generator, dtype=torch.float64).sort(-1, descending=True).values
    a = a * torch.rand(600, 1, generator=generator, dtype=torch.float64) / (a[:, :1] + a[:, 1:2])
    a[:150, 3] = 0  # the fourth entry leaves zero
    a[:150, :2] *= (1 - torch.rand(150, 1, generator=generator, dtype=torch.float64) * 1e-3) / a[:150, :2].norm(
        dim=-1, keepdim=True
    )
    a[150:300, 3] *= 10 ** (-6 * torch.rand(150, generator=generator, dtype=torch.float64))
    a[300:450, 3] = 0
    slopes = torch.stack([elementary(a[:, [j for j in range(4) if j != i]], 2) for i in range(4)], -1)
    z = a + slopes
    z[450:] = z[450:, :1] * torch.tensor([1.0, 0.5, 0.5, 0.5]) + 1e-4 * z[450:]
    return z


ADVERSARIAL = [
    [1.0, 1.0, 1.0, 1.0],
    [0.3, 0.3, 0.3, 0.3],
    [0.4625, 0.4625, 0.4625, 0.4625],
    [0.8752, 0.8752, 0.8752, 0.8752],
    [0.8754, 0.8754, 0.8754, 0.8753],
    [1.1, 1.1, 1.1, 1.1],
    [1.2, 1.2, 0.7, 0.0],
    [0.0, 0.0, 0.0, 0.0],
    [1.0, 0.0, 0.0, 0.0],
    [1.0, 1.0, 0.0, 0.0],
    [1.0, 1.0, 1.0, 0.0],
    [0.5, 0.5, 0.5, 0.0],
    [1.0, 1e-6, 1e-6, 1e-6],
    [0.5, 1e-5, 1e-5, 1e-5],
    [0.957, 0.0619, 0.0609, 0.0609],
    [0.9721, 0.037, 0.0364, 0.0364],
    [0.6275407, 0.4807009, 0.4347347, 0.4073444],
    [1e-3, 1e-3, 1e-6, 1e-6],
    [1.0, 1e-30, 1e-30, 1e-30],
    [1e-18, 1e-18, 1e-36, 1e-36],
]
