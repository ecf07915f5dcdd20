"""Simulates `gcloud compute tpus` and `gcloud storage`: slices are folders, workers SSH servers.

It is called like gcloud, and refuses what gcloud refuses. `STAND_IN_CLOUD` names its folder:

  settings.json   see `DEFAULTS`
  calls.jsonl     the arguments of every call
  slice.json      the current slices: {"state", "zone", "nodes", "life", "ports", "pids"}
  life-K/worker-I the home folder of a worker; a new slice starts with empty ones. The workers of
                  several slices are numbered through
  buckets/NAME    the objects of a bucket
  vanished-K-I    if it exists, worker I of slice K cannot be reached

The server `shell` runs commands in a plain shell instead of over ssh, for tests of everything else.
`preempt` preempts the slice like the cloud: every process on it dies and the request is suspended.
`warn` gives one worker the notice that may come before.
"""

import concurrent.futures
import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

CLOUD = pathlib.Path(os.environ.get('STAND_IN_CLOUD', '.'))

DEFAULTS = {
    'workers': 2,  # Of each slice.
    'server': 'shell',  # Or 'sshd', whose program is 'sshd', or 'asyncssh'.
    'sshd': '',
    'ppn': '',  # Program that workers run as `ppn`.
    'environment': {},  # Of workers.
    # States of a request after each look, for each request; the last list also for later ones.
    # 'FAILED: REASON' is the state FAILED. A slice is CREATING at the first look after ACTIVE.
    'states': [['WAITING_FOR_RESOURCES', 'ACTIVE']],
    'refusals': [],  # Errors of the first requests; '' accepts one.
    'forbidden': [],  # Buckets that the account of the VMs may not use.
    'failed_connections': 0,  # Of each worker, before ssh works; gcloud tries ten times.
}

# Flags by command; gcloud rejects others.
_EVERYWHERE = {'zone', 'project', 'quiet'}
_SSH = {'worker', 'ssh-key-file', 'internal-ip', 'batch-size', 'strict-host-key-checking'}
FLAGS = {
    ('queued-resources', 'create'): {
        'node-id', 'node-count', 'node-prefix', 'accelerator-type', 'runtime-version', 'spot',
        'reserved', 'network', 'subnetwork', 'internal-ips', 'service-account', 'labels',
        'autocheckpoint-enabled'},
    ('queued-resources', 'describe'): {'format'},
    ('queued-resources', 'delete'): {'force'},
    ('tpu-vm', 'describe'): {'format'},
    ('tpu-vm', 'ssh'): {*_SSH, 'ssh-flag', 'command'},
    ('tpu-vm', 'scp'): {*_SSH, 'scp-flag'},
}

# Imitates the result of `python -m venv` and `pip install` without the network.
PYTHON = """#!/bin/sh
case "$*" in
  *"pip install"*) echo "$*" >> "$HOME/pip.log"
                   printf '#!/bin/sh\\nexec {ppn} "$@"\\n' > "$HOME/ppn/venv/bin/ppn"
                   chmod +x "$HOME/ppn/venv/bin/ppn" ;;
  *"pip --version"*) ;;
  *) exit 1 ;;
esac
"""


def settings():
  return DEFAULTS | json.loads((CLOUD / 'settings.json').read_text())


def load():
  path = CLOUD / 'slice.json'
  return json.loads(path.read_text()) if path.exists() else None


def save(found):
  (CLOUD / 'slice.new').write_text(json.dumps(found))
  os.replace(CLOUD / 'slice.new', CLOUD / 'slice.json')


def home_of(found, worker):
  return CLOUD / f'life-{found["life"]}' / f'worker-{worker}'


def environment_of(found, worker):
  """Returns the environment of a worker, like that of a slice on GKE."""
  in_node, number = divmod(worker, settings()['workers'])[::-1]
  given = {key: value.format(worker=in_node, slice=number)
           for key, value in settings()['environment'].items()}
  return {'HOME': str(home_of(found, worker)), 'STAND_IN_CLOUD': str(CLOUD),
          'WORKER': str(worker), 'PATH': os.environ['PATH'], **given}


