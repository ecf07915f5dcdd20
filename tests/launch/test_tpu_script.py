"""Scripts in launch/: their dry runs, and real executions on a simulated cloud."""

import contextlib
import json
import os
import pathlib
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib

import pytest
import stand_in_cloud
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from time_limits import HANG_SECONDS, wait_until
from tiny import CONFIG_FILE

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
TPU, LOCAL_POD = REPOSITORY / 'launch' / 'tpu.sh', REPOSITORY / 'launch' / 'local_pod.sh'
SLICE = ['--name=mine', '--zone=us-west4-a']
FAST = ['--poll=0', '--unchecked']
PATIENT = ['--poll=1', '--grace=2', '--unchecked']  # For tests in which something hangs.

# Ends as the scenario says: a line per execution with an exit code per worker; 'hang' waits for a
# signal. The arguments are recorded.
FAKE_PPN = """#!/bin/bash
life=$(ls "$STAND_IN_CLOUD" | grep -c "^ran-.*-$WORKER\\$")
printf '%s\\n' "$@" > "$STAND_IN_CLOUD/ran-$life-$WORKER"
codes=($(sed -n "$((life + 1))p" "$STAND_IN_CLOUD/scenario"))
echo "life $life of worker $WORKER in $PWD"
code=${codes[$WORKER]}
if [ "$code" = hang ]; then
  trap 'exit 75' TERM
  while :; do sleep 0.2; done
fi
sleep 0.5
exit "$code"
"""


# The `ppn` of the user's machine, which checks the config.
LOCAL_PPN = """#!/bin/sh
echo "$@" >> "$STAND_IN_CLOUD/checked"
case "$*" in *--check=24*) echo 'ppn: error: this cannot be split' >&2; exit 2 ;; esac
"""


def script(path, *arguments, **options):
  return subprocess.run(['bash', str(path), *arguments], text=True, capture_output=True,
                        timeout=HANG_SECONDS, **options)


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  """Sets up a cloud of two workers without ssh, on which `ppn` follows a scenario."""
  folder = tmp_path / 'cloud'
  folder.mkdir()
  (folder / 'ppn').write_text(FAKE_PPN)
  (folder / 'ppn').chmod(0o755)
  yield from _cloud(folder, monkeypatch, server='shell', ppn=str(folder / 'ppn'), environment={})


def _cloud(folder, monkeypatch, **settings):
  (folder / 'bin').mkdir()
  (folder / 'buckets').mkdir()
  (folder / 'home' / '.ssh').mkdir(parents=True)
  subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f',
                  folder / 'home' / '.ssh' / 'google_compute_engine'], check=True)
  (folder / 'bin' / 'ppn').write_text(LOCAL_PPN)
  (folder / 'bin' / 'ppn').chmod(0o755)
  gcloud = folder / 'bin' / 'gcloud'
  gcloud.write_text(f'#!/bin/sh\nexec {sys.executable} -S {HERE}/stand_in_cloud.py "$@"\n')
  gcloud.chmod(0o755)
  configure(folder, **settings)
  monkeypatch.setenv('HOME', str(folder / 'home'))
  monkeypatch.delenv('SSH_AUTH_SOCK', raising=False)
  monkeypatch.setenv('STAND_IN_CLOUD', str(folder))
  monkeypatch.setenv('PATH', f'{folder}/bin:{os.environ["PATH"]}')
  monkeypatch.setattr(stand_in_cloud, 'CLOUD', folder)
  yield folder
  if stand_in_cloud.load():
    stand_in_cloud.take_down(stand_in_cloud.load())


def configure(cloud, **settings):
  """Changes settings of the cloud, see `stand_in_cloud.DEFAULTS`."""
  path = cloud / 'settings.json'
  before = json.loads(path.read_text()) if path.exists() else {}
  path.write_text(json.dumps(before | settings))


def calls(cloud):
  log = cloud / 'calls.jsonl'
  return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_shellcheck():
  checker = shutil.which('shellcheck', path=f'{pathlib.Path(sys.executable).parent}:'
                                            f'{os.environ["PATH"]}')
  if not checker:
    pytest.skip('shellcheck is not installed; it is in the extra `dev`')
  result = subprocess.run([checker, *map(str, (REPOSITORY / 'launch').glob('*.sh'))], text=True,
                          capture_output=True)
  assert result.returncode == 0, result.stdout


