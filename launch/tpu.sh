#!/usr/bin/env bash
# Manages a Cloud TPU slice, from the request to the end of a run.
#
#   launch/tpu.sh COMMAND --name=NAME --zone=ZONE [FLAGS] [-- PPN ARGUMENTS]
#
# Commands, each of which can be repeated:
#   run      create, wait, setup, start and logs; restart after every preemption, if necessary on a
#            new slice, until the command is done
#   create   request the slice as a queued resource
#   wait     wait until the slice is ready
#   setup    install this repository on all workers
#   start    start `ppn ARGUMENTS` on all workers, independent of the connection
#   logs     follow the output of worker 0
#   status   show the state of the slice and of the command on each worker
#   stop     send SIGTERM to the command on all workers, so that it saves and ends; also ends `run`
#   delete   delete the slice and the request
#
# Flags:
#   --name=NAME        name of the slice and of its request
#   --zone=ZONE        zone, such as us-west4-a
#   --project=PROJECT  project (default: gcloud's)
#   --type=TYPE        for create and run: v4-N, v5litepod-N (v5e), v5p-N or v6e-N
#   --runtime=VERSION  software of the VMs (default: depends on the type)
#   --spot, --reserved use spot or reserved capacity (default: on demand)
#   --revision=REV     commit to install (default: HEAD)
#   --local            install the working tree instead of a commit
#   --worker=N         for logs: another worker, or all (default: 0)
#   --poll=SECONDS     interval between checks while waiting (default: 30)
#   --grace=SECONDS    time for a worker to end after others have (default: 180)
#   --retries=N        failures in a row, without preemptions, before run gives up (default: 3)
#   --delete           for run: delete the slice once the command is done
#   --dry-run          print every command without executing it
#
# Exit codes: 0 done, 1 failed, 2 a mistake in the arguments of this script or of ppn.
set -euo pipefail
shopt -s extglob # macOS' bash does not enable it inside [[ ]].

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

name='' zone='' project='' type='' runtime='' tier='' revision='HEAD' local_tree='' worker=0
poll=30 grace=180 retries=3 delete_after='' dry_run=''
arguments=()
folder=''         # Temporary folder of the files to copy.
assumed='READY'   # State of the slice in a dry run.
was_ready=''      # Whether the slice was ready at some time.

say() { echo "tpu.sh: $1" >&2; }

fail() {
  say "error: $1"
  exit "${2:-2}"
}

# Quotes words for any POSIX shell, if necessary.
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

# on_workers all|N CALL...: calls worker.sh.
on_workers() {
  local which="$1"
  shift
  tpus tpu-vm ssh "$name" "--worker=$which" --ssh-flag=-oServerAliveInterval=15 \
    --ssh-flag=-oServerAliveCountMax=4 "--command=$(quote bash ppn_worker.sh "$@" | sed 's/ $//')"
}

# state_of queued-resources|tpu-vm FIELD: prints the state according to the API, NONE or UNKNOWN.
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

# Prints NONE, WAITING, READY, GONE (preempted or deleted), FAILED or UNKNOWN.
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
    FAILED) fail "the request $name has failed, perhaps for lack of quota; see \`gcloud compute tpus \
queued-resources describe $name --zone=$zone\`, and delete it" 1 ;;
    UNKNOWN)
      # If it was ready before, the network is down; otherwise project or permissions may be wrong.
      [[ -n "$was_ready" ]] || fail 'the state of the request cannot be read' 1
      return
      ;;
  esac
  say "requesting $type as $name in $zone"
  tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" \
    "--runtime-version=$runtime" ${tier:+"$tier"} || return
  assumed='READY'
}

# Returns 1 if the slice is lost while waiting.
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
      fail "--revision=$revision is not a commit of this repository"
  fi
  [[ -n "$dry_run" ]] || id="$(git hash-object "$source")" || return
  execute cp "$here/worker.sh" "$folder/ppn_worker.sh" || return
  say "installing on all workers of $name"
  tpus tpu-vm scp "$source" "$folder/ppn_worker.sh" "$name:" --worker=all &&
    on_workers all install "$id"
}

