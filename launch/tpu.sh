#!/usr/bin/env bash
# A Cloud TPU slice, from the request to the end of a run.
#
#   launch/tpu.sh COMMAND --name=NAME --zone=ZONE [FLAGS] [-- PPN ARGUMENTS]
#
# Commands, each safe to repeat:
#   run      all of it: create, wait, setup, start, logs; starts again after every preemption, on a
#            new slice if need be, until the command is done
#   create   asks for the slice, as a queued resource
#   wait     until the slice is there
#   setup    installs this repository on all workers
#   start    starts `ppn ARGUMENTS` on all workers; it goes on when the connection ends
#   logs     follows what worker 0 prints
#   status   of the slice and of the command on each worker
#   stop     SIGTERM to the command on all workers, so that it saves and ends; `run` then ends too
#   delete   the slice and the request
#
# Flags:
#   --name=NAME        of the slice and of its request
#   --zone=ZONE        such as us-west4-a
#   --project=PROJECT  other than gcloud's own
#   --type=TYPE        for create and run: v4-N, v5litepod-N (v5e), v5p-N or v6e-N
#   --runtime=VERSION  software of the VMs (default: by the type)
#   --spot, --reserved how to pay; on demand without either
#   --revision=REV     which commit to install (default: HEAD)
#   --local            installs the working tree as it is instead
#   --worker=N         for logs: another worker, or all (default: 0)
#   --poll=SECONDS     between two looks at what is waited for (default: 30)
#   --grace=SECONDS    for a worker to end when others have (default: 180)
#   --retries=N        failures in a row, preemptions aside, before run gives up (default: 3)
#   --delete           for run: deletes the slice once the command is done
#   --dry-run          prints every command and executes none
#
# Exit codes: 0 done, 1 failed, 2 a mistake in what was given to this script or to ppn.
set -euo pipefail
shopt -s extglob # Off inside [[ ]] in the bash of macOS.

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

name='' zone='' project='' type='' runtime='' tier='' revision='HEAD' local_tree='' worker=0
poll=30 grace=180 retries=3 delete_after='' dry_run=''
arguments=()
folder=''         # For what is copied.
assumed='READY'   # State of the slice in a dry run.
was_ready=''      # Whether this script has seen the slice.

say() { echo "tpu.sh: $1" >&2; }

fail() {
  say "error: $1"
  exit "${2:-2}"
}

# In single quotes where need be; for any shell.
quote() {
  local word text="'" escaped="'\\''"
  for word in "$@"; do
    if [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      printf '%s ' "$word"
    else
      printf "'%s' " "${word//$text/$escaped}"
    fi
  done
}

execute() {
  if [[ -n "$dry_run" ]]; then
    printf '%s\n' "$(quote "$@" | sed 's/ $//')" >&3
  else
    "$@"
  fi
}

tpus() {
  execute gcloud compute tpus "$@" "--zone=$zone" ${project:+"--project=$project"} --quiet
}

# on_workers all|N CALL...: a call of worker.sh.
on_workers() {
  local which="$1"
  shift
  tpus tpu-vm ssh "$name" "--worker=$which" --ssh-flag=-oServerAliveInterval=15 \
    --ssh-flag=-oServerAliveCountMax=4 "--command=$(quote bash ppn_worker.sh "$@" | sed 's/ $//')"
}

# state_of queued-resources|tpu-vm FIELD: what the API says, NONE or UNKNOWN.
state_of() {
  local answer
  if answer="$(tpus "$1" describe "$name" "--format=value($2)" 2>&1)"; then
    tail -n 1 <<<"$answer"
  elif [[ "$answer" == *NOT_FOUND* || "$answer" == *'was not found'* ]]; then
    echo NONE
  else
    say "$(tail -n 1 <<<"$answer")"
    echo UNKNOWN
  fi
}

# NONE, WAITING, READY, GONE (preempted or deleted), FAILED or UNKNOWN.
slice_state() {
  local request
  request="$(state_of queued-resources state.state)"
  if [[ -n "$dry_run" ]]; then
    [[ "$assumed" == NONE ]] || state_of tpu-vm state >/dev/null
    echo "$assumed"
    return
  fi
  case "$request" in
    NONE | UNKNOWN | FAILED) echo "$request" ;;
    SUSPENDING | SUSPENDED | DELETING) echo GONE ;;
    ACTIVE)
      case "$(state_of tpu-vm state)" in
        READY) echo READY ;;
        NONE | PREEMPTED | TERMINATED | STOPPING | STOPPED | DELETING) echo GONE ;;
        *) echo WAITING ;;
      esac
      ;;
    *) echo WAITING ;;
  esac
}

create() {
  case "$(slice_state)" in
    WAITING | READY) return ;;
    GONE) delete || return ;;
    FAILED) fail "the request $name has failed, such as for want of quota; see \`gcloud compute tpus \
queued-resources describe $name --zone=$zone\`, and delete it" 1 ;;
    UNKNOWN)
      # Later it is the network that is down, and not a mistake in project or rights.
      [[ -n "$was_ready" ]] || fail 'the state of the request cannot be read' 1
      return
      ;;
  esac
  say "asking for $type as $name in $zone"
  tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" \
    "--runtime-version=$runtime" ${tier:+"$tier"} || return
  assumed='READY'
}