def test_workers_install_versions_that_the_project_allows():
  """A run that is preempted must not come back with other libraries."""
  locked = {}
  for line in (REPOSITORY / 'launch' / 'requirements-tpu.txt').read_text().splitlines():
    if not line.startswith('#'):
      requirement = Requirement(line)
      (pin,) = requirement.specifier
      assert pin.operator == '==', line
      locked.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
  project = tomllib.loads((REPOSITORY / 'pyproject.toml').read_text())['project']
  wanted = [line for line in (REPOSITORY / 'requirements.txt').read_text().splitlines()
            if line and not line.startswith('#')]
  for extra in ('tpu', 'tfds', 'gcs'):
    wanted += project['optional-dependencies'][extra]
  for requirement in map(Requirement, wanted):
    name = canonicalize_name(requirement.name)
    if name != 'ppn-jax':
      assert all(requirement.specifier.contains(v) for v in locked[name]), (
          f'{requirement} is not satisfied by {name}=={locked[name]}; run `make lock`')
  assert 'libtpu' in locked


@pytest.mark.parametrize('type, runtime', [
    ('v4-32', 'tpu-ubuntu2204-base'), ('v5litepod-256', 'v2-alpha-tpuv5-lite'),
    ('v5p-8', 'v2-alpha-tpuv5'), ('v6e-64', 'v2-alpha-tpuv6e')])
def test_dry_run_prints_everything_and_runs_nothing(tmp_path, type, runtime):
  (tmp_path / 'gcloud').write_text(f'#!/bin/sh\ntouch {tmp_path}/called\n')
  (tmp_path / 'gcloud').chmod(0o755)
  path = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'}
  workdir = "--workdir=gs://b/it's $(touch here)"
  result = script(TPU, 'run', *SLICE, f'--type={type}', '--spot', '--dry-run', '--project=p',
                  '--', 'train', '--config=c.py', workdir, env=path, cwd=tmp_path)
  assert result.returncode == 0, result.stderr
  assert sorted(p.name for p in tmp_path.iterdir()) == ['gcloud']
  create = next(line for line in result.stdout.splitlines() if ' create ' in line)
  assert create == (f'gcloud compute tpus queued-resources create mine --node-id=mine '
                    f'--accelerator-type={type} --runtime-version={runtime} --spot '
                    '--zone=us-west4-a --project=p --quiet')
  # The quoting survives the local shell and the worker's shell.
  start = next(line for line in result.stdout.splitlines() if ' start ' in line)
  command = _words(next(w for w in _words(start) if w.startswith('--command=')))
  assert command[-5:] == ['ppn', 'train', '--config=c.py', workdir, '--distributed=auto']


def _words(line):
  program = 'import json, sys; print(json.dumps(sys.argv[1:]))'
  result = subprocess.run(['bash', '-c', f'{sys.executable} -c \'{program}\' {line}'], text=True,
                          capture_output=True, check=True)
  return json.loads(result.stdout)


@pytest.mark.parametrize('path, arguments, message', [
    (TPU, ['fly', *SLICE], "unknown command 'fly'"),
    (TPU, ['create', '--zone=z'], '--name='),
    (TPU, ['create', '--name=a;b', '--zone=z'], '--name=a;b'),
    (TPU, ['create', *SLICE, '--type=v3-8'], '--type=v3-8 is unknown; legal: v4-N'),
    (TPU, ['create', *SLICE, '--type=tpu7x-8'], 'does not serve TPU7x; use GKE'),
    (TPU, ['create', *SLICE, '--type=v4-9'], '--type=v4-9: N counts cores'),
    (TPU, ['create', *SLICE, '--type=v4-8,v6e-8'], 'create needs one --type'),
    (TPU, ['wait', '--name=a', '--zone=a,b'], 'wait needs one --zone'),
    (TPU, ['create', *SLICE, '--type=v4-8', '--create-flag=spot'], '--create-flag=spot must be'),
    (TPU, ['setup', *SLICE, '--data=/data'], '--data=/data must be gs://'),
    (TPU, ['create', *SLICE, '--type=v4-8', '--spot', '--reserved'], 'either --spot or --reserved'),
    (TPU, ['start', *SLICE], "give ppn's arguments"),
    (TPU, ['logs', *SLICE, '--worker=-1'], '--worker=-1'),
    (TPU, ['wait', *SLICE, '--pol=3'], 'unknown argument --pol=3'),
    (TPU, ['wait', *SLICE, '--poll=08'], '--poll=08'),
    (TPU, ['wait', *SLICE, '--slices=0'], '--slices=0 must be at least 1'),
    (TPU, ['wait', *SLICE, '--slices=two'], '--slices=two must be an integer'),
    (LOCAL_POD, ['--processes=0', '--', 'train'], '--processes=0 must be 1 to 64'),
    (LOCAL_POD, ['train'], 'arguments of ppn come after --'),
    (LOCAL_POD, [], "give ppn's arguments"),
])
def test_mistakes_are_one_line(path, arguments, message):
  result = script(path, *arguments)
  assert result.returncode == 2 and not result.stdout
  assert len(result.stderr.splitlines()) == 1 and message in result.stderr


