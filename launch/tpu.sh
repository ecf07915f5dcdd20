#!/usr/bin/env bash
# Manages a Cloud TPU slice, from the request to the end of a run.
#
#   launch/tpu.sh COMMAND --name=NAME --zone=ZONE [FLAGS] [-- PPN ARGUMENTS]
#
# Commands, each of which can be repeated:
#   run      check the config, then create, wait, setup, start and logs; restart after every
#            preemption, if necessary on a new slice, until the command is done
#   create   request the slice as a queued resource
#   wait     wait until the slice is ready
#   setup    install this repository on all workers, and copy the data of --data there
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
#                      run tries several, as in --type=v6e-16,v5litepod-16 --zone=us-east1-d,us-west4-a,
#                      in turn: the first type in every zone, then the next one
#   --slices=N         train on N slices of the type together (multislice); give it to every command
#                      of this name (default: 1)
#   --data=gs://BUCKET/FOLDER  for run and setup: copy the folder's content to ~/ppn/data of each
#                      worker, where set-up leaves it alone; name it in the config as ~/ppn/data/...
#   --runtime=VERSION  software of the VMs (default: depends on the type)
#   --spot, --reserved use spot or reserved capacity (default: on demand)
#   --autocheckpoint   have maintenance announced to the command by SIGTERM, so that it saves
#   --create-flag=FLAG flag of `gcloud compute tpus queued-resources create`, such as
#                      --create-flag=--network=NET, --subnetwork=, --internal-ips,
#                      --service-account=EMAIL or --labels=; may be repeated
#   --ssh-flag=FLAG    flag of `gcloud compute tpus tpu-vm ssh` and `scp`, such as
#                      --ssh-flag=--internal-ip or, with --track=alpha,
#                      --ssh-flag=--tunnel-through-iap; may be repeated
#   --track=alpha|beta use this track of gcloud's commands
#   --revision=REV     commit to install (default: HEAD)
#   --local            install the working tree instead of a commit
#   --worker=N         for logs: another worker of the first slice, or all (default: 0)
#   --poll=SECONDS     interval between checks while waiting (default: 30)
#   --patience=SECONDS how long one of several types and zones may keep run waiting (default: 900)
#   --grace=SECONDS    time for a worker to end after others have (default: 180)
#   --retries=N        failures in a row, without preemptions, before run gives up (default: 3)
#   --delete           for run: delete the slice whenever run ends, except by Ctrl-C
#   --unchecked        for run: do not check the config and the data before the request
#   --dry-run          print every command without executing it
#
# A request that fails is made again, after a pause that doubles up to 15 minutes; only quota,
# permissions and mistakes end `run`. A slice that is left says so in a line with STILL BILLS.
#
# Exit codes: 0 done, 1 failed, 2 a mistake in the arguments of this script or of ppn.
set -euo pipefail
shopt -s extglob # macOS' bash does not enable it inside [[ ]].

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

command=''
name='' zone='' project='' type='' runtime='' given_runtime='' tier='' revision='HEAD' local_tree=''
worker=0 data='' track='' poll=30 patience=900 grace=180 retries=3 delete_after='' unchecked=''
dry_run='' slices=1
arguments=() create_flags=() ssh_flags=() scp_flags=()
candidates=()     # Pairs of a type and a zone.
at=0              # Index of the pair that is asked for.
asked_at=0        # When, in seconds of this script.
pause=0           # Seconds until the next round of requests.
requested=''      # Whether there may be a slice or a request.
continues=''      # Whether the command goes on after this script.
folder=''         # Temporary folder of the files to copy.
helpers=()        # Processes that reach one slice each.
private_agent=''   # Process of our own ssh-agent.
assumed='READY'   # State of the slice in a dry run.
was_ready=''      # Whether the slice was ready at some time.

# shellcheck source-path=SCRIPTDIR
source "$here/tpu_checks.sh"
# shellcheck source-path=SCRIPTDIR
source "$here/tpu_slice.sh"
# shellcheck source-path=SCRIPTDIR
source "$here/tpu_workers.sh"

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

# Result of one execution of the command: done, mistake, stopped, preempted, refused or failed.
verdict=''

# Executes the command once on one slice; sets `verdict`.
attempt() {
  local states code=0
  verdict='failed'
  create || code=$?
  ((code)) || wait_for_slice || code=$?
  if ((code)); then
    ((code != 3)) || verdict='refused'
    return 0
  fi
  # A new worker has no worker.sh yet.
  states="$(worker_states)" || states='none'
  if [[ " $states" != *' running'* ]]; then
    { setup && start; } || code=$?
    if ((code)); then
      ((code != 2)) || verdict='mistake'
      return 0
    fi
  fi
  await_end
}

