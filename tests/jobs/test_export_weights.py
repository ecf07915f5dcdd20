"""A run's weights file, in the hands of somebody who has nothing else."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from PIL import Image
from tiny import tiny_config, untrained_run

import ppn_jax
from ppn_jax.cli.main import main
from ppn_jax.config import plain
from ppn_jax.detection.structures import Category
from ppn_jax.distributed import sharding
from ppn_jax.errors import InputError
from ppn_jax.export import weights_file
from ppn_jax.export.weights_file import read_weights_file
from ppn_jax.inspection import inspect_run
from ppn_jax.jobs.evaluate import evaluate
from ppn_jax.jobs.export_weights import _without_folders
from ppn_jax.run import open_model, open_run

SHAPES = ('circle', 'square', 'triangle', 'star', 'cross')  # Of the synthetic data.
EVAL = plain(tiny_config().data.eval)
EVAL_FLAGS = [f'--config.data.eval.{key}={value}' for key, value in EVAL.items()]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Returns a run with averages, of which step 6 is evaluated."""
  workdir = untrained_run(tmp_path_factory.mktemp('runs') / 'mine', (3, 6), ema_decay=0.9,
                          categories=[Category(i + 1, name) for i, name in enumerate(SHAPES)])
  evaluate(workdir)
  return workdir


def export(run, path, *flags):
  assert main(['export', f'--workdir={run}', '--format=weights', f'--output={path}', *flags]) == 0
  return path


@pytest.fixture(scope='module')
def shared(run, tmp_path_factory):
  return export(run, tmp_path_factory.mktemp('shared') / 'mine.safetensors')


def variables_of(model, **options):
  step, variables = model.load_variables(model.detector(), sharding.data_mesh(), **options)
  return step, flatten_dict(jax.device_get(variables))


@pytest.mark.slow
@pytest.mark.parametrize('flags, options', [
    ([], {}), (['--step=3'], {'step': 3}), (['--no-ema'], {'ema': False})])
def test_the_variables_of_a_step(run, tmp_path, flags, options):
  path = export(run, tmp_path / 'a.safetensors', *flags)
  step, expected = variables_of(open_run(run), **options)
  found_step, found = variables_of(open_model(path))
  assert found_step == step and found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value, strict=True)


@pytest.mark.slow
def test_what_the_file_says(run, shared, tmp_path, capsys):
  header = read_weights_file(shared).header
  provenance = header['provenance']
  scores = json.loads((run / 'evaluation' / '6' / 'scores.json').read_text())
  assert provenance == {
      'ppn_jax': ppn_jax.__version__, 'run': 'mine', 'average': True, 'images': 6,
      'metrics': scores['figures'], 'started_from': []}
  assert header['preprocessing']['shape'] == ['any', 64, 64, 3]
  assert header['thresholds'] == {'score_threshold': 1e-8, 'iou_threshold': 0.6}
  assert str(run.parent).encode() not in shared.read_bytes()
  again = export(run, tmp_path / 'b.safetensors')
  assert again.read_bytes() == shared.read_bytes()
  assert ', step 6, AP 0.' in capsys.readouterr().out
  raw = read_weights_file(export(run, tmp_path / 'c.safetensors', '--no-ema')).header['provenance']
  assert raw['metrics'] == {} and not raw['average']


@pytest.mark.slow
def test_the_metrics_are_those_of_the_run(run, shared, tmp_path, capsys):
  assert main(['evaluate', f'--model={shared}', f'--output={tmp_path / "scores"}', *EVAL_FLAGS,
               '--config.eval.batch_size=4', '--report']) == 0
  assert '6 images' in capsys.readouterr().out
  for name in ('results.json', 'scores.json'):
    found, expected = (json.loads((folder / name).read_text())
                       for folder in (tmp_path / 'scores', run / 'evaluation' / '6'))
    if name == 'scores.json':
      checkpoint = found.pop('scored'), expected.pop('scored')
      assert [c['images'] for c in checkpoint] == [6, 6] and checkpoint[0]['checkpoint'] is None
    assert found == expected
  assert 'mine.safetensors, step 6' in (tmp_path / 'scores' / 'report.html').read_text()
  in_python = evaluate(shared, data=EVAL, output=tmp_path / 'python')
  assert in_python.metrics == json.loads(
      (run / 'evaluation' / '6' / 'scores.json').read_text())['figures']