@pytest.mark.slow
def test_a_run_restarts_after_preemption_until_it_is_done(cloud):
  (cloud / 'scenario').write_text('75 134\n0 0\n')
  result = script(TPU, 'run', *SLICE, '--type=v5litepod-16', '--local', '--delete', *FAST, '--',
                  'train', '--config=a b', "--workdir=it's")
  assert result.returncode == 0, result.stderr
  ran = sorted(p.name for p in cloud.glob('ran-*'))
  assert ran == [f'ran-{life}-{worker}' for life in range(2) for worker in range(2)]
  assert (cloud / ran[0]).read_text().splitlines() == [
      'train', '--config=a b', "--workdir=it's", '--distributed=auto']
  assert 'life 1 of worker 0' in result.stdout and '/ppn/code' in result.stdout
  assert stand_in_cloud.load() is None
  installed = [c for c in calls(cloud) if 'scp' in c]
  assert len(installed) == 2  # Repeating it without changes is fast.


@pytest.mark.slow
def test_a_preempted_slice_is_requested_again(cloud):
  (cloud / 'scenario').write_text('hang hang\n0 0\n')
  process = subprocess.Popen(['bash', str(TPU), 'run', *SLICE, '--type=v6e-16', '--local', '--spot',
                              *PATIENT, '--', 'train'], stderr=subprocess.PIPE, text=True)
  wait_until(lambda: len(list(cloud.glob('ran-0-*'))) == 2)
  stand_in_cloud.preempt()
  _, output = process.communicate(timeout=HANG_SECONDS)
  assert process.returncode == 0, output
  assert sum('create' in c for c in calls(cloud)) == 2
  assert (cloud / 'life-1' / 'worker-1' / 'ppn' / 'installed').exists()


@pytest.mark.slow
def test_mistakes_of_the_user_end_a_run(cloud):
  (cloud / 'scenario').write_text('2 134\n0 0\n')
  result = script(TPU, 'run', *SLICE, '--type=v4-16', '--local', *FAST, '--', 'train')
  assert result.returncode == 2 and not list(cloud.glob('ran-1-*'))
  assert 'mine is not deleted and STILL BILLS' in result.stderr and stand_in_cloud.load()
  assert '--name=mine --zone=us-west4-a' in result.stderr


@pytest.mark.slow
def test_failures_in_a_row_end_a_run(cloud):
  (cloud / 'scenario').write_text('1 1\n' * 9)
  result = script(TPU, 'run', *SLICE, '--type=v4-16', '--local', '--retries=0',
                  '--delete', *FAST, '--', 'train')
  assert stand_in_cloud.load() is None and 'BILLS' not in result.stderr
  assert result.returncode == 1 and 'gave up: failed 1 times' in result.stderr
  assert len(list(cloud.glob('ran-*-0'))) == 1

