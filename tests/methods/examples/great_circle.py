"""SLERP (Shoemake 1985): two models along the great circle between them, tensor by tensor."""

import torch

from merganser.methods.base import Needs
from merganser.methods.elementwise import Elementwise


def _angle(whole, coefficients, options):  # type: ignore[no-untyped-def]
    sums = 0.0
    for piece in whole.pieces():
        one, two = (tensor.double() for tensor in whole.deltas(*piece))
        sums = sums + torch.stack([(one * two).sum(), one.square().sum(), two.square().sum()])
    return torch.acos((sums[0] / (sums[1] * sums[2]).sqrt().clamp_min(1e-300)).clamp(-1, 1))


def _between(base, tensors, coefficients, options, position):  # type: ignore[no-untyped-def]
    (one, two), angle, part = tensors, position.whole, coefficients[1] / sum(coefficients)
    if float(angle.sin()) < 1e-6:
        return one.lerp(two, part)
    weights = [float((share * angle).sin() / angle.sin()) for share in (1 - part, part)]
    return one * weights[0] + two * weights[1]


GREAT_CIRCLE = Elementwise(
    name="great_circle",
    title="Great circle",
    summary="two models along the great circle between them",
    needs=Needs(models=2),
    function=_between,
    reduce=_angle,
)
