#!/usr/bin/env bash
# Runs a `ppn` command on one worker of a slice; tpu.sh copies this file there and calls it by ssh.
# The command runs in a separate session, so that it outlives the connection.
#
#   install ID        install ~/ppn_source.tar.gz, identified by ID, in ~/ppn/code and ~/ppn/venv
#   writable URL      fail if this VM's account may not write to a folder of a bucket
#   fetch URL         copy a folder of a bucket to ~/ppn/data; do nothing if it is there already
#   start COMMAND...  run a command in ~/ppn/code; do nothing if the same command is running
#   follow LINES [PREFIX]  print the end of the log, and follow it until the command has ended
#   status            print one line: ppn-worker HOST none|running|exit CODE|stopped CODE
#   end SECONDS       send SIGTERM, and SIGKILL to processes that remain after SECONDS
#   stop SECONDS      like end, but marked as intended, so that `tpu.sh run` does not restart it
set -euo pipefail

root="$HOME/ppn"
job="$root/job"

fail() {
  echo "ppn_worker.sh: $(hostname): $1" >&2
  exit "${2:-2}"
}

# The lock is held by the command and all its children, so it is more reliable than process ids.
running() {
  [[ -e "$job/lock" ]] && ! flock --nonblock "$job/lock" true
}

install() {
  local id="$1"
  if [[ -f "$root/installed" && "$(<"$root/installed")" == "$id" ]]; then
    return
  fi
  running && fail 'a command is running on another version of the code; stop it first'
  rm -rf "$root/installed" "$root/code" "$root/code.new"
  mkdir -p "$root/code.new"
  tar -xzf "$HOME/ppn_source.tar.gz" -C "$root/code.new" || fail 'the copied source is incomplete' 1
  mv "$root/code.new" "$root/code"
  "$root/venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
  # The same libraries on every worker and after every preemption, whatever is released meanwhile.
  if [[ -f "$root/code/launch/requirements-tpu.txt" ]]; then
    pip_install --no-deps --requirement "$root/code/launch/requirements-tpu.txt"
    pip_install --no-deps --editable "$root/code"
  else # A commit before there was such a list.
    pip_install --editable "$root/code[tpu,tfds]"
  fi
  echo "$id" >"$root/installed"
}

pip_install() {
  "$root/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

writable() {
  local object answer
  object="${1%/}/.ppn-probe-$(hostname)-$$"
  if ! answer="$(gcloud storage cp - "$object" <<<'' 2>&1)"; then
    denied "$1 cannot be written" "$answer"
  fi
  gcloud storage rm "$object" >/dev/null 2>&1 || denied "$1 cannot be deleted from" "$answer"
}

fetch() {
  local answer
  [[ ! -f "$root/fetched" || "$(<"$root/fetched")" != "$1" ]] || return 0
  running && fail 'a command is running; stop it before its data change'
  rm -f "$root/fetched"
  mkdir -p "$root/data"
  if ! answer="$(gcloud storage rsync --recursive --delete-unmatched-destination-objects "$1" \
    "$root/data" 2>&1)"; then
    denied "$1 cannot be copied" "$answer"
  fi
  [[ -n "$(ls -A "$root/data")" ]] || fail "there is nothing at $1"
  echo "$1" >"$root/fetched"
}

# Reports what gcloud says, with the account that it concerns. Exit code 2 if trying again is of no
# use.
denied() {
  local code=1 reason account
  reason="$(grep -m 1 -E 'ERROR|HTTPError|denied' <<<"$2" || tail -n 1 <<<"$2")"
  account="$(gcloud config get-value account 2>/dev/null || true)"
  ! grep -qE '40[134]|[Dd]enied|does not have|not found' <<<"$2" || code=2
  fail "$1 by this VM's account ${account:-(unknown)}: $reason; grant it roles/storage.objectUser \
and roles/storage.legacyBucketReader on the bucket, or give the VMs another account by \
--create-flag=--service-account=EMAIL" "$code"
}

# The images of TPU VMs have Python 3.10; uv installs a newer one.
make_venv() {
  local python
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$python" -m venv --clear "$root/venv"
      return
    fi
  done
  python3 -m pip install --quiet --user uv
  rm -rf "$root/venv"
  python3 -m uv venv --quiet --seed --python 3.12 "$root/venv"
}

start() {
  local command
  [[ -f "$root/installed" ]] || fail 'nothing is installed; run setup first'
  mkdir -p "$job"
  command="$(printf '%q ' "$@")"
  if running; then
    [[ "$(<"$job/command")" == "$command" ]] || fail "another command is running: $(<"$job/command")"
    return
  fi
  rm -f "$job/group" "$job/pid" "$job/exit_code" "$job/stopped"
  echo "$command" >"$job/command"
  setsid nohup bash "$0" supervise "$@" </dev/null >>"$job/log" 2>&1 &
  for _ in {1..100}; do
    [[ -s "$job/group" ]] && return
    sleep 0.1
  done
  fail 'the command did not start' 1
}

supervise() {
  local code=0
  exec 9>"$job/lock"
  flock --timeout 5 9 # `running` holds it for a moment.
  cd "$root/code"
  echo "--- $(date -u '+%Y-%m-%d %H:%M:%S') $(hostname): $(<"$job/command")"
  PATH="$root/venv/bin:$PATH" PYTHONUNBUFFERED=1 "$@" &
  echo $! >"$job/pid"
  echo $$ >"$job/group"
  wait $! || code=$?
  echo "--- exit code $code"
  write_exit_code "$code"
}

write_exit_code() {
  echo "$1" >"$job/exit_code.new"
  mv "$job/exit_code.new" "$job/exit_code"
}

status() {
  local state='none'
  if running; then
    state='running'
  elif [[ -d "$job" ]]; then
    # There is no exit code if the machine was restarted or the supervisor killed.
    state="exit $(cat "$job/exit_code" 2>/dev/null || echo lost)"
    [[ -e "$job/stopped" ]] && state="stopped ${state#exit }"
  fi
  echo "ppn-worker $(hostname) $state"
}

follow() {
  local group
  [[ -f "$job/log" ]] || fail 'no command has been started'
  group="$(cat "$job/group" 2>/dev/null || echo 0)"
  if running; then
    tail --lines="$1" --follow=name --retry --pid="$group" "$job/log" 2>/dev/null
  else
    tail --lines="$1" "$job/log"
  fi | if [[ -n "${2:-}" ]]; then sed --unbuffered "s/^/$(hostname): /"; else cat; fi
}

end() {
  local second
  running || return 0
  kill -TERM "$(<"$job/pid")" 2>/dev/null || true
  for ((second = 0; second < $1; second++)); do
    running || return 0
    sleep 1
  done
  kill -KILL -- "-$(<"$job/group")" 2>/dev/null || true
  write_exit_code 137
}

stop() {
  running || return 0
  touch "$job/stopped"
  end "$@"
}

case "${1:-}" in
  install | writable | fetch | start | supervise | status | follow | end | stop) "$@" ;;
  *) fail "unknown call ${1:-}" ;;
esac
