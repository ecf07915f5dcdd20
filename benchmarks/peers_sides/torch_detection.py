"""Assignment, loss and non-maximum suppression as a PyTorch user would write them.

The results equal those of ppn_jax.detection. Crowds are left out, since the benchmark has none.
"""

import torch
import torch.nn.functional as F

try:
  from torchvision.ops import nms
except (ImportError, RuntimeError):  # RuntimeError if it was built for another PyTorch.
  nms = None

CANDIDATES = 512


def iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
  """Returns the IoU [..., N, M] of boxes [..., N, 4] and [M, 4]."""
  a, b = a[..., :, None, :], b[None, :, :]
  sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(0)
  overlap = sides[..., 0] * sides[..., 1]
  union = _area(a) + _area(b) - overlap
  return overlap / union.clamp_min(1e-20)


def _area(boxes: torch.Tensor) -> torch.Tensor:
  return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


@torch.no_grad()
def assign(anchors: torch.Tensor, ground_truth: dict[str, torch.Tensor], spec: dict):
  """Returns codes [B, A, 4], labels [B, A] and positive [B, A]."""
  count = ground_truth['labels'].shape[1]
  overlap = iou(ground_truth['boxes'], anchors).masked_fill(~ground_truth['valid'][..., None], -1)
  best, match = overlap.max(1)
  # Each ground-truth box forces its best anchor to match it; the first box wins a tie.
  best_anchor = overlap.argmax(2)
  order = torch.arange(count, device=anchors.device).expand_as(best_anchor)
  order = order.masked_fill(~ground_truth['valid'], count)
  forced_box = torch.full_like(match, count).scatter_reduce(1, best_anchor, order, 'amin')
  claimed = forced_box < count
  match = torch.where(claimed, forced_box, match)
  positive = claimed | (best >= spec['matched_iou'])
  matched = ground_truth['boxes'].gather(1, match[..., None].expand(-1, -1, 4))
  return _encode(matched, anchors), ground_truth['labels'].gather(1, match), positive


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
              ground_truth: dict[str, torch.Tensor], spec: dict) -> torch.Tensor:
  """Computes focal loss plus smooth L1, divided by the number of positive anchors."""
  target_codes, labels, positive = assign(anchors, ground_truth, spec)
  number = positive.sum().clamp_min(1)
  one_hot = torch.zeros_like(logits).scatter_(2, labels[..., None], positive[..., None].float())
  cross_entropy = F.binary_cross_entropy_with_logits(logits, one_hot, reduction='none')
  missing = (one_hot - logits.sigmoid()).abs()  # 1 - p_t
  if spec['gamma'] != 2:
    raise ValueError(f'written for gamma 2, not {spec["gamma"]}')
  weight = (1 - spec['alpha']) + (2 * spec['alpha'] - 1) * one_hot
  classification = (weight * missing.square() * cross_entropy).sum()
  errors = F.smooth_l1_loss(codes, target_codes, reduction='none').sum(-1)
  localization = (errors * positive).sum() * (spec['localization_weight'] / 4)
  return (classification + localization) / number


def detect(codes: torch.Tensor, logits: torch.Tensor, anchors: torch.Tensor, spec: dict
           ) -> tuple[torch.Tensor, ...]:
  """Returns boxes [B, K, 4], scores [B, K], labels [B, K] and valid [B, K].

  Greedy suppression goes from high scores to low, so the survivors among the best n pairs are the
  first survivors among all pairs. n is increased until there are enough, so the result is that of
  all pairs. (No class can reach its limit before all classes together have reached theirs.)
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
  # The pairs are sorted by score, so the first survivors are the best.
  order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :spec['max_detections']]
  pick = lambda x: x.gather(1, order)
  return (shown.gather(1, order[..., None].expand(-1, -1, 4)), pick(scores), pick(labels),
          pick(kept))


def _best_pairs(logits: torch.Tensor, n: int):
  """Returns the n best (anchor, class) pairs, which are in the n anchors of highest maximum."""
  num_anchors, num_classes = logits.shape[1:]
  rows = logits.amax(2).topk(min(n, num_anchors), 1).indices
  best, at = logits.gather(1, rows[..., None].expand(-1, -1, num_classes)).flatten(1).topk(n, 1)
  return best.sigmoid(), rows.gather(1, at // num_classes), at % num_classes


def _by_image(boxes, scores, labels, spec) -> torch.Tensor:
  kept = torch.zeros_like(scores, dtype=torch.bool)
  for image, of_class in enumerate(labels):
    # Boxes of different classes are moved apart, as in torchvision's batched_nms; float64 preserves
    # the overlaps.
    apart = boxes[image].double() + 4 * of_class[:, None]
    kept[image, _nms(apart, scores[image], spec['iou_threshold'])] = True
  return kept


def _by_group(boxes, scores, labels, spec) -> torch.Tensor:
  """Suppresses the pairs of several images at a time, because one image does not occupy a GPU.

  The number is limited, because the matrix of overlaps grows with the square of the pairs.
  """
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
  """Runs NMS without torchvision: passes over a matrix of overlaps until nothing changes.

  A box is kept unless an earlier box that is kept overlaps it. Starting with all boxes, pass i is
  correct for the first i boxes; in practice a few passes suffice.
  """
  order = scores.argsort(descending=True)
  suppressed_by = (iou(boxes[order], boxes[order]) > threshold).tril(-1).float()
  kept = torch.ones_like(suppressed_by[0])
  while True:
    new = (suppressed_by @ kept == 0).float()
    if torch.equal(new, kept):
      return order[kept.bool()]
    kept = new
