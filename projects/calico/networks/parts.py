"""Blocks that several networks share."""

from __future__ import annotations

import torch
import torch.distributed.nn.functional as collective
import torch.nn.functional as F
from torch import Tensor, nn

from projects.calico.model_config import SecondConfig
from vlmkd import distributed
from vlmkd.errors import UserError

BN_EPS = 1e-3
"""Of the LiDAR branch and the decoder (BEVFusion); the camera branch and the heads have torch's."""
_BatchNorm = nn.modules.batchnorm._BatchNorm


class RowNorm(nn.BatchNorm1d):
    """BatchNorm over rows [n, C]; fewer than two rows, which have no variance, take the running statistics."""

    def forward(self, rows: Tensor) -> Tensor:
        if len(rows) > 1 or not self.training:
            return super().forward(rows)
        known = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(rows, *known, training=False, eps=self.eps)


class SharedNorm(_BatchNorm):
    """BatchNorm over the rows [n, C, ...] of all ranks, in float32 whatever the precision of the run.

    Ranks may bring different n, also none, and come here as often as each other. Fewer than two rows in all take the
    running statistics.
    """

    def forward(self, rows: Tensor) -> Tensor:
        given, axes, shape = rows.float(), [0, *range(2, rows.ndim)], [1, -1, *[1] * (rows.ndim - 2)]
        mean, var = self.running_mean.float(), self.running_var.float()
        count = torch.tensor(rows.numel() / rows.shape[1])
        if self.training and (total := distributed.total(count).item()) > 1:
            mean = _summed(given.sum(axes)) / total
            var = _summed((given - mean.reshape(shape)).square().sum(axes)) / total
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                self.running_var.lerp_((var * total / (total - 1)).to(self.running_var), self.momentum)
        scale = self.weight.float() * (var + self.eps).rsqrt()
        found = (given - mean.reshape(shape)) * scale.reshape(shape) + self.bias.float().reshape(shape)
        return found.to(rows.dtype)


def _summed(value: Tensor) -> Tensor:
    """Over all ranks, with gradients."""
    return value if distributed.world_size() == 1 else collective.all_reduce(value)


def share_norms(module: nn.Module) -> nn.Module:
    """`module` with a SharedNorm of the same state in the place of every BatchNorm."""
    if isinstance(module, _BatchNorm) and not isinstance(module, SharedNorm):
        if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, RowNorm):
            raise UserError(
                f"the image backbone has {type(module).__name__}, which several ranks cannot share and half precision cannot"
                " run; use one rank in fp32, or another model.camera.encoder"
            )
        norm = SharedNorm(module.num_features, module.eps, module.momentum)
        norm.load_state_dict(module.state_dict())
        norm.requires_grad_(module.weight.requires_grad)  # of a teacher it is frozen
        return norm.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, share_norms(child))
    return module


def rank_share(count: Tensor | float, least: float = 0.0, extra: float = 0.0) -> Tensor:
    """What a rank divides its sum by, so that the mean over ranks is the sum of all over their count.

    The count of all is at least `least`, and `extra` is added to it.
    """
    total = distributed.total(torch.as_tensor(count, dtype=torch.float32))
    return (total.clamp(min=least) + extra) / distributed.world_size()


def conv_block(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, eps: float = 1e-5
) -> nn.Sequential:
    """Convolution without a bias that keeps the size (divided by `stride`), BatchNorm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, eps), nn.ReLU(inplace=True))


class SecondWithFpn(nn.Module):
    """SECOND's backbone and pyramid (Yan et al. 2018), as in BEVFusion: all stages' maps at one size, concatenated.

    The first convolution of a stage has its stride, `layers` more follow; a map becomes `ups` times as large (0.5 halves).
    `stride` is the size of the input's map over that of the output's.
    """

    def __init__(self, inputs: int, cfg: SecondConfig) -> None:
        super().__init__()
        self.stride, self.out_channels = round(min(cfg.sizes)), sum(cfg.fpn_widths)
        stages, levels = nn.ModuleList(), nn.ModuleList()
        for count, width, step in zip(cfg.layers, cfg.widths, cfg.strides, strict=True):
            first = conv_block(inputs, width, stride=step, eps=BN_EPS)
            stages.append(nn.Sequential(first, *(conv_block(width, width, eps=BN_EPS) for _ in range(count))))
            inputs = width
        for inputs, width, up in zip(cfg.widths, cfg.fpn_widths, cfg.ups, strict=True):
            scale, layer = round(max(up, 1 / up)), nn.ConvTranspose2d if up >= 1 else nn.Conv2d
            conv = layer(inputs, width, scale, stride=scale, bias=False)
            levels.append(nn.Sequential(conv, nn.BatchNorm2d(width, BN_EPS), nn.ReLU(inplace=True)))
        # Two levels of names, as files have them.
        self.backbone, self.fpn = nn.ModuleDict({"stages": stages}), nn.ModuleDict({"levels": levels})

    def forward(self, bev: Tensor) -> Tensor:
        maps = []
        for stage, level in zip(self.backbone["stages"], self.fpn["levels"], strict=True):
            bev = stage(bev)
            maps.append(level(bev))
        return torch.cat(maps, 1)
