"""Writes docs/models.md, the page of the models that come with the package, from measurements.

  python docs/make_models.py

Figures come from benchmarks/results/zoo_cpu.json, which benchmarks/zoo.py prints, and texts from
the model cards beside the files. A test checks that the page is up to date.
"""

import json
import pathlib
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs' / 'models.md'
MEASURED = ROOT / 'benchmarks' / 'results' / 'zoo_cpu.json'
CARDS = ROOT / 'ppn_jax' / 'zoo'

HEAD = """# Models

This page is written by `python docs/make_models.py` from
[`benchmarks/results/zoo_cpu.json`](../benchmarks/results/zoo_cpu.json) and the model cards in
[`ppn_jax/zoo/`](../ppn_jax/zoo); do not edit it.

These detectors come with the package, so they need no download:

```
ppn detect --model=ppn_voc photo.jpg --output=found
```

```python
found = ppn_jax.load('ppn_voc')('photo.jpg', threshold=0.4)
```

Your own training starts from one with `--config.init.weights=ppn_voc`; classes of the same name
keep their columns.

They are small models, trained on 3,200 photographs of Pascal VOC 2007 on two CPU cores. `ssd_voc`
is ahead because it starts from a whole SSD that has learned from COCO, not because it is an SSD:
from the same start, see [PPN against SSD](results.md#ppn-against-ssd). The paper's PPN was trained
on the 118,000 photographs of COCO on a cluster; nobody has repeated that here.

"""


def page() -> str:
  """Returns the text of the page."""
  measured = json.loads(MEASURED.read_text('utf-8'))
  cards = [_card(path) for path in sorted(CARDS.glob('*.md'))]
  return HEAD + '\n'.join([*_table(measured), '', *cards])


def _table(measured: dict[str, Any]) -> list[str]:
  first = measured['models'][0]
  processor = measured['cpu'].replace('(R)', '')
  lines = [
      f'Accuracy on {first["images"]} other photographs (AP is COCO\'s, VOC AP50 that of Pascal '
      f'VOC); milliseconds for a picture with NMS, on {measured["cpu_cores"]} cores of an '
      f'{processor}:', '',
      '| model | AP | AP50 | VOC AP50 | AP small / medium / large | parameters | FLOPs | MB | ms |',
      '|---|---|---|---|---|---|---|---|---|']
  for row in measured['models']:
    sizes = ' / '.join(f'{row[f"AP_{size}"]:.3f}' for size in ('small', 'medium', 'large'))
    parameters = f'{row["parameters"]:,}' if 'parameters' in row else 'the same'
    flops = f'{row["flops"] / 1e9:.2f}B' if 'flops' in row else 'the same'
    accuracy = ' | '.join(f'{row[name]:.3f}' for name in ('AP', 'AP50', 'VOC_AP50'))
    lines.append(f'| `{row["name"]}` | {accuracy} | {sizes} | {parameters} | {flops} | '
                 f'{row["megabytes"]} | {row["ms"]} |')
  return lines


def _card(path: pathlib.Path) -> str:
  """Returns a model card as a section of the page."""
  return path.read_text('utf-8').replace('\n#', '\n##').replace('# ', '## ', 1)


if __name__ == '__main__':
  PAGE.write_text(page(), 'utf-8')