run() {
  local failures=0
  if [[ -n "$dry_run" ]]; then
    dry_run_all
    return
  fi
  check_config
  trap 'continues=yes; exit 143' TERM HUP
  trap 'continues=yes; say "the command continues; \`run\` follows it again, \`stop\` ends it"
    exit 130' INT
  choose_existing
  while ((failures <= retries)); do
    attempt
    if [[ "$verdict" == failed && -n "$was_ready" ]]; then
      if [[ "$(slice_state)" == @(GONE|NONE) ]]; then
        verdict='preempted'
      elif has_lost_a_worker; then
        say 'a worker does not answer, although the others do; asking for another slice'
        ! delete || verdict='preempted'
      fi
    fi
    case "$verdict" in
      done | stopped)
        say "$verdict"
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
  check_config
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
      --slices=*) slices="${1#*=}" ;;
      --data=*) data="${1#*=}" ;;
      --runtime=*) given_runtime="${1#*=}" ;;
      --spot | --reserved)
        [[ -z "$tier" || "$tier" == "$1" ]] || fail 'give either --spot or --reserved'
        tier="$1"
        ;;
      --autocheckpoint) create_flags+=(--autocheckpoint-enabled) ;;
      --create-flag=*) create_flags+=("${1#*=}") ;;
      --ssh-flag=--*)
        ssh_flags+=("${1#*=}")
        scp_flags+=("${1#*=}")
        ;;
      --ssh-flag=*)
        ssh_flags+=("--ssh-flag=${1#*=}")
        scp_flags+=("--scp-flag=${1#*=}")
        ;;
      --track=*) track="${1#*=}" ;;
      --revision=*) revision="${1#*=}" ;;
      --local) local_tree=yes ;;
      --worker=*) worker="${1#*=}" ;;
      --poll=*) poll="${1#*=}" ;;
      --patience=*) patience="${1#*=}" ;;
      --grace=*) grace="${1#*=}" ;;
      --retries=*) retries="${1#*=}" ;;
      --delete) delete_after=yes ;;
      --unchecked) unchecked=yes ;;
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
  local letters='^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$' flag zones=() types=()
  [[ "$name" =~ $letters ]] || fail "--name=$name must have lowercase letters, digits and hyphens only"
  IFS=, read -ra zones <<<"$zone"
  ((${#zones[@]})) || zones=('')
  for zone in "${zones[@]}"; do
    [[ "$zone" =~ $letters ]] || fail "--zone=$zone is not a zone; give one such as us-west4-a"
  done
  ((${#zones[@]} == 1)) || [[ "$command" == run ]] ||
    fail "$command needs one --zone; \`run\` says in which one the slice is"
  [[ -z "$project" || "$project" =~ ^[a-z0-9:.-]+$ ]] || fail "--project=$project is not a project"
  [[ "$track" == @(|alpha|beta) ]] || fail "--track=$track is unknown; legal: alpha, beta"
  [[ -z "$data" || "$data" =~ ^gs://[a-z0-9][^*?\ ]*$ ]] ||
    fail "--data=$data must be gs://BUCKET/FOLDER"
  for flag in ${create_flags[@]+"${create_flags[@]}"}; do
    [[ "$flag" == --* ]] || fail "--create-flag=$flag must be a flag, such as --create-flag=--network=NET"
  done
  [[ "$worker" == all ]] || count --worker "$worker"
  count --slices "$slices"
  ((slices >= 1)) || fail "--slices=$slices must be at least 1"
  count --poll "$poll"
  count --patience "$patience"
  count --grace "$grace"
  count --retries "$retries"
  [[ "$revision" != -* ]] || fail "--revision=$revision is not a commit"
  pause="$poll"
  [[ "$command" == @(run|create) ]] || return 0
  IFS=, read -ra types <<<"$type"
  ((${#types[@]})) || types=('')
  ((${#types[@]} == 1)) || [[ "$command" == run ]] || fail "create needs one --type"
  for type in "${types[@]}"; do
    check_type
    for zone in "${zones[@]}"; do
      candidates+=("$type $zone")
    done
  done
  choose 0
}

check_type() {
  [[ "$type" != @(tpu7x|v7x|ironwood)* ]] ||
    fail "--type=$type: Cloud TPU's API does not serve TPU7x; use GKE, see launch/README.md"
  [[ "$type" =~ ^(v4|v5litepod|v5p|v6e)-[1-9][0-9]*$ ]] ||
    fail "--type=$type is unknown; legal: v4-N, v5litepod-N (v5e), v5p-N, v6e-N, such as v5litepod-16"
  [[ "$type" != @(v4|v5p)-*[13579] ]] || fail "--type=$type: N counts cores, two for each chip"
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

leave() {
  local helper
  for helper in ${helpers[@]+"${helpers[@]}"}; do # They ignore Ctrl-C.
    kill "$helper" 2>/dev/null || true
  done
  [[ "$command" != run ]] || settle || true
  [[ -z "$folder" || -n "$dry_run" ]] || rm -rf "$folder"
  [[ -z "$private_agent" ]] || kill "$private_agent" 2>/dev/null || true
}

main() {
  command="${1:-}"
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
  [[ "$command" != @(run|start) ]] || check_arguments
  [[ "$command" != @(run|create) ]] || assumed='NONE'
  exec 3>&1
  if [[ -z "$dry_run" ]] && ! command -v gcloud >/dev/null; then
    fail 'gcloud is not installed; see https://cloud.google.com/sdk/docs/install'
  fi
  trap leave EXIT
  [[ "$command" == @(create|wait|delete) ]] || ensure_agent
  case "$command" in
    create) create || fail 'the request was refused' 1 ;;
    wait) wait_for_slice || fail "$name was preempted or deleted" 1 ;;
    stop) on_workers all stop "$grace" ;;
    *) "$command" ;;
  esac
}

main "$@"
