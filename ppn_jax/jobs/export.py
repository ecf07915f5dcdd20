"""A run's detector written in another format, and checked there."""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ppn_jax import storage
from ppn_jax.data.bad_examples import BadExamples, spread_examples
from ppn_jax.data.images import decoding as images_lib
from ppn_jax.data.images import folders
from ppn_jax.data.source import Source
from ppn_jax.data.splits import names_data, open_split
from ppn_jax.data.transforms.basic import Resize
from ppn_jax.detection.structures import Detections, Example, unlabelled_example
from ppn_jax.detector import Detector
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.export import metadata, stablehlo, tensorflow
from ppn_jax.export.comparison import TOLERANCES, Difference, compare, is_wrong, latency
from ppn_jax.export.formats import Options
from ppn_jax.export.runtimes import ExportedDetector, open_export
from ppn_jax.run import Run, build_detector, load_variables
from ppn_jax.storage import local_path

CHECKED_IMAGES = 20


@dataclasses.dataclass(frozen=True)
class Export:
  """What came of an export.

  Attributes:
    path: the file, or folder.
    step: of the run.
    size: in bytes, of what is needed to run it.
    images: how many it was checked on.
    difference: from JAX on them.
    latency: seconds of a call in its runtime.
    jax_latency: the same in JAX on this machine.
  """
  path: pathlib.Path
  step: int
  size: int
  images: int
  difference: Difference
  latency: float
  jax_latency: float


def export(run: Run, output: pathlib.Path, options: Options, *, step: int | None = None,
           ema: bool | None = None, folder: pathlib.Path | None = None,
           say: Callable[[str], None] = print) -> Export:
  """Writes `output`, which appears only once its runtime has found what JAX finds.

  Args:
    run: see `run.open_run`.
    output: a new file; of a SavedModel a new folder.
    options: see there.
    step: a saved step; the newest by default.
    ema: as in `evaluation.job.Options`.
    folder: of pictures to calibrate on and check with; by default the run's data, the training
      split for calibration and the evaluation split for the check. Other files in it, and
      pictures that cannot be read, are passed over and named; images of the run's data that
      cannot be read are, if its `data.on_bad_example` is 'skip'.
    say: told what goes on, a line at a time.

  Raises:
    InputError: `output` exists, there are no images, a library is missing, the format cannot
      express the model, or the written file detects something else than JAX.
  """
  check_new(output, options)
  output, folder = local_path(output), None if folder is None else local_path(folder)
  run.check_average(ema, '--ema')
  if options.format != 'stablehlo':
    tensorflow.check_libraries(options)
  detector, reference = _detectors(run, options)
  pictures = _Pictures(run, detector.image_size, folder, say)
  checked = pictures.take('eval', CHECKED_IMAGES)
  step, variables = load_variables(run, reference, sharding.data_mesh(
      jax.local_devices()[:1]), step=step, ema=ema, say=say)
  variables = jax.device_get(variables)
  say(f'writing step {step:,} as {options.format}, {options.precision}')
  output.parent.mkdir(parents=True, exist_ok=True)
  with storage.partial_folder(output) as temporary:
    path = temporary / output.name
    _write(path, detector, variables, options, pictures)
    metadata.attach(path, _describe(run, detector, options, step))
    say(f'checking it on {len(checked)} images')
    exported = open_export(path)
    made = check(exported, jax.jit(reference.detect), variables, checked, options)
    size = size_of(path)
    check_new(output, options)
    for part in sorted(temporary.iterdir(), key=lambda p: p.name == output.name):
      shutil.move(part, output.parent / part.name)
  return Export(output, step, size, len(checked), *made)


def check_new(output: str | pathlib.Path, options: Options) -> None:
  """Raises InputError if `output`, or a file that goes with it, exists or is not local."""
  if '://' in str(output):
    raise InputError(f'--output={output} must be a local file')
  output = local_path(output)
  with_it = [metadata.beside(output, s) for s in ('.json', '.npz')]
  for path in (output, *(with_it if options.format == 'stablehlo' else ())):
    if path.exists() or path.is_symlink():
      raise InputError(f'--output: {path} exists; give a new name')