@pytest.mark.slow
def test_failed_requests_are_made_again_until_one_is_granted(cloud):
  (cloud / 'scenario').write_text('0 0\n')
  configure(cloud, states=[
      ['ACCEPTED', 'FAILED: There is no more capacity in the zone'],
      ['ACCEPTED', 'PROVISIONING', 'CREATING', 'ACTIVE']],
      refusals=['', 'RESOURCE_EXHAUSTED: try again later'], failed_connections=2)
  result = script(TPU, 'run', '--name=mine', '--zone=us-a,us-b', '--type=v6e-16,v5litepod-16',
                  '--local', '--delete', *FAST, '--', 'train')
  assert result.returncode == 0, result.stderr
  assert 'v6e-16 in us-a: the request has failed: There is no more capacity' in result.stderr
  assert 'v6e-16 in us-b: the request was refused: ERROR: (gcloud.' in result.stderr
  assert 'requesting v5litepod-16 as mine in us-a' in result.stderr
  asked = [[a.partition('=')[2] for a in call if a.startswith(('--zone', '--acc', '--run'))]
           for call in calls(cloud) if 'create' in call]
  assert asked == [['v6e-16', 'v2-alpha-tpuv6e', 'us-a'], ['v6e-16', 'v2-alpha-tpuv6e', 'us-b'],
                   ['v5litepod-16', 'v2-alpha-tpuv5-lite', 'us-a']]


@pytest.mark.parametrize('reason', [
    'Quota limit TPUV6EPerProjectPerZone has been exceeded', 'PERMISSION_DENIED: tpu.nodes.create'])
def test_quota_and_permission_end_a_run(cloud, reason):
  configure(cloud, refusals=[reason] * 9)
  result = script(TPU, 'run', *SLICE, '--type=v6e-16', *FAST, '--', 'train')
  assert result.returncode == 1 and reason in result.stderr.splitlines()[-1]
  assert sum('create' in c for c in calls(cloud)) == 1 and 'BILLS' not in result.stderr


@pytest.mark.slow
def test_an_agent_with_other_keys_is_left_alone(cloud, monkeypatch):
  (cloud / 'scenario').write_text('0 0\n')
  started = subprocess.run(['ssh-agent', '-s'], capture_output=True, text=True, check=True).stdout
  variables = dict(re.findall(r'(SSH_\w+)=([^;]+);', started))
  try:
    for name, value in variables.items():
      monkeypatch.setenv(name, value)
    subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', cloud / 'other'],
                   check=True)
    subprocess.run(['ssh-add', '-q', cloud / 'other'], check=True)
    held = subprocess.run(['ssh-add', '-l'], capture_output=True, text=True).stdout
    # This is what gcloud does without the script's help.
    stand_in_cloud.create('us-west4-a')
    assert stand_in_cloud.check_agent() == 1
    stand_in_cloud.delete('us-west4-a')
    result = script(TPU, 'run', *SLICE, '--type=v4-16', '--local', *FAST, '--', 'train')
    assert result.returncode == 0, result.stderr
    assert subprocess.run(['ssh-add', '-l'], capture_output=True, text=True).stdout == held
  finally:
    os.kill(int(variables['SSH_AGENT_PID']), signal.SIGTERM)


@pytest.mark.slow
def test_data_are_copied_to_a_place_that_setup_leaves_alone(cloud):
  (cloud / 'scenario').write_text('75 75\n0 0\n')
  (cloud / 'buckets' / 'b' / 'coco' / 'val2017').mkdir(parents=True)
  (cloud / 'buckets' / 'b' / 'coco' / 'val2017' / '1.jpg').write_text('picture')
  arguments = ['run', *SLICE, '--type=v5litepod-16', '--local', '--poll=0', '--data=gs://b/coco',
               '--', 'train', '--config=quickstart', '--workdir=gs://b/run']
  images = '--config.data.train.images=~/ppn/data/val2017'
  result = script(TPU, *arguments, images)
  assert result.returncode == 0, result.stderr
  for worker in range(2):
    home = cloud / 'life-0' / f'worker-{worker}'
    assert (home / 'ppn' / 'data' / 'val2017' / '1.jpg').read_text() == 'picture'
    pip = (home / 'pip.log').read_text()
    assert '--no-deps --requirement' in pip and 'code/launch/requirements-tpu.txt' in pip
    # The worker's shell has not expanded it: `ppn` does, with the worker's home folder.
    assert images in (cloud / f'ran-1-{worker}').read_text().splitlines()
  assert sum('rsync' in c for c in calls(cloud)) == 2  # Not again after the restart.
  assert not list((cloud / 'buckets' / 'b' / 'run').iterdir())
  (check,) = (cloud / 'checked').read_text().splitlines()
  assert check.startswith(f'train --config=quickstart {images} --workdir=')
  assert check.endswith('--check=16 --without_data')


