"""Exports a detector to the format of another runtime and checks the result."""

import dataclasses
import logging
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ppn_jax import storage
from ppn_jax.data.bad_examples import BadExamples, evenly_spaced_examples
from ppn_jax.data.images import decoding as images_lib
from ppn_jax.data.images import folders
from ppn_jax.data.source import Source
from ppn_jax.data.splits import names_data, open_split
from ppn_jax.data.transforms.basic import Resize
from ppn_jax.detection.frame import ImageSize
from ppn_jax.detection.structures import Detections, Example, unlabelled_example
from ppn_jax.detector import Detector
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.export import stablehlo, tensorflow
from ppn_jax.export.comparison import TOLERANCES, Difference, compare, is_wrong, latency
from ppn_jax.export.formats import ExportOptions, companion_file, make_metadata, write_metadata
from ppn_jax.export.runtimes import ExportedDetector, open_export
from ppn_jax.jobs import mediapipe_file, postprocess_file
from ppn_jax.storage import local_path
from ppn_jax.trained_model import SharedModel, TrainedModel

logger = logging.getLogger(__name__)

CHECKED_IMAGES = 20


@dataclasses.dataclass(frozen=True)
class Export:
  """Result of an export.

  Attributes:
    path: the file or folder that was written.
    step: step of the run.
    size: size in bytes, without the files beside it.
    images: number of images on which it was checked.
    difference: difference from JAX on these images.
    latency: seconds per call in its runtime.
    jax_latency: seconds per call in JAX on this machine.
  """
  path: pathlib.Path
  step: int
  size: int
  images: int
  difference: Difference
  latency: float
  jax_latency: float


def export(run: TrainedModel, output: pathlib.Path, options: ExportOptions, *,
           step: int | None = None, ema: bool | None = None, folder: pathlib.Path | None = None
           ) -> Export:
  """Writes `output`, which appears only after its detections have been compared with JAX's.

  Args:
    run: the run or weights file, see `run.open_model`.
    output: a new file, or for a SavedModel a new folder.
    options: options of the export.
    step: a saved step; the newest by default.
    ema: True for the moving average of the weights, False for the weights themselves; None for the
      average if the run keeps one.
    folder: folder of images for calibration and for the check. By default the run's data is used,
      the training split for calibration and the evaluation split for the check. Other files in the
      folder, and images that cannot be read, are skipped and reported; unreadable images in the
      run's data are skipped if its `data.on_bad_example` is 'skip'.

  Raises:
    InputError: If `output` exists, there are no images, a library is missing, the format cannot
      express the model, or the detections of the written file differ from JAX's.
  """
  check_new(output, options)
  if options.layout == 'mediapipe':
    mediapipe_file.check_supported(run.config, options)
  if options.layout == 'detection_postprocess':
    postprocess_file.check_supported(run.config, options)
  output, folder = local_path(output), None if folder is None else local_path(folder)
  run.check_average(ema, '--ema')
  if options.format != 'stablehlo':
    tensorflow.check_libraries(options)
  detector, reference = _detectors(run, options)
  images = _Images(run, detector.image_size, folder)
  checked = images.load('eval', CHECKED_IMAGES)
  step, variables = run.load_variables(reference, sharding.data_mesh(
      jax.local_devices()[:1]), step=step, ema=ema)
  variables = jax.device_get(variables)
  logger.info(f'writing step {step:,} as {options.format}, {options.precision}')
  output.parent.mkdir(parents=True, exist_ok=True)
  with storage.partial_folder(output) as temporary:
    path = temporary / output.name
    _write(path, run, detector, variables, options, images)
    write_metadata(path, _make_metadata(run, detector, options, step, ema))
    if options.layout == 'mediapipe':
      mediapipe_file.attach_anchors(path, detector.anchors)
    logger.info(f'checking it on {len(checked)} images')
    exported = open_export(path)
    measured = check(exported, jax.jit(reference.detect), variables, checked, options)
    if options.layout == 'mediapipe':
      mediapipe_file.check(path, checked, options.precision)
    size = size_of(path)
    check_new(output, options)
    for part in sorted(temporary.iterdir(), key=lambda p: p.name == output.name):
      shutil.move(part, output.parent / part.name)
  return Export(output, step, size, len(checked), *measured)


def check_new(output: str | pathlib.Path, options: ExportOptions) -> None:
  """Raises InputError if `output` or a file that accompanies it exists, or if it is not local."""
  if '://' in str(output):
    raise InputError(f'--output={output} must be a local file')
  output = local_path(output)
  companions = [companion_file(output, s) for s in ('.json', '.npz')]
  for path in (output, *(companions if options.format == 'stablehlo' else ())):
    if path.exists() or path.is_symlink():
      raise InputError(f'--output: {path} exists; give a new name')