@pytest.mark.slow
def test_data_of_a_config_file(shared, tmp_path):
  """The data come from the config file, the resizing from the weights file."""
  (tmp_path / 'data_of_mine.py').write_text(
      'from ppn_jax.config import base_config\ndef get_config():\n  config = base_config()\n'
      f'  config.data.eval = {EVAL!r}\n  config.eval.batch_size = 4\n'
      "  config.data.resize = 'legacy'\n  config.model.image_size = 32\n  return config\n")
  assert main(['evaluate', f'--model={shared}', f'--output={tmp_path / "scores"}',
               f'--config={tmp_path / "data_of_mine.py"}']) == 0
  assert evaluate(shared, data=EVAL, output=tmp_path / 'python').metrics == json.loads(
      (tmp_path / 'scores' / 'scores.json').read_text())['figures']


ALONE = """
import json, sys
import numpy as np
import ppn_jax
detector = ppn_jax.load(sys.argv[1])
assert not {'orbax', 'optax', 'hotcoco', 'ppn_jax.run'} & set(sys.modules), sorted(sys.modules)
found = detector(np.load(sys.argv[2]), threshold=0)
json.dump([detector.step, detector.categories, found.boxes.tolist(), found.scores.tolist()],
          open(sys.argv[3], 'w'))
"""


