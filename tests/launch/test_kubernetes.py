"""Tests that launch/jobset.yaml and launch/Dockerfile fit each other and this package."""

import math
import pathlib
import re

import yaml

from ppn_jax.cli.main import main
from ppn_jax.distributed import preemption

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / 'launch'


def jobset():
  return yaml.safe_load((LAUNCH / 'jobset.yaml').read_text())['spec']


def pod(spec):
  return spec['replicatedJobs'][0]['template']['spec']['template']['spec']


def test_pods_hold_all_chips_of_the_topology():
  spec = jobset()
  job, (container,) = spec['replicatedJobs'][0]['template']['spec'], pod(spec)['containers']
  topology = pod(spec)['nodeSelector']['cloud.google.com/gke-tpu-topology']
  chips = container['resources']['limits']['google.com/tpu']
  assert container['resources']['requests'] == container['resources']['limits']
  assert job['parallelism'] * chips == math.prod(map(int, topology.split('x')))
  assert job['parallelism'] == job['completions']
  assert pod(spec)['serviceAccountName']


def test_disruptions_do_not_count_and_crashes_do():
  spec = jobset()
  job, (container,) = spec['replicatedJobs'][0]['template']['spec'], pod(spec)['containers']
  disruption, codes = job['podFailurePolicy']['rules']
  assert disruption == {'action': 'Count', 'onPodConditions': [{'type': 'DisruptionTarget'}]}
  assert codes['onExitCodes']['containerName'] == container['name']
  assert codes['action'] == 'FailJob' and codes['onExitCodes']['operator'] == 'NotIn'
  assert preemption.EXIT_CODE in codes['onExitCodes']['values']
  assert not {0, 1, 2} & set(codes['onExitCodes']['values'])  # A job is done with 0.
  assert job['backoffLimit'] == 0 and pod(spec)['restartPolicy'] == 'Never'
  actions = {rule['onJobFailureReasons'][0]: rule['action']
             for rule in spec['failurePolicy']['rules']}
  assert actions == {'PodFailurePolicy': 'RestartJobSet',
                     'BackoffLimitExceeded': 'RestartJobSetAndIgnoreMaxRestarts'}


def test_the_command_is_one_that_trains(tmp_path, capsys):
  (container,) = pod(jobset())['containers']
  assert '--distributed=auto' in container['args']
  arguments = [f'--workdir={tmp_path}/run' if a.startswith('--workdir=gs://') else a
               for a in container['args']]
  assert main([*arguments, '--config.model.num_classes=80', '--check=16', '--without_data']) == 0, (
      capsys.readouterr().err)
  assert '16 devices, 32 images each' in capsys.readouterr().out


def test_the_image_installs_the_locked_versions_and_runs_ppn():
  text = (LAUNCH / 'Dockerfile').read_text()
  assert 'ENTRYPOINT ["ppn"]' in text and 'command' not in pod(jobset())['containers'][0]
  copied = [word for line in re.findall(r'^COPY (.*) \S+$', text, re.M) for word in line.split()]
  assert copied and all((LAUNCH.parent / word).exists() for word in copied)
  assert '--no-deps -r launch/requirements-tpu.txt' in text