def create(zone, nodes=('mine',)):
  refusals = settings()['refusals']
  requests = CLOUD / 'requests'  # A character for each.
  count = requests.stat().st_size if requests.exists() else 0
  requests.write_text('.' * (count + 1))
  if count < len(refusals) and refusals[count]:
    return error(refusals[count])
  workers = settings()['workers'] * len(nodes)
  life = len(list(CLOUD.glob('life-*')))
  lists = settings()['states']
  found = {'state': '', 'states': lists[min(life, len(lists) - 1)], 'zone': zone, 'life': life,
           'nodes': dict.fromkeys(nodes, 'CREATING'), 'ports': [], 'pids': []}
  for worker in range(workers):
    home = home_of(found, worker)
    (home / 'ppn' / 'venv' / 'bin').mkdir(parents=True)
    python = home / 'ppn' / 'venv' / 'bin' / 'python'
    python.write_text(PYTHON.format(ppn=settings()['ppn']))
    python.chmod(0o755)
    if settings()['server'] != 'shell':
      port, pid = serve(found, worker)
      found['ports'].append(port)
      found['pids'].append(pid)
  save(advanced(found))


def advanced(found):
  """Returns a slice in the next state of its request."""
  state, *later = found['states'] or [found['state']]
  return {**found, 'state': state, 'states': later}