# Returns 1 where the slice was lost meanwhile.
wait_for_slice() {
  local state last=''
  while :; do
    state="$(slice_state)"
    case "$state" in
      READY)
        was_ready=yes
        return
        ;;
      NONE) fail "there is no request $name in $zone; create it first" ;;
      GONE) return 1 ;;
      FAILED) fail "the request $name has failed" 1 ;;
    esac
    [[ "$state" == "$last" ]] || say "waiting for $name: $state"
    last="$state"
    sleep "$poll"
  done
}

setup() {
  local id='ID' source
  if [[ -n "$dry_run" ]]; then
    folder='FOLDER'
  elif [[ -z "$folder" ]]; then
    folder="$(mktemp -d)" || return
    trap 'rm -rf "$folder"' EXIT
  fi
  source="$folder/ppn_source.tar.gz"
  if [[ -n "$local_tree" ]]; then
    pack_tree "$source" || return
  else
    execute git -C "$here/.." archive --format=tar.gz "--output=$source" "$revision" ||
      fail "--revision=$revision is no commit of this repository"
  fi
  [[ -n "$dry_run" ]] || id="$(git hash-object "$source")" || return
  execute cp "$here/worker.sh" "$folder/ppn_worker.sh" || return
  say "installing on all workers of $name"
  tpus tpu-vm scp "$source" "$folder/ppn_worker.sh" "$name:" --worker=all &&
    on_workers all install "$id"
}

# Tracked files and new ones that are not ignored.
pack_tree() {
  local file files=(git -C "$here/.." ls-files -z --cached --others --exclude-standard)
  if [[ -n "$dry_run" ]]; then
    printf '%s| tar -C %s--null -T - -cf - | gzip -n > %s\n' "$(quote "${files[@]}") " \
      "$(quote "$here/..") " "$1" >&3
    return
  fi
  "${files[@]}" |
    while IFS= read -r -d '' file; do # Those that were deleted are still listed.
      [[ ! -e "$here/../$file" ]] || printf '%s\0' "$file"
    done | tar -C "$here/.." --null -T - -cf - | gzip -n >"$1"
}

start() {
  say "starting ppn ${arguments[*]}"
  on_workers all start ppn "${arguments[@]}"
}

logs() {
  local prefix=()
  [[ "$worker" != all ]] || prefix=(prefix)
  on_workers "$worker" follow 20 "${prefix[@]+"${prefix[@]}"}"
}

# A word for each worker: none, running, exit:CODE or stopped:CODE. Fails where some do not answer.
worker_states() {
  local lines
  lines="$(on_workers all status 2>/dev/null)" || return
  sed -n 's/^ppn-worker [^ ]* //p' <<<"$lines" | tr -d '\r' | tr ' ' ':' | tr '\n' ' '
}

status() {
  local state
  state="$(slice_state)"
  say "$name: $state"
  [[ "$state" != READY ]] || on_workers all status
}

delete() {
  if [[ -z "$dry_run" && "$(state_of queued-resources state.state)" == NONE ]]; then
    return
  fi
  say "deleting $name"
  tpus queued-resources delete "$name" --force
  assumed='NONE'
}

# How one life of the command went: done, mistake, stopped, preempted or failed.
verdict=''

# Follows the command until it has ended on all workers, and sets `verdict`.
await_end() {
  local states waited=0
  while :; do
    states="$(worker_states)" || return 0
    case " $states" in
      *' running'*' '[ens]* | *' '[ens]*' running'*)
        # The others hang in a collective until they notice.
        if ((waited >= grace)); then
          on_workers all end 30 || return 0
        fi
        waited=$((waited + poll))
        sleep "$poll"
        ;;
      *' running'*)
        logs || true
        sleep 1
        ;;
      *) break ;;
    esac
  done
  say "the command has ended: $states"
  case " $states" in
    *' stopped'*) verdict='stopped' ;;
    *' exit:2 '*) verdict='mistake' ;;
    *' exit:75 '*) verdict='preempted' ;;
    *' exit:'[!0]* | *' none'*) verdict='failed' ;;
    *) verdict='done' ;;
  esac
}

# One life of the command on one slice; sets `verdict`.
attempt() {
  local states
  verdict='failed'
  if ! create; then
    [[ -n "$was_ready" ]] || fail 'the request was refused' 1
    return 0
  fi
  wait_for_slice || return 0
  # A worker that is new has no worker.sh yet.
  states="$(worker_states)" || states='none'
  if [[ " $states" != *' running'* ]]; then
    setup && start || return 0
  fi
  await_end
}