@pytest.mark.parametrize('arguments, message', [
    (['--type=v6e-16,v6e-24', '--', 'train'], 'does not fit --type=v6e-24; no slice was requested'),
    (['--type=v4-48', '--', 'train'], 'does not fit --type=v4-48'),
    (['--type=v6e-12', '--slices=2', '--', 'train'], 'does not fit --slices=2 of --type=v6e-12'),
    (['--type=v6e-16', '--data=gs://b/none', '--', 'train'], 'there is nothing at gs://b/none/'),
    (['--type=v6e-16', '--', 'train', '--workdir=gs://none/x'], 'gs://none cannot be used: ERROR'),
    (['--type=v6e-16', '--', 'train', '--config.data.train.images=~/ppn/data/x'], 'needs --data'),
    (['--type=v6e-16', '--data=gs://b/coco', '--', 'train', '--config.data.train.images='
      '~/ppn/data/val2018'], 'there is nothing at gs://b/coco/val2018'),
    (['--type=v6e-16', '--', 'train', '--config=configs/new.py'], 'is not in commit HEAD'),
])
def test_what_can_be_checked_here_is_checked_before_a_slice_is_requested(cloud, arguments, message):
  (cloud / 'buckets' / 'b' / 'coco' / 'val2017').mkdir(parents=True)
  (cloud / 'buckets' / 'b' / 'coco' / 'val2017' / '1.jpg').write_text('picture')
  result = script(TPU, 'run', *SLICE, '--poll=0', *arguments)
  assert result.returncode == 2 and message in result.stderr.splitlines()[-1], result.stderr
  assert not any('create' in call for call in calls(cloud))


def test_a_bucket_that_the_vms_may_not_use_ends_a_run(cloud):
  (cloud / 'buckets' / 'b').mkdir()
  configure(cloud, forbidden=['b'])
  result = script(TPU, 'run', *SLICE, '--type=v6e-16', '--local', '--delete', *FAST, '--', 'train',
                  '--workdir=gs://b/run')
  assert result.returncode == 2 and stand_in_cloud.load() is None
  assert ("gs://b/run cannot be written by this VM's account vm@p.iam.gserviceaccount.com: ERROR"
          in result.stderr and 'storage.objectUser' in result.stderr)


@pytest.mark.slow
def test_a_slice_that_has_lost_a_worker_is_replaced(cloud):
  (cloud / 'scenario').write_text('hang hang\n0 0\n')
  process = subprocess.Popen(['bash', str(TPU), 'run', *SLICE, '--type=v6e-16', '--local',
                              '--delete', *PATIENT, '--', 'train'], stderr=subprocess.PIPE,
                             text=True)
  wait_until(lambda: len(list(cloud.glob('ran-0-*'))) == 2)
  (cloud / 'vanished-0-1').touch()
  stand_in_cloud.warn(0)  # So that the one that is followed ends.
  _, output = process.communicate(timeout=HANG_SECONDS)
  assert process.returncode == 0 and 'a worker does not answer' in output, output
  assert sum('create' in c for c in calls(cloud)) == 2


def hear_interrupts():
  """Undoes that a shell lets its background jobs ignore SIGINT, which their children inherit."""
  signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_ctrl_c_says_that_the_slice_still_bills(cloud):
  (cloud / 'scenario').write_text('hang hang\n')
  with (cloud / 'shown').open('w') as shown:
    process = subprocess.Popen(['bash', str(TPU), 'run', *SLICE, '--type=v6e-16', '--local',
                                '--delete', *FAST, '--', 'train'], stdout=shown,
                               stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=hear_interrupts)
  wait_until(lambda: 'life 0 of worker 0' in (cloud / 'shown').read_text())
  os.killpg(process.pid, signal.SIGINT)
  _, output = process.communicate(timeout=HANG_SECONDS)
  assert process.returncode == 130 and 'STILL BILLS' in output.splitlines()[-1], output
  assert stand_in_cloud.load()