def check(exported: ExportedDetector, detect: Callable, variables: Any, images: np.ndarray,
          options: ExportOptions) -> tuple[Difference, float, float]:
  """Returns the difference from JAX, the seconds per call, and the seconds per call in JAX.

  Raises:
    InputError: If the difference is larger than the precision explains.
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
        + '; use float16, or more --calibration_images' * (options.precision == 'int8'))
  batch = np.resize(images, (size, *images.shape[1:]))
  return (difference, latency(exported, batch),
          latency(lambda x: jax.block_until_ready(detect(variables, x)), batch))


def size_of(path: pathlib.Path) -> int:
  """Returns the size of a file, or of all files in a folder, in bytes."""
  return sum(p.stat().st_size for p in (path.rglob('*') if path.is_dir() else [path])
             if p.is_file())


def _detectors(run: TrainedModel, options: ExportOptions) -> tuple[Detector, Detector]:
  """Returns the run's detector in the form to write, and the one to compare with.

  For TensorFlow's formats, convolutions have their native form and are computed in float32. No file
  depends on the processor of the machine that writes it.
  """
  if options.format == 'stablehlo':
    automatic = run.config.model.layers.matmul_dtype == 'auto'
    return (run.detector(matmul_dtype='same' if automatic else None),) * 2
  exact = {'dtype': 'float32', 'matmul_dtype': 'same'}
  return run.detector(**exact, conv_form='native'), run.detector(**exact)


def _write(path: pathlib.Path, run: TrainedModel, detector: Detector, variables: Any,
           options: ExportOptions, images: '_Images') -> None:
  shape = stablehlo.input_shape(options.batch_size, detector.image_size)
  if options.format == 'stablehlo':
    stablehlo.write(path, detector.detect, shape, variables)
    return
  load_images = lambda: images.load('train', options.calibration_images)
  if options.layout == 'mediapipe':
    mediapipe_file.write(path, detector, variables, options, load_images)
    return
  if options.layout == 'detection_postprocess':
    postprocess_file.write(path, detector, variables, options, run.config, load_images)
    return
  calibration = ()
  if options.precision == 'int8':
    pixels = load_images()
    calibration = [np.resize(pixels[i:i + options.batch_size], shape.shape)
                   for i in range(0, len(pixels), options.batch_size)]
  tensorflow.write(path, lambda x: detector.detect(variables, x), shape, options, calibration)


def _make_metadata(run: TrainedModel, detector: Detector, options: ExportOptions, step: int,
                   ema: bool | None) -> dict[str, Any]:
  point = run.operating_point(step, ema=ema)
  decoder = run.config.postprocess.to_dict() if options.layout == 'mediapipe' else None
  return make_metadata(
      options, image_size=detector.image_size, resize=run.config.data.resize,
      resize_mode=run.config.data.resize_mode, labels=[c.name for c in run.categories],
      category_ids=[c.id for c in run.categories], step=step, model=run.config.model.to_dict(),
      operating_point=point and point.describe(), decoder=decoder)


@dataclasses.dataclass(frozen=True)
class _Images:
  """Images at the size of the run's detector, from the run's data or from a folder."""
  run: TrainedModel
  image_size: ImageSize
  folder: pathlib.Path | None

  def load(self, split: str, count: int) -> np.ndarray:
    """Returns at most `count` images, evenly spaced in a split: u8 [N, S, S, 3]."""
    data = self.run.config.data
    resize = Resize(self.image_size, data.resize, resize_mode=data.resize_mode)
    found = [resize(example).image for example in self._examples(split, count)]
    if not found:
      where = f'in {self.folder}' if self.folder else f'in data.{split}'
      raise InputError(f'there are no readable images {where} to check the export with; give '
                       'another folder of images with --images=FOLDER')
    return np.stack(found)

  def _examples(self, split: str, count: int) -> Iterator[Example]:
    if self.folder is not None:
      source: Any = _Folder(*folders.list_folder(self.folder))
      if source.others:
        logger.warning(f'{self.folder}: {source.others}')
      if not source.files:
        return
      policy, share = 'skip', 1.0
    else:
      source, data = self._source(split), self.run.config.data
      policy, share = data.on_bad_example, data.max_bad_share
    bad = BadExamples(f'data.{split}', len(source), policy, share)
    for _, example in evenly_spaced_examples(source, count, bad.record):
      yield example
    for reason in bad.new_reasons():
      logger.warning(f'skipped: {reason}')

  def _source(self, split: str) -> Source:
    config = self.run.config
    if split == 'eval' and not (names_data(config.data.eval) or config.data.eval_fraction):
      split = 'train'  # A run without evaluation data has no other images.
    if isinstance(self.run, SharedModel):
      raise InputError(f'{self.run.name} names no images to check the export with; give a '
                       'folder of some with --images=FOLDER')
    try:
      return open_split(config, split)
    except InputError as e:
      raise InputError(f'images of data.{split} are needed but cannot be opened: {e}; give a '
                       'folder of similar images with --images=FOLDER') from e


@dataclasses.dataclass(frozen=True)
class _Folder:
  """Images of a folder as a sequence of examples."""
  files: Sequence[str]
  others: str  # Describes the other files in the folder.

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> Example:
    return unlabelled_example(images_lib.load(self.files[index]))