run() {
  local failures=0
  if [[ -n "$dry_run" ]]; then
    dry_run_all
    return
  fi
  trap 'say "the command goes on; \`run\` follows it again, \`stop\` ends it"; exit 130' INT
  while ((failures <= retries)); do
    attempt
    if [[ "$verdict" == failed && "$(slice_state)" == @(GONE|NONE) && -n "$was_ready" ]]; then
      verdict='preempted'
    fi
    case "$verdict" in
      done | stopped)
        say "$verdict"
        [[ -z "$delete_after" || "$verdict" == stopped ]] || delete
        return
        ;;
      mistake) fail 'ppn refused what it was given; see its last lines above' ;;
      preempted)
        say 'preempted; going on from the last checkpoint'
        failures=0
        ;;
      failed)
        say 'failed; trying again'
        failures=$((failures + 1))
        sleep "$poll"
        ;;
    esac
  done
  fail "given up: failed $failures times in a row" 1
}

dry_run_all() {
  create
  wait_for_slice
  setup
  start
  logs
  on_workers all status
  echo '# exit code 75 on a worker: from setup on again. The slice preempted:' >&3
  delete
  create
  if [[ -n "$delete_after" ]]; then
    echo '# done:' >&3
    delete
  fi
}

count() { # count FLAG VALUE
  [[ "$2" =~ ^(0|[1-9][0-9]{0,5})$ ]] || fail "$1=$2 is no whole number"
}

parse() {
  while (($#)); do
    case "$1" in
      --name=*) name="${1#*=}" ;;
      --zone=*) zone="${1#*=}" ;;
      --project=*) project="${1#*=}" ;;
      --type=*) type="${1#*=}" ;;
      --runtime=*) runtime="${1#*=}" ;;
      --spot | --reserved)
        [[ -z "$tier" || "$tier" == "$1" ]] || fail 'give either --spot or --reserved'
        tier="$1"
        ;;
      --revision=*) revision="${1#*=}" ;;
      --local) local_tree=yes ;;
      --worker=*) worker="${1#*=}" ;;
      --poll=*) poll="${1#*=}" ;;
      --grace=*) grace="${1#*=}" ;;
      --retries=*) retries="${1#*=}" ;;
      --delete) delete_after=yes ;;
      --dry-run) dry_run=yes ;;
      --)
        shift
        arguments=("$@")
        return
        ;;
      *) fail "unknown argument $1; see launch/tpu.sh --help" ;;
    esac
    shift
  done
}

check() {
  local letters='^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$'
  [[ "$name" =~ $letters ]] || fail "--name=$name must be small letters, digits and hyphens"
  [[ "$zone" =~ $letters ]] || fail "--zone=$zone is no zone, such as us-west4-a"
  [[ -z "$project" || "$project" =~ ^[a-z0-9:.-]+$ ]] || fail "--project=$project is no project"
  [[ "$worker" == all ]] || count --worker "$worker"
  count --poll "$poll"
  count --grace "$grace"
  count --retries "$retries"
  [[ "$revision" != -* ]] || fail "--revision=$revision is no commit"
}

# Which software fits which generation: https://cloud.google.com/tpu/docs/runtimes
check_type() {
  local default
  [[ "$type" =~ ^(v4|v5litepod|v5p|v6e)-[1-9][0-9]*$ ]] ||
    fail "--type=$type is unknown; legal: v4-N, v5litepod-N (v5e), v5p-N, v6e-N, such as v5litepod-16"
  case "$type" in
    v4-*) default='tpu-ubuntu2204-base' ;;
    v5litepod-*) default='v2-alpha-tpuv5-lite' ;;
    v5p-*) default='v2-alpha-tpuv5' ;;
    v6e-*) default='v2-alpha-tpuv6e' ;;
  esac
  runtime="${runtime:-$default}"
}

# On every worker the processes find each other by the slice's metadata.
check_arguments() {
  [[ "${arguments[0]:-}" == [a-z]* ]] ||
    fail "give ppn's arguments at the end, such as -- train --config=FILE --workdir=gs://BUCKET/RUN"
  case "${arguments[0]} ${arguments[*]}" in
    *' --distributed'* | *' --coordinator'*) ;;
    train\ * | evaluate\ *) arguments+=(--distributed=auto) ;;
  esac
}

main() {
  local command="${1:-}"
  if [[ "$command" == --help || "$command" == -h ]]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    return
  fi
  case "$command" in
    run | create | wait | setup | start | logs | status | stop | delete) shift ;;
    *) fail "unknown command '$command'; legal: run, create, wait, setup, start, logs, status, stop, \
delete" ;;
  esac
  parse "$@"
  check
  [[ "$command" != @(run|create) ]] || check_type
  [[ "$command" != @(run|start) ]] || check_arguments
  [[ "$command" != @(run|create) ]] || assumed='NONE'
  exec 3>&1
  if [[ -z "$dry_run" ]] && ! command -v gcloud >/dev/null; then
    fail 'gcloud is not installed; see https://cloud.google.com/sdk/docs/install'
  fi
  case "$command" in
    create) create || fail 'the request was refused' 1 ;;
    wait) wait_for_slice || fail "$name was preempted or deleted" 1 ;;
    stop) on_workers all stop "$grace" ;;
    *) "$command" ;;
  esac
}

main "$@"