# Packs tracked files and new ones that are not ignored.
pack_tree() {
  local file files=(git -C "$here/.." ls-files -z --cached --others --exclude-standard)
  if [[ -n "$dry_run" ]]; then
    printf '%s| tar -C %s--null -T - -cf - | gzip -n > %s\n' "$(quote "${files[@]}") " \
      "$(quote "$here/..") " "$1" >&3
    return
  fi
  "${files[@]}" |
    while IFS= read -r -d '' file; do # Deleted files are still listed.
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

# Prints a word per worker: none, running, exit:CODE or stopped:CODE. Fails if one does not answer.
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

# Result of one execution of the command: done, mistake, stopped, preempted or failed.
verdict=''

# Follows the command until it has ended on all workers, and sets `verdict`.
await_end() {
  local states waited=0 followed=''
  while :; do
    states="$(worker_states)" || return 0
    case " $states" in
      *' running'*' '[ens]* | *' '[ens]*' running'*)
        # The others hang in a collective operation until they notice.
        if ((waited >= grace)); then
          on_workers all end 30 || return 0
        fi
        waited=$((waited + poll))
        sleep "$poll"
        ;;
      *' running'*)
        followed=1
        logs || true
        sleep 1
        ;;
      *) break ;;
    esac
  done
  # A command may end before its first check.
  [[ -n "$followed" ]] || logs || true
  say "the command has ended: $states"
  case " $states" in
    *' stopped'*) verdict='stopped' ;;
    *' exit:2 '*) verdict='mistake' ;;
    *' exit:75 '*) verdict='preempted' ;;
    *' exit:'[!0]* | *' none'*) verdict='failed' ;;
    *) verdict='done' ;;
  esac
}

# Executes the command once on one slice; sets `verdict`.
attempt() {
  local states
  verdict='failed'
  if ! create; then
    [[ -n "$was_ready" ]] || fail 'the request was refused' 1
    return 0
  fi
  wait_for_slice || return 0
  # A new worker has no worker.sh yet.
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
  trap 'say "the command continues; \`run\` follows it again, \`stop\` ends it"; exit 130' INT
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
      mistake) fail 'ppn rejected its arguments; see its last lines above' ;;
      preempted)
        say 'preempted; resuming from the last checkpoint'
        failures=0
        ;;
      failed)
        say 'failed; trying again'
        failures=$((failures + 1))
        sleep "$poll"
        ;;
    esac
  done
  fail "gave up: failed $failures times in a row" 1
}

dry_run_all() {
  create
  wait_for_slice
  setup
  start
  logs
  on_workers all status
  echo '# exit code 75 on a worker: repeat from setup. If the slice is preempted:' >&3
  delete
  create
  if [[ -n "$delete_after" ]]; then
    echo '# when done:' >&3
    delete
  fi
}

count() { # count FLAG VALUE
  [[ "$2" =~ ^(0|[1-9][0-9]{0,5})$ ]] || fail "$1=$2 must be an integer of at least 0"
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
  [[ "$name" =~ $letters ]] || fail "--name=$name must have lowercase letters, digits and hyphens only"
  [[ "$zone" =~ $letters ]] || fail "--zone=$zone is not a zone; give one such as us-west4-a"
  [[ -z "$project" || "$project" =~ ^[a-z0-9:.-]+$ ]] || fail "--project=$project is not a project"
  [[ "$worker" == all ]] || count --worker "$worker"
  count --poll "$poll"
  count --grace "$grace"
  count --retries "$retries"
  [[ "$revision" != -* ]] || fail "--revision=$revision is not a commit"
}

# Software by generation: https://cloud.google.com/tpu/docs/runtimes
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

# The processes find each other through the slice's metadata.
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
