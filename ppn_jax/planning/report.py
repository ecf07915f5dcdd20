"""Predicts rates, hours and host input of a run from an estimate, and formats them as text."""

from typing import Any, NamedTuple

from ppn_jax.planning.estimation import Estimate, parse_topology


class Prediction(NamedTuple):
  """Prediction for the whole slice; pairs are (pessimistic, optimistic).

  Fields:
    step_seconds: duration of a step.
    roofline: what limits the speed, 'memory' or 'arithmetic'.
    images_per_second: rate of the slice.
    host_images_per_second: rate at which each host must supply images.
    hours: duration of the configured run without evaluations; None if it does not apply.
  """
  step_seconds: tuple[float, float]
  roofline: str
  images_per_second: tuple[float, float]
  host_images_per_second: tuple[float, float]
  hours: tuple[float, float] | None


def predict(estimate: Estimate, images: int = 0) -> Prediction | None:
  """Scales an estimate to its slice; returns None if the program does not fit.

  Args:
    estimate: estimate of the program.
    images: number of images in the whole configured run; 0 if it does not apply.
  """
  e = estimate
  rates = sorted((e.images_per_second_by_cycles, e.images_per_second_by_bytes))
  if not e.fits or not rates[0]:
    return None
  whole = tuple(rate * e.chips for rate in rates)
  memory, arithmetic = e.hbm_bytes / e.bandwidth, e.flops / parse_topology(e.topology)[0].peak
  return Prediction(
      step_seconds=tuple(e.batch_per_chip / rate for rate in rates),
      roofline='memory' if memory >= arithmetic else 'arithmetic',
      images_per_second=whole, host_images_per_second=tuple(rate / e.hosts for rate in whole),
      hours=tuple(images / rate / 3600 for rate in whole) if images else None)


def as_json(estimate: Estimate, images: int = 0) -> dict[str, Any]:
  """Returns an estimate and its prediction as one JSON object."""
  prediction = predict(estimate, images)
  return {**estimate._asdict(), **(prediction._asdict() if prediction else {})}


def format_estimate(estimate: Estimate, images: int = 0) -> str:
  """Formats an estimate as a paragraph of plain text; `images` as in `predict`."""
  e, gib, prediction = estimate, 2**30, predict(estimate, images)
  slices = f'{e.slices} slices of ' if e.slices > 1 else ''
  lines = [f'{slices}{e.topology}: {e.chips} chip{"s" if e.chips > 1 else ""} on {e.hosts} '
           f'host{"s" if e.hosts > 1 else ""}, {e.program} at {e.batch_per_chip} images a chip',
           f'  {"fits" if e.fits else "does not fit"}: {e.peak_hbm / gib:.2f} GiB of HBM needed, '
           f'the chip has {e.hbm / gib:.0f}']
  if e.largest_batch is not None:
    lines.append(f'  largest batch that was found to fit: {e.largest_batch} images a chip')
  if prediction:
    lines += _rates(e, prediction)
  return '\n'.join([*lines, f'  compiled in {e.compile_seconds:.0f} s with '
                    f'{e.host_memory / gib:.1f} GiB of host memory'])


def _rates(e: Estimate, prediction: Prediction) -> list[str]:
  p = prediction
  lines = [
      f'  {e.images_per_second_by_cycles:,.0f} images/s a chip by cycles ({e.clock / 1e9:g} GHz), '
      f'{e.images_per_second_by_bytes:,.0f} by the roofline, which is {p.roofline} '
      f'({e.bandwidth / 1e9:,.0f} GB/s, {parse_topology(e.topology)[0].peak / 1e12:,.0f} TFLOP/s)',
      '  {:,.1f} to {:,.1f} ms a step; '.format(*(1e3 * s for s in reversed(p.step_seconds)))
      + '{:,.0f} to {:,.0f} images/s in all, '.format(*p.images_per_second)
      + '{:,.0f} to {:,.0f} for each host to feed'.format(*p.host_images_per_second),
      f'  {e.flops / 1e9:,.1f} GFLOP, {e.hbm_bytes / 1e9:,.2f} GB of HBM traffic a chip and step '
      f'({e.bytes_accessed / 1e9:,.2f} GB accessed by XLA\'s count)',
      '  collectives: ' + (', '.join(f'{n} {kind}, {size / 1e6:,.2f} MB' for kind, (n, size)
                                     in sorted((e.collectives or {}).items())) or 'none')]
  if e.slices > 1:
    count, size = e.across_slices
    lines.append(f'  to other slices: {count:,} transfers, {size / 1e6:,.2f} MB a device and step')
  if e.unestimated_sorts or e.unknown_loops:
    lines.append(f'  left out of the cycles: {e.unestimated_sorts} sorts; counted once: '
                 f'{e.unknown_loops} loops of unknown length')
  if p.hours:
    shortest, longest = (_duration(3600 * hours) for hours in reversed(p.hours))
    lines.append(f'  the configured run takes {shortest} to {longest}, without evaluations')
  return lines


def _duration(seconds: float) -> str:
  """Formats a duration: '3.4 hours', '5.0 minutes' or '0.3 seconds'."""
  for name, length in (('hours', 3600), ('minutes', 60)):
    if seconds >= length:
      return f'{seconds / length:,.1f} {name}'
  return f'{seconds:,.1f} seconds'