@pytest.mark.slow
def test_a_fresh_process_without_the_run(run, shared, tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
  np.save(tmp_path / 'image.npy', image)
  shutil.copy(shared, tmp_path / 'copy.safetensors')
  subprocess.run([sys.executable, '-c', ALONE, 'copy.safetensors', 'image.npy', 'found.json'],
                 check=True, cwd=tmp_path)
  step, categories, boxes, scores = json.loads((tmp_path / 'found.json').read_text())
  expected = ppn_jax.load(run)(image, threshold=0)
  assert (step, [name for _, name in categories]) == (6, list(SHAPES))
  assert len(scores) > 0 and scores == expected.scores.tolist()
  assert boxes == expected.boxes.tolist()


@pytest.mark.slow
def test_detect_and_summary(run, shared, tmp_path, capsys):
  Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(tmp_path / 'a.png')
  found = []
  for flag in (f'--model={shared}', f'--workdir={run}'):
    output = tmp_path / f'found{len(found)}'
    assert main(['detect', str(tmp_path / 'a.png'), flag, f'--output={output}']) == 0
    found.append([e['detections'] for e in json.loads((output / 'detections.json').read_text())])
  assert found[0] == found[1]
  capsys.readouterr()
  for flag in (f'--model={shared}', f'--workdir={run}'):
    assert main(['summary', flag]) == 0
    found.append(capsys.readouterr().out)
  assert found[2] == found[3]


@pytest.mark.slow
def test_a_file_is_exported_again(run, shared, tmp_path, capsys):
  half, full = tmp_path / 'half.safetensors', tmp_path / 'full.safetensors'
  assert main(['export', f'--model={shared}', '--format=weights', '--precision=float16',
               f'--output={half}']) == 0
  assert 'changed by at most 0.000' in capsys.readouterr().out
  assert half.stat().st_size < shared.stat().st_size
  assert half.read_bytes() == export(
      run, tmp_path / 'h.safetensors', '--precision=float16').read_bytes()
  assert main(['export', f'--model={half}', '--format=weights', f'--output={full}']) == 0
  _, exact = variables_of(open_model(shared))
  _, rounded = variables_of(open_model(full))
  for name, value in exact.items():
    np.testing.assert_array_equal(
        rounded[name], value.astype(np.float16).astype(np.float32) if value.ndim > 1 else value)


@pytest.mark.slow
def test_a_program_from_a_file(shared, tmp_path, capsys):
  pytest.importorskip('flatbuffers')
  Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(tmp_path / 'a.png')
  args = ['export', f'--model={shared}', '--format=stablehlo', f'--output={tmp_path / "x"}']
  assert main(args) == 2
  assert 'mine.safetensors names no images to check' in capsys.readouterr().err
  assert main([*args, f'--images={tmp_path}']) == 0
  assert main(['export', f'--model={tmp_path / "x"}', '--format=weights',
               f'--output={tmp_path / "y.safetensors"}']) == 2
  assert 'is neither the workdir of a run nor a weights file' in capsys.readouterr().err


@pytest.mark.slow
def test_inspection(shared):
  inspected = inspect_run(shared, data=EVAL)
  assert inspected.step == 6 and inspected.compare(0).size[0] > 0
  inspected.training()


@pytest.mark.slow
@pytest.mark.parametrize('command, message', [
    ('evaluate --model=FILE', 'is a weights file, so there is no workdir to write to; give --out'),
    ('evaluate --model=FILE --output=DIR', 'names no data to evaluate on; give some, such as --'),
    ('evaluate --model=FILE --output=DIR --step=6 EVAL', 'step chooses among the weights of a run'),
    ('evaluate --model=FILE --output=DIR --ema EVAL', '--ema chooses among the weights of a run'),
    ('evaluate --model=FILE --output=DIR --steps=all EVAL', 'for the checkpoints of a run'),
    ('evaluate --model=FILE --output=DIR --follow EVAL', 'for the checkpoints of a run'),
    ('evaluate --workdir=FILE', 'is not the folder of a run; a weights file is given by --model='),
    ('evaluate --output=DIR', 'one of the arguments --workdir --model is required'),
    ('evaluate --model=none.safetensors --output=DIR EVAL', 'no file none.safetensors; give a'),
    ('evaluate --model=FILE --output=DIR EVAL --config.data.eval_fraction=0.1',
     'which images are held out'),
    ('detect a.png --workdir=FILE --output=DIR', 'is not the folder of a run; an exported file is'),
    ('detect a.png --model=FILE --step=6 --output=DIR', '--step and --ema choose among the check'),
    ('export --model=FILE --format=weights --output=DIR', 'must end in .safetensors'),
    ('export --model=FILE --format=weights --output=FILE', 'exists; give a new name'),
    ('export --model=FILE --format=weights --output=NEW --batch_size=2', 'has no batch size'),
    ('export --model=FILE --format=weights --output=NEW --precision=int8', 'is for format tflite'),
    ('export --model=FILE --format=weights --output=NEW --images=.', 'leave it out'),
    ('export --model=FILE --format=weights --output=NEW --step=6', 'step chooses among'),
    ('export --workdir=FILE --format=weights --output=NEW', 'a weights file is given by --model='),
    ('import-tf --checkpoint=FILE --config=quickstart --workdir=DIR', 'which needs no import'),
    ('summary --model=a.png', 'neither the workdir of a run nor a weights file')])
def test_mistakes(shared, tmp_path, monkeypatch, capsys, command, message):
  monkeypatch.chdir(tmp_path)
  Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save('a.png')
  words = [word.replace('FILE', str(shared)).replace('DIR', 'dir').replace('NEW', 'n.safetensors')
           for word in command.split()]
  words = [w for word in words for w in (EVAL_FLAGS if word == 'EVAL' else [word])]
  assert main(words) == 2
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1, error
  assert [p.name for p in tmp_path.iterdir()] == ['a.png']


def rewritten(shared, path, change):
  """Writes the file again after a change to its config and values, with a checksum that fits."""
  file = read_weights_file(shared)
  config, values = json.loads(json.dumps(file.header['config'])), dict(file.values)
  change(config, values)
  header = {key: value for key, value in file.header.items() if key not in ('version', 'config')}
  weights_file.write_weights_file(path, values, step=file.step, categories=file.categories,
                                  config=config, **header)
  return path


HEAD = ('params', 'head', 'box_bias')


@pytest.mark.slow
@pytest.mark.parametrize('change, message', [
    (lambda c, v: c['model']['head'].update(depth=8), r'is \[16\], and \[8\] in that model'),
    (lambda c, v: c['model']['backbone'].update(last_block=4), 'is not a variable of that model'),
    (lambda c, v: c['model']['backbone'].update(last_block=6), 'is missing'),
    (lambda c, v: v.pop(HEAD), 'params/head/box_bias is missing'),
    (lambda c, v: c['model'].update(num_classes=4), 'a model of 4 classes with 5 names'),
    (lambda c, v: c['model'].update(image_size='64'), 'image_size'),
    (lambda c, v: c['model']['head'].update(depht=8), "no option 'depht'"),
    (lambda c, v: c['model']['neck'].update(name='none'), "unknown neck 'none'"),
    (lambda c, v: c.update(model=3), 'its config cannot be used'),
    (lambda c, v: c['model']['backbone'].update(name='planted:Net'), '--allow=planted')])
def test_a_file_that_does_not_fit_its_own_config(shared, tmp_path, import_from, change, message):
  (tmp_path / 'planted.py').write_text('raise AssertionError("imported")')
  import_from(tmp_path)
  path = rewritten(shared, tmp_path / 'a.safetensors', change)
  with pytest.raises(InputError, match=message) as caught:
    ppn_jax.load(path)
  assert '\n' not in str(caught.value)


@pytest.mark.slow
def test_keys_of_a_newer_version_are_ignored(shared, tmp_path, capsys):
  path = rewritten(shared, tmp_path / 'a.safetensors', lambda c, v: c['data'].update(colour=1))
  assert main(['summary', f'--model={path}']) == 0
  assert 'does not know and ignores: data.colour' in capsys.readouterr().err


@pytest.mark.slow
def test_a_component_that_is_allowed(shared, tmp_path, import_from):
  (tmp_path / 'my_nets.py').write_text('from ppn_jax.models.mobilenet_v1 import MobileNetV1 as Net')
  import_from(tmp_path)
  path = rewritten(shared, tmp_path / 'a.safetensors',
                   lambda c, v: c['model']['backbone'].update(name='my_nets:Net'))
  assert ppn_jax.load(path, allow=('my_nets',)).step == 6


def test_files_of_hugging_face(tmp_path, capsys):
  path = tmp_path / 'model.safetensors'
  path.write_bytes(safetensors.numpy.save({'vit.weight': np.ones(3)}, {'format': 'pt'}))
  assert main(['detect', str(path), f'--model={path}', f'--output={tmp_path / "x"}']) == 2
  with pytest.raises(InputError, match='a safetensors file of another program'):
    ppn_jax.load(path)


@pytest.mark.parametrize('line, expected', [
    ('/home/me/runs/a: a run of 3 classes, step 6', 'a: a run of 3 classes, step 6'),
    ('/my work/b c/a d: a run', 'a d: a run'), ('a: b/c.pb: a PPN', 'c.pb: a PPN'),
    ('gs://bucket/runs/a: a run (step 3: damaged)', 'a: a run (step 3: damaged)'),
    ('/x/a: a run (/home/me/a/checkpoints/3 is damaged)', 'a: a run (3 is damaged)')])
def test_reports_lose_their_folders(line, expected):
  assert _without_folders((line, 'random: head/class_bias')) == [expected,
                                                                 'random: head/class_bias']
  assert _without_folders(()) == []
