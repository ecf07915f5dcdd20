"""PPN on MobileNet-v1 as a PyTorch user would write it, channels-last with fused batch norm."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class ConvNorm(nn.Module):
  """Convolution with TensorFlow's SAME padding, batch norm, ReLU6."""

  def __init__(self, depth: int, features: int, side: int, stride: int, groups: int, spec: dict):
    super().__init__()
    self.side, self.stride = side, stride
    self.conv = nn.Conv2d(depth, features, side, stride, groups=groups, bias=False)
    self.norm = batch_norm(features, spec)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return F.relu6(self.norm(same_conv(self.conv, x)))


class FoldedConv(nn.Module):
  """`ConvNorm` for inference, with batch norm folded into kernel and bias."""

  def __init__(self, source: ConvNorm):
    super().__init__()
    self.conv = nn.utils.fusion.fuse_conv_bn_eval(source.conv, source.norm)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return F.relu6(same_conv(self.conv, x), inplace=True)


def batch_norm(features: int, spec: dict) -> nn.BatchNorm2d:
  return nn.BatchNorm2d(features, eps=spec['norm_epsilon'], momentum=1 - spec['norm_decay'])


def same_conv(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
  """Applies SAME padding, whose odd row comes last; Conv2d can only pad symmetrically."""
  side, stride = conv.kernel_size[0], conv.stride[0]
  (top, bottom), (left, right) = (_padding(n, side, stride) for n in x.shape[2:])
  if (top, left) != (bottom, right):
    x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
  return F.conv2d(x, conv.weight, conv.bias, stride, (top, left), 1, conv.groups)


def _padding(size: int, side: int, stride: int) -> tuple[int, int]:
  total = max((-(-size // stride) - 1) * stride + side - size, 0)
  return total // 2, total - total // 2


class Network(nn.Module):
  """Maps images u8 [B, S, S, 3] to box codes f32 [B, A, 4] and class logits f32 [B, A, C]."""

  def __init__(self, weights: dict[str, np.ndarray], spec: dict):
    super().__init__()
    self.num_levels, self.num_classes = spec['num_levels'], spec['num_classes']
    layers, depth = [], 3
    for i, stride in enumerate(spec['strides']):
      if i:
        layers.append(ConvNorm(depth, depth, 3, stride, depth, spec))
      features = weights[layer_name(2 * i) + '/kernel'].shape[-1]
      layers.append(ConvNorm(depth, features, 1 if i else 3, 1 if i else stride, 1, spec))
      depth = features
    self.layers = nn.Sequential(*layers)
    head = {name: weights[f'params/head/{name}_kernel'].shape[-1]
            for name in ('tower', 'box', 'class')}
    self.tower = nn.Conv2d(depth, head['tower'], 1, bias=False)
    self.norms = nn.ModuleList(batch_norm(head['tower'], spec) for _ in range(self.num_levels))
    self.box = nn.Conv2d(head['tower'], head['box'], 1)
    self.classes = nn.Conv2d(head['tower'], head['class'], 1)
    self.levels_folded = False
    self._load(weights)

  def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = images.permute(0, 3, 1, 2).to(torch.float32) * (2 / 255) - 1
    maps = [self.layers(x)]
    for _ in range(self.num_levels - 1):
      maps.append(F.max_pool2d(maps[-1], 2, ceil_mode=True))
    # The levels are concatenated, so that the shared convolutions run once.
    cells = [level.shape[2] * level.shape[3] for level in maps]
    x = self.tower(_side_by_side(maps))
    x = torch.cat([norm(level) for norm, level in zip(self.norms, x.split(cells, 2), strict=True)],
                  2)
    x = F.relu6(x).contiguous(memory_format=torch.channels_last)
    return self._rows(self.box(x), 4), self._rows(self.classes(x), self.num_classes)

  def _rows(self, x: torch.Tensor, width: int) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, width).float()

  def fold(self) -> None:
    """Folds the batch norms of the backbone into its convolutions, for inference."""
    self.layers = nn.Sequential(*(FoldedConv(layer) for layer in self.layers))

  def named_tensors(self):
    """Yields (name in ppn_jax, tensor) of every parameter and average."""
    for i, layer in enumerate(self.layers):
      yield layer_name(i) + '/kernel', layer.conv.weight
      yield from _norm_tensors(layer_name(i).removeprefix('params/') + '/norm', layer.norm)
    yield 'params/head/tower_kernel', self.tower.weight
    for i, norm in enumerate(self.norms):
      yield from _norm_tensors(f'head/norm_{i}', norm)
    for name, conv in (('box', self.box), ('class', self.classes)):
      yield f'params/head/{name}_kernel', conv.weight
      yield f'params/head/{name}_bias', conv.bias

  def _load(self, weights: dict[str, np.ndarray]) -> None:
    with torch.no_grad():
      for name, tensor in self.named_tensors():
        tensor.copy_(torch.from_numpy(to_torch(name, weights[name])))

  def export(self) -> dict[str, np.ndarray]:
    """Returns parameters and averages in the layouts of ppn_jax."""
    return {name: from_torch(name, tensor.detach().float().cpu().numpy())
            for name, tensor in self.named_tensors()}


def _side_by_side(maps: list[torch.Tensor]) -> torch.Tensor:
  """Concatenates the levels [B, D, h, w] to [B, D, all cells, 1], channels-last."""
  rows = torch.cat([m.permute(0, 2, 3, 1).flatten(1, 2) for m in maps], 1)
  return rows.unsqueeze(2).permute(0, 3, 1, 2)


def layer_name(index: int) -> str:
  """Returns the name of a layer: first conv2d_0, then depthwise and pointwise alternating."""
  block, part = divmod(index + 1, 2)
  if not index:
    return 'params/backbone/conv2d_0'
  return f"params/backbone/conv2d_{block}/{'pointwise' if part else 'depthwise'}"


def _norm_tensors(name: str, norm: nn.BatchNorm2d):
  yield f'params/{name}/scale', norm.weight
  yield f'params/{name}/bias', norm.bias
  yield f'batch_stats/{name}/mean', norm.running_mean
  yield f'batch_stats/{name}/var', norm.running_var


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
  """Converts a kernel from HWIO to OIHW; a depthwise kernel has one input channel in both."""
  return np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if name.endswith('kernel') else array


def from_torch(name: str, array: np.ndarray) -> np.ndarray:
  return array.transpose(2, 3, 1, 0) if name.endswith('kernel') else array
