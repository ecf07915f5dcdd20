"""A whole run on the simulated cloud, as docs/rehearsal.md shows it."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import stand_in_cloud
from test_notebook import own_data
from test_tpu_script import HERE, TPU, cloud_with_ssh, configure  # noqa: F401 (a fixture)
from time_limits import HANG_SECONDS, wait_until
from tiny import CONFIG_FILE

CONFIG = CONFIG_FILE + """
_tiny = get_config
def get_config():
  config = _tiny().unlock()
  for split in ('train', 'eval'):
    config.data[split] = dict(name='coco_json', images='', annotations='')
  return config.lock()
"""


@pytest.mark.slow
def test_created_preempted_resumed_elsewhere_evaluated_and_deleted(
    cloud_with_ssh, tmp_path):  # noqa: F811
  cloud, workdir, log = cloud_with_ssh, tmp_path / 'run', tmp_path / 'log'
  own_data.draw_shapes(cloud / 'buckets' / 'b' / 'shapes', images=24)
  config = tmp_path / 'config.py'
  config.write_text(CONFIG.replace('{folder!r}', repr(str(HERE.parent))))
  (cloud / 'bin' / 'ppn').write_text(f'#!/bin/sh\nexec {sys.executable} -m ppn_jax.cli.main "$@"\n')
  configure(cloud, refusals=['', 'RESOURCE_EXHAUSTED: There is no more capacity in the zone', ''])
  data = [f'--config.data.{split}.{key}=~/ppn/data/{value}' for split in ('train', 'eval')
          for key, value in (('images', ''), ('annotations', 'annotations.json'))]
  with log.open('w') as output:
    run = subprocess.Popen(
        ['bash', str(TPU), 'run', '--name=mine', '--zone=us-a,us-b', '--type=v5litepod-8', '--spot',
         '--local', '--delete', '--poll=1', '--data=gs://b/shapes', '--', 'train',
         f'--config={config}', f'--workdir={workdir}', *data, '--config.train.batch_size=8',
         '--config.train.steps=120', '--config.train.checkpoint_every=20',
         '--config.train.log_every=20', '--config.train.keep_last=9'],
        stdout=output, stderr=subprocess.STDOUT, text=True)

  def wait_for(condition):
    wait_until(lambda: condition() or run.poll() is not None)
    assert run.poll() is None, log.read_text()

  def saved():
    return {int(p.name) for p in (workdir / 'checkpoints').glob('*') if p.name.isdigit()}

  wait_for(lambda: 20 in saved())
  home = tmp_path / 'evaluator'  # With its own copy of the data, as by --data.
  shutil.copytree(cloud / 'buckets' / 'b' / 'shapes', home / 'ppn' / 'data')
  follower = subprocess.Popen(
      [sys.executable, '-m', 'ppn_jax.cli.main', 'evaluate', f'--workdir={workdir}', '--follow',
       '--poll=0.5'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
      env={**os.environ, 'HOME': str(home)})
  try:
    wait_for(lambda: 40 in saved())
    stand_in_cloud.preempt()
    assert run.wait(timeout=HANG_SECONDS) == 0, log.read_text()
    scored, _ = follower.communicate(timeout=HANG_SECONDS)
  finally:
    follower.kill()
  shown = log.read_text()
  (tmp_path / 'follower').write_text(scored)
  assert follower.returncode == 0, scored
  for text in ('the config fits 8 devices, 1 images each', 'requesting v5litepod-8 as mine in us-a',
               'copying gs://b/shapes to ~/ppn/data of all workers', 'on 2 x cpu',
               'preempted; resuming from the last checkpoint',
               'requesting v5litepod-8 as mine in us-b', f'resuming {workdir} from step',
               'the command has ended: exit:0 exit:0', 'tpu.sh: done', 'tpu.sh: deleting mine'):
    assert text in shown, shown
  assert stand_in_cloud.load() is None and 'BILLS' not in shown
  assert max(saved()) == 120
  assert (workdir / 'evaluation' / '120' / 'scores.json').is_file()
  goodput = subprocess.run(
      [sys.executable, '-m', 'ppn_jax.cli.main', 'summary', f'--workdir={workdir}'],
      capture_output=True, text=True, check=True).stdout
  (tmp_path / 'summary').write_text(goodput)
  assert re.search(r'2 starts', goodput), goodput
