"""Simulates `gcloud compute tpus`: slices are folders, and workers are SSH servers on loopback.

It is called like gcloud. `STAND_IN_CLOUD` names its folder:

  settings.json   {"workers", "server": "sshd", "asyncssh" or "shell", "sshd": path, "environment"}
  calls.jsonl     the arguments of every call
  slice.json      the current slice: {"state", "life", "ports", "pids"}
  life-K/worker-I the home folder of a worker; a new slice starts with empty ones

`shell` runs commands in a plain shell instead of over ssh, for tests of everything else. `preempt`
preempts the slice like the cloud: every process on it dies and the request is suspended. `warn`
gives one worker the notice that may come before.
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

# Imitates the result of `python -m venv` and `pip install` without the network.
PYTHON = """#!/bin/sh
case "$*" in
  *"pip install"*) printf '#!/bin/sh\\nexec {ppn} "$@"\\n' > "$HOME/ppn/venv/bin/ppn"
                   chmod +x "$HOME/ppn/venv/bin/ppn" ;;
  *"pip --version"*) ;;
  *) exit 1 ;;
esac
"""


def settings():
  return json.loads((CLOUD / 'settings.json').read_text())


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
  given = {key: value.format(worker=worker) for key, value in settings()['environment'].items()}
  return {'HOME': str(home_of(found, worker)), 'STAND_IN_CLOUD': str(CLOUD),
          'WORKER': str(worker), 'PATH': os.environ['PATH'], **given}


def create():
  workers = settings()['workers']
  life = len(list(CLOUD.glob('life-*')))
  found = {'state': 'WAITING_FOR_RESOURCES', 'life': life, 'ports': [], 'pids': []}
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
  save(found)


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


def warn(worker):
  """Sends SIGTERM to the command on one worker, like a VM that shuts down."""
  job = home_of(load(), worker) / 'ppn' / 'job'
  os.kill(int((job / 'pid').read_text()), signal.SIGTERM)


def describe(queued):
  found = load()
  if not found or (not queued and found['state'] != 'ACTIVE'):
    print('ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found', file=sys.stderr)
    return 1
  print(found['state'] if queued else 'READY')
  if found['state'] == 'WAITING_FOR_RESOURCES':
    save({**found, 'state': 'ACTIVE'})
  return 0


def delete():
  found = load()
  if not found:
    return 1
  take_down(found)
  (CLOUD / 'slice.json').unlink()
  return 0


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


def main(argv):
  with (CLOUD / 'calls.jsonl').open('a') as log:
    fcntl.flock(log, fcntl.LOCK_EX)
    log.write(json.dumps(argv) + '\n')
  words = [a for a in argv if not a.startswith('--')]
  flags = dict(a[2:].partition('=')[::2] for a in argv if a.startswith('--'))
  assert words[:2] == ['compute', 'tpus'] and flags['zone'] and 'quiet' in flags, argv
  kind, verb, *rest = words[2:]
  if (kind, verb) == ('queued-resources', 'create'):
    assert not load() and flags['accelerator-type'] and flags['runtime-version']
    return create()
  if verb == 'describe':
    return describe(kind == 'queued-resources')
  if (kind, verb) == ('queued-resources', 'delete'):
    return delete()
  assert kind == 'tpu-vm', argv
  found = load()
  if not found or found['state'] != 'ACTIVE':
    print('ERROR: TPU NOT_FOUND', file=sys.stderr)
    return 1
  workers = (range(settings()['workers']) if flags['worker'] == 'all' else [int(flags['worker'])])
  with concurrent.futures.ThreadPoolExecutor(len(workers)) as pool:
    if verb == 'scp':
      assert rest[-1].endswith(':')
      codes = pool.map(lambda w: copy(found, w, rest[:-1]), workers)
    else:
      ssh_flags = [a.removeprefix('--ssh-flag=') for a in argv if a.startswith('--ssh-flag=')]
      codes = pool.map(lambda w: on_worker(found, w, ssh_flags, flags['command']), workers)
    return next((code for code in list(codes) if code), 0)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