def test_several_slices_are_one_request():
  result = script(TPU, 'run', *SLICE, '--type=v4-32', '--slices=3', '--dry-run', '--', 'train')
  lines = result.stdout.splitlines()
  create = next(line for line in lines if ' create ' in line)
  assert create.startswith('gcloud compute tpus queued-resources create mine --node-count=3 '
                           '--node-prefix=mine --accelerator-type=v4-32 ')
  assert '--check=48 --slices=3' in lines[0]
  for verb in ('describe', 'scp', 'ssh'):
    reached = [line for line in lines if f' tpu-vm {verb} ' in line and ' follow ' not in line]
    assert [sum(f' mine-{i}' in line for line in reached) * 3 for i in range(3)] == [
        len(reached)] * 3
  assert sum(' follow ' in line for line in lines) == 1  # Of the first worker.


@pytest.mark.slow
def test_a_run_on_two_slices_starts_again_together(cloud):
  (cloud / 'scenario').write_text('75 75 134 75\nhang hang hang hang\n0 0 0 0\n')
  arguments = ['run', *SLICE, '--type=v5litepod-16', '--slices=2', '--local', '--delete', *PATIENT,
               '--', 'train']
  process = subprocess.Popen(['bash', str(TPU), *arguments], stderr=subprocess.PIPE, text=True)
  wait_until(lambda: len(list(cloud.glob('ran-1-*'))) == 4)
  stand_in_cloud.lose('mine-1')
  _, output = process.communicate(timeout=HANG_SECONDS)
  assert process.returncode == 0 and output.count('preempted; resuming') == 2, output
  assert 'requesting 2 x v5litepod-16 as mine' in output
  assert len(list(cloud.glob('ran-*'))) == 12
  assert sum('create' in c for c in calls(cloud)) == 2 and stand_in_cloud.load() is None


@pytest.mark.slow
def test_a_mistake_on_the_second_slice_ends_a_run(cloud):
  (cloud / 'scenario').write_text('134 134 134 2\n')
  result = script(TPU, 'run', *SLICE, '--type=v6e-16', '--slices=2', '--local', *FAST, '--',
                  'train')
  assert result.returncode == 2 and 'ppn rejected its arguments' in result.stderr
  shown = script(TPU, 'logs', *SLICE, '--slices=2', '--worker=all').stdout
  assert all(f'life 0 of worker {worker}' in shown for worker in range(4))
  assert script(TPU, 'status', *SLICE, '--slices=2').stdout.count('ppn-worker ') == 4


def test_flags_reach_gcloud(tmp_path):
  result = script(TPU, 'run', *SLICE, '--type=v6e-16', '--dry-run', '--track=alpha',
                  '--create-flag=--network=net', '--autocheckpoint',
                  '--ssh-flag=--tunnel-through-iap', '--ssh-flag=-v', '--', 'train')
  lines = result.stdout.splitlines()
  create = next(line for line in lines if ' create ' in line)
  assert create.startswith('gcloud alpha compute tpus') and '--network=net' in create
  assert '--autocheckpoint-enabled' in create
  ssh, scp = (next(line for line in lines if f' tpu-vm {verb} ' in line) for verb in ('ssh', 'scp'))
  assert '--tunnel-through-iap --ssh-flag=-v' in ssh and '--scp-flag=-v' in scp


@pytest.mark.slow
def test_workers_that_hang_after_another_failed_are_ended(cloud):
  (cloud / 'scenario').write_text('134 hang\n0 0\n')
  result = script(TPU, 'run', *SLICE, '--type=v4-16', '--local', *PATIENT, '--', 'train')
  assert result.returncode == 0, result.stderr
  assert len(list(cloud.glob('ran-*'))) == 4


