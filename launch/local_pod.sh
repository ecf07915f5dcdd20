#!/usr/bin/env bash
# Runs several processes on this machine, joined like the hosts of a pod, to rehearse a pod.
#
#   launch/local_pod.sh [--processes=N] [--devices=D] [--port=PORT] [--dry-run] -- PPN ARGUMENTS
#
# such as -- train --config=configs/quickstart.py --workdir=runs/pod
#
#   --processes=N    number of processes (default: 2)
#   --devices=D      virtual CPU devices per process (default: 1)
#   --port=PORT      port of the coordinator in process 0 (default: a free one)
#   --grace=SECONDS  time for the others to end after one has failed (default: 150)
#   --dry-run        print the commands without executing them
#
# Each line of output starts with the number of its process. SIGTERM is passed to all processes.
# The exit code is that of the processes; if they differ, 2 takes precedence over 75, and 75 over
# others.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
processes=2 devices=1 port='' grace=150 dry_run=''

fail() {
  echo "local_pod.sh: error: $1" >&2
  exit 2
}

count() { # count FLAG VALUE LEAST MOST
  if ! [[ "$2" =~ ^(0|[1-9][0-9]{0,4})$ ]] || (($2 < $3 || $2 > $4)); then
    fail "$1=$2 must be $3 to $4"
  fi
}

while (($#)); do
  case "$1" in
    --processes=*) processes="${1#*=}" ;;
    --devices=*) devices="${1#*=}" ;;
    --port=*) port="${1#*=}" ;;
    --grace=*) grace="${1#*=}" ;;
    --dry-run) dry_run=yes ;;
    --help | -h)
      sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit
      ;;
    --)
      shift
      break
      ;;
    *) fail "unknown argument $1; arguments of ppn come after --" ;;
  esac
  shift
done
count --processes "$processes" 1 64
count --devices "$devices" 1 64
count --grace "$grace" 0 99999
[[ -z "$port" ]] || count --port "$port" 1 65535
(($#)) || fail "give ppn's arguments at the end, such as -- train --config=FILE --workdir=DIR"

ppn="$(command -v ppn || true)"
ppn="${ppn:-$root/.venv/bin/ppn}"
if [[ -z "$dry_run" ]]; then
  [[ -x "$ppn" ]] || fail 'ppn is not installed; run make setup, or activate its environment'
  port="${port:-$(python3 -c 'import socket
with socket.socket() as s:
  s.bind(("", 0))
  print(s.getsockname()[1])')}"
fi

pids=()
codes=()
for ((i = 0; i < processes; i++)); do
  command=("$ppn" "$@" "--coordinator=localhost:${port:-PORT}" "--num_processes=$processes"
    "--process_id=$i" "--local_devices=$devices")
  if [[ -n "$dry_run" ]]; then
    printf '%q ' "${command[@]}"
    echo
    continue
  fi
  # The numbers are added in a substituted process, so that $! is the process of ppn itself.
  "${command[@]}" > >(sed "s/^/[$i] /") 2> >(sed "s/^/[$i] /" >&2) &
  pids+=("$!")
done
[[ -z "$dry_run" ]] || exit 0

trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT

# Waits for all processes, but at most `grace` seconds after one has failed.
failed_at=''
left="$processes"
while ((left)); do
  left=0
  for ((i = 0; i < processes; i++)); do
    [[ -z "${codes[i]:-}" ]] || continue
    if kill -0 "${pids[i]}" 2>/dev/null; then
      left=$((left + 1))
      continue
    fi
    codes[i]=0
    wait "${pids[i]}" || codes[i]=$?
    [[ "${codes[i]}" == 0 ]] || failed_at="${failed_at:-$SECONDS}"
  done
  if [[ -n "$failed_at" ]] && ((left && SECONDS - failed_at > grace)); then
    kill -KILL "${pids[@]}" 2>/dev/null || true
  fi
  ((left == 0)) || sleep 0.5 || true
done

result=0
for code in "${codes[@]}"; do
  case "$result:$code" in
    *:0 | 2:* | 75:[!2]*) ;;
    *) result="$code" ;;
  esac
done
echo "local_pod.sh: exit codes ${codes[*]}" >&2
exit "$result"
