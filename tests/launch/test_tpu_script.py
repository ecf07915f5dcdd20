"""Scripts in launch/: their dry runs, and real executions on a simulated cloud."""

import contextlib
import json
import os
import pathlib
import pwd
import shutil
import socket
import subprocess
import sys

import pytest
import stand_in_cloud
from time_limits import HANG_SECONDS, wait_until
from tiny import CONFIG_FILE

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
TPU, LOCAL_POD = REPOSITORY / 'launch' / 'tpu.sh', REPOSITORY / 'launch' / 'local_pod.sh'
SLICE = ['--name=mine', '--zone=us-west4-a']
FAST = ['--poll=1', '--grace=2']

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
  gcloud = folder / 'bin' / 'gcloud'
  gcloud.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE}/stand_in_cloud.py "$@"\n')
  gcloud.chmod(0o755)
  (folder / 'settings.json').write_text(json.dumps({'workers': 2, **settings}))
  monkeypatch.setenv('STAND_IN_CLOUD', str(folder))
  monkeypatch.setenv('PATH', f'{folder}/bin:{os.environ["PATH"]}')
  monkeypatch.setattr(stand_in_cloud, 'CLOUD', folder)
  yield folder
  if stand_in_cloud.load():
    stand_in_cloud.take_down(stand_in_cloud.load())


def calls(cloud):
  return [json.loads(line) for line in (cloud / 'calls.jsonl').read_text().splitlines()]


def test_shellcheck():
  checker = shutil.which('shellcheck', path=f'{pathlib.Path(sys.executable).parent}:'
                                            f'{os.environ["PATH"]}')
  if not checker:
    pytest.skip('shellcheck is not installed; it is in the extra `dev`')
  result = subprocess.run([checker, *map(str, (REPOSITORY / 'launch').glob('*.sh'))], text=True,
                          capture_output=True)
  assert result.returncode == 0, result.stdout


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
    (TPU, ['create', *SLICE, '--type=v4-8', '--spot', '--reserved'], 'either --spot or --reserved'),
    (TPU, ['start', *SLICE], "give ppn's arguments"),
    (TPU, ['logs', *SLICE, '--worker=-1'], '--worker=-1'),
    (TPU, ['wait', *SLICE, '--pol=3'], 'unknown argument --pol=3'),
    (TPU, ['wait', *SLICE, '--poll=08'], '--poll=08'),
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
  (cloud / 'scenario').write_text('75 75\n75 134\n0 0\n')
  result = script(TPU, 'run', *SLICE, '--type=v5litepod-16', '--local', '--delete', *FAST, '--',
                  'train', '--config=a b', "--workdir=it's")
  assert result.returncode == 0, result.stderr
  ran = sorted(p.name for p in cloud.glob('ran-*'))
  assert ran == [f'ran-{life}-{worker}' for life in range(3) for worker in range(2)]
  assert (cloud / ran[0]).read_text().splitlines() == [
      'train', '--config=a b', "--workdir=it's", '--distributed=auto']
  assert 'life 2 of worker 0' in result.stdout and '/ppn/code' in result.stdout
  assert stand_in_cloud.load() is None
  installed = [c for c in calls(cloud) if 'scp' in c]
  assert len(installed) == 3  # Repeating it without changes is fast.


@pytest.mark.slow
def test_a_preempted_slice_is_requested_again(cloud):
  (cloud / 'scenario').write_text('hang hang\n0 0\n')
  process = subprocess.Popen(['bash', str(TPU), 'run', *SLICE, '--type=v6e-16', '--local', '--spot',
                              *FAST, '--', 'train'], stderr=subprocess.PIPE, text=True)
  wait_until(lambda: len(list(cloud.glob('ran-0-*'))) == 2)
  stand_in_cloud.preempt()
  _, output = process.communicate(timeout=HANG_SECONDS)
  assert process.returncode == 0, output
  assert sum('create' in c for c in calls(cloud)) == 2
  assert (cloud / 'life-1' / 'worker-1' / 'ppn' / 'installed').exists()


def test_mistakes_of_the_user_end_a_run(cloud):
  (cloud / 'scenario').write_text('2 134\n0 0\n')
  result = script(TPU, 'run', *SLICE, '--type=v4-16', '--local', *FAST, '--', 'train')
  assert result.returncode == 2 and not list(cloud.glob('ran-1-*'))


def test_failures_in_a_row_end_a_run(cloud):
  (cloud / 'scenario').write_text('1 1\n' * 9)
  result = script(TPU, 'run', *SLICE, '--type=v4-16', '--local', '--retries=0', *FAST, '--',
                  'train')
  assert result.returncode == 1 and 'gave up: failed 1 times' in result.stderr
  assert len(list(cloud.glob('ran-*-0'))) == 1


@pytest.mark.slow
def test_workers_that_hang_after_another_failed_are_ended(cloud):
  (cloud / 'scenario').write_text('134 hang\n0 0\n')
  result = script(TPU, 'run', *SLICE, '--type=v4-16', '--local', *FAST, '--', 'train')
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
       '--', 'train', f'--config={config}', f'--workdir={workdir}', '--config.train.steps=300',
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