@pytest.mark.slow
def test_every_step_can_be_repeated_and_stop_is_for_good(cloud):
  (cloud / 'scenario').write_text('hang hang\n')
  for step in (['create', '--type=v5p-16'], ['wait', '--poll=1'], ['setup', '--local']):
    for _ in range(2):
      result = script(TPU, step[0], *SLICE, *step[1:])
      assert result.returncode == 0, result.stderr
  for _ in range(2):
    result = script(TPU, 'start', *SLICE, '--', 'evaluate', '--workdir=w')
    assert result.returncode == 0, result.stderr
  wait_until(lambda: len(list(cloud.glob('ran-*'))) == 2)
  assert script(TPU, 'status', *SLICE).stdout.count(' running\n') == 2
  other = script(TPU, 'start', *SLICE, '--', 'train')
  assert other.returncode == 2 and 'another command is running: ppn evaluate' in other.stderr
  follower = subprocess.Popen(['bash', str(TPU), 'run', *SLICE, '--type=v5p-16', *FAST, '--',
                               'evaluate', '--workdir=w'], stderr=subprocess.PIPE, text=True)
  wait_until(lambda: any('follow' in str(call) for call in calls(cloud)))
  for _ in range(2):
    assert script(TPU, 'stop', *SLICE).returncode == 0
  assert script(TPU, 'status', *SLICE).stdout.count(' stopped 75\n') == 2
  _, output = follower.communicate(timeout=HANG_SECONDS)
  assert follower.returncode == 0 and 'stopped' in output
  assert len(list(cloud.glob('ran-*'))) == 2
  assert 'life 0 of worker 1' in script(TPU, 'logs', *SLICE, '--worker=1').stdout
  for _ in range(2):
    assert script(TPU, 'delete', *SLICE).returncode == 0
  assert stand_in_cloud.load() is None
  assert script(TPU, 'wait', *SLICE).returncode == 2


@pytest.mark.parametrize('codes, expected', [
    ('0 0 0', 0), ('0 75 75', 75), ('75 2 134', 2), ('134 0 75', 75), ('0 1 0', 1)])
