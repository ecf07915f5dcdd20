"""Assignment, objective and non-maximum suppression as a PyTorch user writes them.

The figures are those of ppn_jax.detection; crowds are left out, since the benchmark has none.
"""

import torch
import torch.nn.functional as F

try:
  from torchvision.ops import nms
except (ImportError, RuntimeError):  # The latter: built for another PyTorch.
  nms = None

CANDIDATES = 512


def iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
  """[..., N, 4], [M, 4] -> [..., N, M]."""
  a, b = a[..., :, None, :], b[None, :, :]
  sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(0)
  overlap = sides[..., 0] * sides[..., 1]
  union = _area(a) + _area(b) - overlap
  return overlap / union.clamp_min(1e-20)


def _area(boxes: torch.Tensor) -> torch.Tensor:
  return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


@torch.no_grad()
def assign(anchors: torch.Tensor, truth: dict[str, torch.Tensor], spec: dict):
  """-> (codes [B, A, 4], labels [B, A], positive [B, A])."""
  count = truth['labels'].shape[1]
  overlap = iou(truth['boxes'], anchors).masked_fill(~truth['valid'][..., None], -1)
  best, match = overlap.max(1)
  # Each truth box claims its best anchor; where several do, the first gets it.
  claims = overlap.argmax(2)
  order = torch.arange(count, device=anchors.device).expand_as(claims)
  order = order.masked_fill(~truth['valid'], count)
  claimant = torch.full_like(match, count).scatter_reduce(1, claims, order, 'amin')
  claimed = claimant < count
  match = torch.where(claimed, claimant, match)
  positive = claimed | (best >= spec['matched_iou'])
  matched = truth['boxes'].gather(1, match[..., None].expand(-1, -1, 4))
  return _encode(matched, anchors), truth['labels'].gather(1, match), positive


def _center_and_size(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
  size = boxes[..., 2:] - boxes[..., :2]
  return boxes[..., :2] + size / 2, size


def _encode(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
  center, size = _center_and_size(boxes)
  anchor_center, anchor_size = _center_and_size(anchors)
  size, anchor_size = size + 1e-8, anchor_size + 1e-8
  return torch.cat([10 * (center - anchor_center) / anchor_size,
                    5 * torch.log(size / anchor_size)], -1)


def _decode(codes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
  anchor_center, anchor_size = _center_and_size(anchors)
  center = codes[..., :2] / 10 * anchor_size + anchor_center
  half = torch.exp(codes[..., 2:] / 5) * anchor_size / 2
  return torch.cat([center - half, center + half], -1)


def objective(codes: torch.Tensor, logits: torch.Tensor, anchors: torch.Tensor,
              truth: dict[str, torch.Tensor], spec: dict) -> torch.Tensor:
  """Focal loss and smooth L1 over the number of positive anchors."""
  wanted_codes, labels, positive = assign(anchors, truth, spec)
  number = positive.sum().clamp_min(1)
  wanted = torch.zeros_like(logits).scatter_(2, labels[..., None], positive[..., None].float())
  cross_entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction='none')
  missing = (wanted - logits.sigmoid()).abs()  # 1 - p_t
  if spec['gamma'] != 2:
    raise ValueError(f'written for gamma 2, not {spec["gamma"]}')
  weight = (1 - spec['alpha']) + (2 * spec['alpha'] - 1) * wanted
  classification = (weight * missing.square() * cross_entropy).sum()
  errors = F.smooth_l1_loss(codes, wanted_codes, reduction='none').sum(-1)
  localization = (errors * positive).sum() * (spec['localization_weight'] / 4)
  return (classification + localization) / number


def detect(codes: torch.Tensor, logits: torch.Tensor, anchors: torch.Tensor, spec: dict
           ) -> tuple[torch.Tensor, ...]:
  """-> boxes [B, K, 4], scores [B, K], labels [B, K], valid [B, K].

  Greedy suppression goes from high scores to low, so the survivors among the best n pairs are
  what it finds first on all pairs. n is enlarged until there are enough; the result is that of
  all pairs. (No class can fill its quota before all of them together have filled theirs.)
  """
  if spec['max_per_class'] < spec['max_detections']:
    raise ValueError('written for max_per_class of at least max_detections')
  boxes, n = _decode(codes, anchors), CANDIDATES
  suppress = _by_image if codes.device.type == 'cpu' else _by_group
  while True:
    scores, at, labels = _best_pairs(logits, n)
    picked = boxes.gather(1, at[..., None].expand(-1, -1, 4))
    shown = picked.clamp(0, 1)
    kept = suppress(picked, scores, labels, spec) & (scores > spec['score_threshold'])
    kept &= (shown[..., 2:] > shown[..., :2]).all(-1)
    if n >= logits[0].numel() or int(kept.sum(1).min()) >= spec['max_detections']:
      break
    n = min(4 * n, logits[0].numel())
  # The pairs are in order of score: the first survivors are the best.
  order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :spec['max_detections']]
  pick = lambda x: x.gather(1, order)
  return (shown.gather(1, order[..., None].expand(-1, -1, 4)), pick(scores), pick(labels),
          pick(kept))


def _best_pairs(logits: torch.Tensor, n: int):
  """The n best pairs in order: the n anchors of the best maxima hold them all."""
  num_anchors, num_classes = logits.shape[1:]
  rows = logits.amax(2).topk(min(n, num_anchors), 1).indices
  best, at = logits.gather(1, rows[..., None].expand(-1, -1, num_classes)).flatten(1).topk(n, 1)
  return best.sigmoid(), rows.gather(1, at // num_classes), at % num_classes


def _by_image(boxes, scores, labels, spec) -> torch.Tensor:
  kept = torch.zeros_like(scores, dtype=torch.bool)
  for image, of_class in enumerate(labels):
    # Classes far apart, as torchvision's batched_nms lays them; in float64, which keeps overlaps.
    apart = boxes[image].double() + 4 * of_class[:, None]
    kept[image, _nms(apart, scores[image], spec['iou_threshold'])] = True
  return kept


def _by_group(boxes, scores, labels, spec) -> torch.Tensor:
  """Some images at a time, since a GPU wants more than the pairs of one; their table of overlaps
  grows with the square of their number."""
  batch, n = scores.shape
  size, kept = max(1, 16_384 // n), torch.zeros_like(scores, dtype=torch.bool)
  of_image = torch.arange(batch, device=boxes.device)[:, None] * spec['num_classes'] + labels
  apart = boxes.double() + 4 * of_image[..., None]
  for i in range(0, batch, size):
    found = _nms(apart[i:i + size].flatten(0, 1), scores[i:i + size].flatten(),
                 spec['iou_threshold'])
    kept[i:i + size].view(-1)[found] = True
  return kept


def _nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
  function = nms or _plain_nms
  return function(boxes, scores.to(boxes.dtype), threshold)


def _plain_nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
  """Without torchvision: one matrix of overlaps, and passes over it until nothing changes.

  A box stays unless an earlier one that stays overlaps it; starting from all, pass i settles the
  first i boxes, and it takes a handful of passes.
  """
  order = scores.argsort(descending=True)
  beaten_by = (iou(boxes[order], boxes[order]) > threshold).tril(-1).float()
  kept = torch.ones_like(beaten_by[0])
  while True:
    new = (beaten_by @ kept == 0).float()
    if torch.equal(new, kept):
      return order[kept.bool()]
    kept = new
