"""SSH server on loopback, for machines without sshd: ssh_server.py PORT KEY AUTHORIZED_KEYS."""

import asyncio
import json
import os
import sys

import asyncssh

ENVIRONMENT = json.loads(os.environ['SSH_ENVIRONMENT'])


async def run(process):
  """Runs the command of a session in a shell in the home folder, as sshd does."""
  child = await asyncio.create_subprocess_exec(
      '/bin/bash', '-c', process.command, cwd=ENVIRONMENT['HOME'], env=ENVIRONMENT,
      stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
      stderr=asyncio.subprocess.PIPE)
  await process.redirect(stdin=child.stdin, stdout=child.stdout, stderr=child.stderr)
  code = await child.wait()
  await process.stdout.drain()
  process.exit(code)


class Server(asyncssh.SSHServer):

  def begin_auth(self, username):
    return True


async def main(port, key, authorized):
  await asyncssh.create_server(Server, '127.0.0.1', int(port), server_host_keys=[key],
                               authorized_client_keys=authorized, process_factory=run,
                               encoding=None)
  await asyncio.Event().wait()


if __name__ == '__main__':
  asyncio.run(main(*sys.argv[1:]))