def test_a_local_pod_ends_with_the_code_that_matters(tmp_path, codes, expected):
  (tmp_path / 'ppn').write_text(f"""#!/bin/bash
for flag in "$@"; do case "$flag" in --process_id=*) i="${{flag#*=}}" ;; esac; done
codes=({codes}); echo "$@"; exit "${{codes[$i]}}"
""")
  (tmp_path / 'ppn').chmod(0o755)
  result = script(LOCAL_POD, '--processes=3', '--devices=2', '--port=1234', '--', 'train', 'a  b',
                  env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'})
  assert result.returncode == expected, result.stderr
  assert ('[1] train a  b --coordinator=localhost:1234 --num_processes=3 --process_id=1 '
          '--local_devices=2') in result.stdout


def test_a_local_pod_forwards_signals_and_ends_the_rest(tmp_path):
  (tmp_path / 'ppn').write_text("""#!/bin/bash
case "$*" in *process_id=0*) trap 'exit 75' TERM ;; *) trap '' TERM ;; esac
touch "$HERE/up-$$"
while :; do sleep 0.1; done
""")
  (tmp_path / 'ppn').chmod(0o755)
  process = subprocess.Popen(
      ['bash', str(LOCAL_POD), '--grace=1', '--port=1234', '--', 'train'],
      env={**os.environ, 'HERE': str(tmp_path), 'PATH': f'{tmp_path}:{os.environ["PATH"]}'})
  wait_until(lambda: len(list(tmp_path.glob('up-*'))) == 2)
  process.terminate()
  assert process.wait(timeout=HANG_SECONDS) == 75


# Environment of a slice on GKE, by which JAX recognises it; `running_in_cloud_tpu_vm` is forced.
ON_A_SLICE = {
    'JAX_PLATFORMS': 'cpu', 'JAX_FORCE_TPU_INIT': '1', 'TPU_WORKER_ID': '{worker}',
    'TPU_WORKER_HOSTNAMES': '127.0.0.1,127.0.0.1', 'MEGASCALE_NUM_SLICES': '1',
    'MEGASCALE_SLICE_ID': '0', 'MEGASCALE_COORDINATOR_ADDRESS': '127.0.0.1',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}


def _ssh_server():
  """Returns the settings of the SSH server: OpenSSH's if there is one, otherwise asyncssh's."""
  sshd = os.environ.get('PPN_SSHD') or shutil.which('sshd', path=f'{os.environ["PATH"]}:/usr/sbin')
  if not all(map(shutil.which, ('ssh', 'scp', 'ssh-keygen'))):
    pytest.skip('no ssh on this machine')
  # As root, sshd drops its privileges to a separate user.
  if sshd and (os.getuid() or (pathlib.Path('/run/sshd').is_dir() and _user_exists('sshd'))):
    return {'server': 'sshd', 'sshd': sshd}
  pytest.importorskip('asyncssh', reason='neither sshd nor asyncssh, which is in the extra `dev`')
  return {'server': 'asyncssh'}


def _user_exists(name):
  with contextlib.suppress(KeyError):
    return bool(pwd.getpwnam(name))


@pytest.fixture
def cloud_with_ssh(tmp_path, monkeypatch):
  """Sets up a cloud of two workers behind SSH servers, on which the real `ppn` runs."""
  server = _ssh_server()
  folder = tmp_path / 'cloud'
  folder.mkdir()
  subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', folder / 'key'], check=True)
  with socket.socket() as probe:
    probe.bind(('', 0))
    port = str(probe.getsockname()[1])
  environment = {**ON_A_SLICE, 'JAX_COORDINATOR_PORT': port,
                 'JAX_COMPILATION_CACHE_DIR': os.environ['JAX_COMPILATION_CACHE_DIR']}
  yield from _cloud(folder, monkeypatch, **server, environment=environment,
                    ppn=f'{sys.executable} -m ppn_jax.cli.main')


@pytest.mark.slow
def test_workers_behind_ssh_train_together_through_notice_and_preemption(
    cloud_with_ssh, tmp_path):
  config, workdir = tmp_path / 'config.py', tmp_path / 'run'
  config.write_text(CONFIG_FILE.format(folder=str(HERE.parent)))
  process = subprocess.Popen(
      ['bash', str(TPU), 'run', *SLICE, '--type=v5litepod-8', '--spot', '--local', '--poll=1',
       '--unchecked', '--', 'train', f'--config={config}', f'--workdir={workdir}',
       '--config.train.steps=300',
       '--config.train.checkpoint_every=10', '--config.train.log_every=10'],
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  logs = [cloud_with_ssh / 'life-0' / f'worker-{i}' / 'ppn' / 'job' / 'log' for i in range(2)]

  def wait_for(condition):
    wait_until(lambda: condition() or process.poll() is not None)
    assert process.poll() is None, process.communicate()

  def last_saved():
    folder = workdir / 'checkpoints'
    return max((int(p.name) for p in folder.glob('*') if p.name.isdigit()), default=0)

  wait_for(lambda: last_saved() >= 20)
  stand_in_cloud.warn(1)
  wait_for(lambda: all('--- exit code 75' in log.read_text() for log in logs))
  warned_at = last_saved()
  wait_for(lambda: last_saved() > warned_at)
  assert f'resuming {workdir} from step {warned_at}' in logs[0].read_text()
  stand_in_cloud.preempt()
  output, _ = process.communicate(timeout=HANG_SECONDS)
  assert process.returncode == 0, output
  assert 'on 2 x cpu' in output and output.count('preempted; resuming') == 2, output
  assert output.count(f'resuming {workdir}') == 2, output
  assert f'ppn: preempted: told to end; step {warned_at} is saved' in output
  assert sum('create' in c for c in calls(cloud_with_ssh)) == 2
  steps = [json.loads(line)['step'] for line in (workdir / 'metrics.jsonl').open()]
  assert sorted({*range(10, 301, 10), warned_at}) == steps
  assert sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir()) == [280, 290, 300]


@pytest.mark.slow
def test_two_slices_behind_ssh_train_together(cloud_with_ssh, tmp_path):
  """JAX finds the processes of both slices by MEGASCALE's variables, as of the metadata server."""
  environment = json.loads((cloud_with_ssh / 'settings.json').read_text())['environment']
  configure(cloud_with_ssh, workers=1, environment={
      **environment, 'TPU_WORKER_HOSTNAMES': '127.0.0.1', 'MEGASCALE_NUM_SLICES': '2',
      'MEGASCALE_SLICE_ID': '{slice}'})
  config, workdir = tmp_path / 'config.py', tmp_path / 'run'
  config.write_text(CONFIG_FILE.format(folder=str(HERE.parent)))
  result = script(TPU, 'run', *SLICE, '--type=v5litepod-1', '--slices=2', '--local', '--delete',
                  '--poll=1', '--unchecked', '--', 'train', f'--config={config}',
                  f'--workdir={workdir}')
  assert result.returncode == 0, result.stderr
  assert 'on 2 x cpu' in result.stdout, result.stdout
  assert (workdir / 'checkpoints' / '6').is_dir() and stand_in_cloud.load() is None