def serve(found, worker):
  """Starts the SSH server of a worker; returns its port and process."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  folder = home_of(found, worker).parent / f'server-{worker}'
  folder.mkdir()
  environment = environment_of(found, worker)
  if settings()['server'] == 'sshd':
    force = folder / 'force'
    force.write_text('#!/bin/sh\ncd "$HOME" && exec /bin/bash -c "$SSH_ORIGINAL_COMMAND"\n')
    force.chmod(0o755)
    (folder / 'config').write_text('\n'.join([
        f'ListenAddress 127.0.0.1:{port}', f'HostKey {CLOUD}/key', 'UsePAM no', 'StrictModes no',
        f'AuthorizedKeysFile {CLOUD}/key.pub', f'PidFile {folder}/pid', 'PermitRootLogin yes',
        f'ForceCommand {force}', 'PasswordAuthentication no',
        'SetEnv ' + ' '.join(f'"{key}={value}"' for key, value in environment.items())]))
    command = [settings()['sshd'], '-D', '-e', '-f', str(folder / 'config')]
  else:
    server = pathlib.Path(__file__).with_name('ssh_server.py')
    command = [sys.executable, str(server), str(port), f'{CLOUD}/key', f'{CLOUD}/key.pub']
    os.environ['SSH_ENVIRONMENT'] = json.dumps(environment)
  with (folder / 'log').open('w') as log:
    process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                               start_new_session=True)
  deadline = time.monotonic() + 20
  while time.monotonic() < deadline:
    with contextlib.suppress(OSError), socket.create_connection(('127.0.0.1', port), 1):
      return port, process.pid
    time.sleep(0.05)
  raise SystemExit(f'no SSH server: {(folder / "log").read_text()}')


def take_down(found):
  """Kills every process of a slice, like a power failure."""
  for pid in found['pids']:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(pid, signal.SIGKILL)
  for group in CLOUD.glob(f'life-{found["life"]}/worker-*/ppn/job/group'):
    with contextlib.suppress(ProcessLookupError, ValueError):
      os.killpg(int(group.read_text()), signal.SIGKILL)


def preempt():
  found = load()
  save({**found, 'state': 'SUSPENDED'})
  take_down(found)


def lose(node):
  """Ends one of several slices: its request stays active."""
  found = load()
  save({**found, 'nodes': {**found['nodes'], node: 'PREEMPTED'}})
  take_down(found)


def warn(worker):
  """Sends SIGTERM to the command on one worker, like a VM that shuts down."""
  job = home_of(load(), worker) / 'ppn' / 'job'
  os.kill(int((job / 'pid').read_text()), signal.SIGTERM)


def error(message):
  print(f'ERROR: (gcloud.compute.tpus) {message}', file=sys.stderr)
  return 1


def describe(queued, name, zone, fields):
  found = load()
  if not found or found['zone'] != zone or (
      not queued and (found['state'] != 'ACTIVE' or name not in found['nodes'])):
    return error('NOT_FOUND: Resource was not found')
  if not queued:
    state = found['nodes'][name]
    print(state)
    after = 'READY' if state == 'CREATING' else state
    save({**found, 'nodes': {**found['nodes'], name: after}})
    return 0
  state, _, reason = found['state'].partition(': ')
  if 'failedData' in fields:
    print(f'{reason}\tSERVICE')
    return 0
  print(state)
  save(advanced(found))
  return 0


def delete(zone):
  found = load()
  if not found or found['zone'] != zone:
    return error('NOT_FOUND: Resource was not found')
  take_down(found)
  (CLOUD / 'slice.json').unlink()
  return 0


def check_agent():
  """Returns gcloud's error if an agent runs that does not hold its key (`VerifyKeyInAgent`)."""
  key = pathlib.Path(os.environ['HOME'], '.ssh', 'google_compute_engine')
  if not key.exists():
    key.parent.mkdir(exist_ok=True)
    subprocess.run(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', key], check=True)
  fingerprint = subprocess.run(['ssh-keygen', '-lf', key], capture_output=True, text=True,
                               check=True).stdout.split()[1]
  held = subprocess.run(['ssh-add', '-l'], capture_output=True, text=True)
  if held.returncode == 0 and fingerprint not in held.stdout:
    return error('SSH Key is not present in the SSH agent. Please run "ssh-add '
                 f'{key}" to add it, and try again.')
  return 0


def connected(found, worker, several):
  """Imitates gcloud's attempts to reach a worker; returns whether one succeeded."""
  tries = CLOUD / f'tries-{found["life"]}-{worker}'
  for _ in range(10):
    print(f'SSH: Attempting to connect to worker {worker}...', file=sys.stderr)
    done = int(tries.read_text()) if tries.exists() else 0
    if (CLOUD / f'vanished-{found["life"]}-{worker}').exists():
      continue
    tries.write_text(str(done + 1))
    if done >= settings()['failed_connections']:
      return True
  if several:
    print('Failed to execute command on multiple workers. This may have happened if you have not '
          'added your SSH key to your ssh-agent', file=sys.stderr)
  return False


def on_worker(found, worker, flags, command):
  """Runs a command on one worker like gcloud: by ssh, with the command split at spaces."""
  if settings()['server'] == 'shell':
    return subprocess.run(['/bin/bash', '-c', command], cwd=home_of(found, worker),
                          env=environment_of(found, worker), stdin=subprocess.DEVNULL).returncode
  options = ['-i', f'{CLOUD}/key', *SSH_OPTIONS, *flags, '-p', str(found['ports'][worker])]
  return subprocess.run(['ssh', '-T', *options, '127.0.0.1', '--', *command.split(' ')],
                        stdin=subprocess.DEVNULL).returncode


SSH_OPTIONS = ['-o', 'StrictHostKeyChecking=no', '-o', 'UserKnownHostsFile=/dev/null', '-o',
               'LogLevel=ERROR', '-o', 'BatchMode=yes', '-o', 'IdentitiesOnly=yes', '-F', 'none']


def copy(found, worker, sources):
  if settings()['server'] == 'shell':
    for source in sources:
      shutil.copy(source, home_of(found, worker))
    return 0
  return subprocess.run(['scp', '-O', '-q', '-i', f'{CLOUD}/key', *SSH_OPTIONS, '-P',
                         str(found['ports'][worker]), *sources, '127.0.0.1:']).returncode


def storage(words, flags):
  """Imitates `gcloud storage`; on a worker it is called by the account of the VM."""
  *_, target = [word for word in words if word.startswith('gs://')]
  bucket, _, path = target.removeprefix('gs://').partition('/')
  folder = CLOUD / 'buckets' / bucket
  if not folder.is_dir():
    return error(f'gs://{bucket} not found: 404.')
  if 'WORKER' in os.environ and bucket in settings()['forbidden']:
    return error('HTTPError 403: vm@p.iam.gserviceaccount.com does not have '
                 'storage.objects.create access to the Google Cloud Storage object.')
  if words[0] == 'rsync':
    assert 'recursive' in flags and 'delete-unmatched-destination-objects' in flags
    shutil.copytree(folder / path, words[-1], dirs_exist_ok=True)
  elif words[0] == 'cp':
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(sys.stdin.read())
  elif words[0] == 'rm':
    (folder / path).unlink()
  elif words[:2] == ['objects', 'list']:
    assert path.endswith('**') and flags['limit'] == '1'
    print(next((str(p) for p in folder.rglob('*') if p.is_file() and
                str(p.relative_to(folder)).startswith(path[:-2])), ''))
  else:
    assert words[:2] == ['buckets', 'describe'], words
    print(bucket)
  return 0


def main(argv):
  with (CLOUD / 'calls.jsonl').open('a') as log:
    fcntl.flock(log, fcntl.LOCK_EX)
    log.write(json.dumps(argv) + '\n')
  words = [a for a in argv if not a.startswith('--')]
  flags = dict(a[2:].partition('=')[::2] for a in argv if a.startswith('--'))
  if words[0] == 'storage':
    return storage(words[1:], flags)
  if words[0] == 'config':
    print('vm@p.iam.gserviceaccount.com')
    return 0
  if words[0] in ('alpha', 'beta'):
    words.pop(0)
  assert words[:2] == ['compute', 'tpus'] and flags['zone'] and 'quiet' in flags, argv
  kind, verb, *rest = words[2:]
  if unknown := flags.keys() - FLAGS[kind, verb] - _EVERYWHERE - (
      {'tunnel-through-iap'} if argv[0] == 'alpha' else set()):
    print(f'ERROR: (gcloud.compute.tpus) unrecognized arguments: {unknown}', file=sys.stderr)
    return 2
  if (kind, verb) == ('queued-resources', 'create'):
    assert not load() and flags['accelerator-type'] and flags['runtime-version']
    assert ('node-id' in flags) != ('node-count' in flags) and int(flags.get('node-count', 2)) > 1
    prefix = flags.get('node-prefix', rest[0])
    return create(flags['zone'], [flags['node-id']] if 'node-id' in flags else [
        f'{prefix}-{i}' for i in range(int(flags['node-count']))])
  if verb == 'describe':
    return describe(kind == 'queued-resources', rest[0], flags['zone'], flags['format'])
  if (kind, verb) == ('queued-resources', 'delete'):
    return delete(flags['zone'])
  assert kind == 'tpu-vm', argv
  found = load()
  if not found or found['state'] != 'ACTIVE' or found['zone'] != flags['zone']:
    return error('NOT_FOUND: TPU was not found')
  node = rest[-1].removesuffix(':') if verb == 'scp' else rest[0]
  if node not in found['nodes']:
    return error('NOT_FOUND: TPU was not found')
  if found['nodes'][node] != 'READY':
    return error(f'the TPU is in state {found["nodes"][node]}')
  first = list(found['nodes']).index(node) * settings()['workers']
  workers = [first + worker for worker in (
      range(settings()['workers']) if flags['worker'] == 'all' else [int(flags['worker'])])]
  if len(workers) > 1 and (code := check_agent()):
    return code
  ssh_flags = [a.removeprefix('--ssh-flag=') for a in argv if a.startswith('--ssh-flag=')]

  def act(worker):
    if not connected(found, worker, len(workers) > 1):
      return 255
    if verb == 'scp':
      return copy(found, worker, rest[:-1])
    return on_worker(found, worker, ssh_flags, flags['command'])

  assert verb == 'ssh' or rest[-1].endswith(':')
  with concurrent.futures.ThreadPoolExecutor(len(workers)) as pool:
    return next((code for code in list(pool.map(act, workers)) if code), 0)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