def check(exported: ExportedDetector, detect: Callable, variables: Any, images: np.ndarray,
          options: Options) -> tuple[Difference, float, float]:
  """(difference from JAX, seconds of a call, of one in JAX).

  Raises:
    InputError: the difference is more than the precision explains.
  """
  size, tolerance = options.batch_size or 1, TOLERANCES[options.precision]
  expected = [detect(variables, image[None]) for image in images]
  expected = Detections(*map(np.concatenate, zip(*jax.device_get(expected), strict=True)))
  difference = compare(expected, exported(images), tolerance)
  if is_wrong(difference, tolerance):
    raise InputError(
        f'the written {options.format} file is wrong and was not kept: {difference.missing} of '
        f'{difference.detections} detections on {len(images)} images differ from those of JAX by '
        f'more than {tolerance.boxes} in boxes or {tolerance.scores} in scores'
        + '; take float16, or more --calibration_images' * (options.precision == 'int8'))
  batch = np.resize(images, (size, *images.shape[1:]))
  return (difference, latency(exported, batch),
          latency(lambda x: jax.block_until_ready(detect(variables, x)), batch))


def size_of(path: pathlib.Path) -> int:
  """Bytes of a file, or of all in a folder."""
  return sum(p.stat().st_size for p in (path.rglob('*') if path.is_dir() else [path])
             if p.is_file())


def _detectors(run: Run, options: Options) -> tuple[Detector, Detector]:
  """The run's detector in the form to write, and the one to compare with.

  TensorFlow's formats are given convolutions as such, and compute in float32.
  """
  if options.format == 'stablehlo':
    return (run.detector(),) * 2
  config = run.config.copy_and_resolve_references()
  with config.unlocked():
    config.model.layers.dtype = 'float32'
    reference = build_detector(config)
    config.model.layers.conv_form = 'native'
  return build_detector(config), reference


def _write(path: pathlib.Path, detector: Detector, variables: Any, options: Options,
           pictures: '_Pictures') -> None:
  shape = stablehlo.input_shape(options.batch_size, detector.image_size)
  if options.format == 'stablehlo':
    stablehlo.write(path, detector.detect, shape, variables)
    return
  calibration = ()
  if options.precision == 'int8':
    images = pictures.take('train', options.calibration_images)
    calibration = [np.resize(images[i:i + options.batch_size], shape.shape)
                   for i in range(0, len(images), options.batch_size)]
  tensorflow.write(path, lambda x: detector.detect(variables, x), shape, options,
                         calibration)


def _describe(run: Run, detector: Detector, options: Options, step: int) -> dict[str, Any]:
  return metadata.describe(
      options, image_size=detector.image_size, resize=run.config.data.resize,
      labels=[c.name for c in run.categories], category_ids=[c.id for c in run.categories],
      step=step, model=run.config.model.to_dict())


@dataclasses.dataclass(frozen=True)
class _Pictures:
  """Images as the run's detector takes them, from its data or from a folder."""
  run: Run
  side: int
  folder: pathlib.Path | None
  say: Callable[[str], None]

  def take(self, split: str, count: int) -> np.ndarray:
    """At most `count` images, spread over a split: u8 [N, S, S, 3]."""
    resize = Resize(self.side, self.run.config.data.resize)
    found = [resize(example).image for example in self._examples(split, count)]
    if not found:
      where = f'in {self.folder}' if self.folder else f'in data.{split}'
      raise InputError(f'there are no images {where} that can be read, to check the export with; '
                       'give --images=FOLDER of other pictures')
    return np.stack(found)

  def _examples(self, split: str, count: int) -> Iterator[Example]:
    if self.folder is not None:
      source: Any = _Folder(*folders.list_folder(self.folder))
      if source.others:
        self.say(f'{self.folder}: {source.others}')
      policy, share = 'skip', 1.0
    else:
      source, data = self._source(split), self.run.config.data
      policy, share = data.on_bad_example, data.max_bad_share
    bad = BadExamples(f'data.{split}', len(source), policy, share)
    for _, example in spread_examples(source, count, bad.note):
      yield example
    for reason in bad.news():
      self.say(f'skipped: {reason}')

  def _source(self, split: str) -> Source:
    config = self.run.config
    if split == 'eval' and not (names_data(config.data.eval) or config.data.eval_fraction):
      split = 'train'  # A run that is not evaluated has no other images.
    try:
      return open_split(config, split)
    except InputError as e:
      raise InputError(f'images of data.{split} are needed and cannot be had: {e}; give '
                       '--images=FOLDER of any pictures like them') from e


@dataclasses.dataclass(frozen=True)
class _Folder:
  """Pictures of a folder, as `spread_examples` takes them."""
  files: Sequence[str]
  others: str  # What else is there.

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> Example:
    return unlabelled_example(images_lib.load(self.files[index]))
