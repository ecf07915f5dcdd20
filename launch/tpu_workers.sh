# shellcheck shell=bash disable=SC2034,SC2154 # Its variables are those of tpu.sh, which reads it.
#
# The workers of all slices: ssh, what is installed and copied there, and the command that they run.

# on_node NODE all|N CALL...: calls worker.sh on workers of one slice.
on_node() {
  local node="$1" which="$2"
  shift 2
  tpus tpu-vm ssh "$node" "--worker=$which" --ssh-flag=-oServerAliveInterval=15 \
    --ssh-flag=-oServerAliveCountMax=4 ${ssh_flags[@]+"${ssh_flags[@]}"} \
    "--command=$(quote bash ppn_worker.sh "$@" | sed 's/ $//')"
}

# on_workers all|N CALL...: calls worker.sh on all workers of all slices, or on one of the first.
on_workers() {
  local which="$1" node
  shift
  if [[ "$which" == all ]]; then
    on_each_node on_node all "$@"
  else
    node="$(nodes | head -n 1)"
    on_node "$node" "$which" "$@"
  fi
}

# on_each_node FUNCTION WORDS...: calls FUNCTION NODE WORDS for all slices at once. Returns 2 if one
# of the calls does, otherwise an exit code that is not 0 if there is one.
on_each_node() {
  local function="$1" node code=0 result=0 pids=() pid
  shift
  for node in $(nodes); do
    if ((slices == 1)) || [[ -n "$dry_run" ]]; then
      "$function" "$node" "$@" || return
    else
      "$function" "$node" "$@" &
      pids+=($!)
      helpers+=($!)
    fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do
    code=0
    wait "$pid" || code=$?
    ((code == 0 || result == 2)) || result=$code
  done
  helpers=()
  return "$result"
}

copy_to_node() {
  tpus tpu-vm scp "$folder/ppn_source.tar.gz" "$folder/ppn_worker.sh" "$1:" --worker=all \
    ${scp_flags[@]+"${scp_flags[@]}"}
}

# gcloud refuses to reach several workers if an agent runs that does not hold its key, and may wait
# for ever for a key with a passphrase. A private agent leaves that of the user alone.
ensure_agent() {
  local key="$HOME/.ssh/google_compute_engine" flag fingerprint
  [[ -z "$dry_run" ]] || return 0
  command -v ssh-agent >/dev/null || return 0
  for flag in ${ssh_flags[@]+"${ssh_flags[@]}"}; do
    [[ "$flag" != --ssh-key-file=* ]] || key="${flag#*=}"
  done
  if [[ ! -f "$key" ]]; then # As gcloud makes it at its first connection.
    mkdir -p "${key%/*}" && chmod 700 "${key%/*}"
    ssh-keygen -q -t rsa -b 3072 -N '' -C "${USER:-ppn}" -f "$key" </dev/null ||
      fail "the key $key could not be made"
  fi
  fingerprint="$(ssh-keygen -lf "$key" | cut -d ' ' -f 2)" || fail "$key is not a key"
  if ssh-add -l 2>/dev/null | grep -qF -- "$fingerprint"; then
    return 0
  fi
  eval "$(ssh-agent -s 3>&-)" >/dev/null # Without 3 it would keep a pipe of our caller open.
  private_agent="$SSH_AGENT_PID"
  ssh-add -q "$key" || fail "the key $key could not be added to an agent; run ssh-add $key first"
}

setup() {
  local id='ID' source
  if [[ -n "$dry_run" ]]; then
    folder='FOLDER'
  elif [[ -z "$folder" ]]; then
    folder="$(mktemp -d)" || return
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
  on_each_node copy_to_node && on_workers all install "$id" && bring_data
}

# Tries the buckets by the account of the VMs, and copies the data.
bring_data() {
  local argument
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    [[ "$argument" != --workdir=gs://* ]] || on_workers all writable "${argument#*=}" || return
  done
  if [[ -n "$data" ]]; then
    say "copying $data to ~/ppn/data of all workers"
    on_workers all fetch "$data"
  fi
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

# Whether some workers answer and others do not, so that it is not this machine's network.
has_lost_a_worker() {
  local node one
  ! on_workers all status >/dev/null 2>&1 || return 1
  for node in $(nodes); do
    for one in 0 1; do
      ! on_node "$node" "$one" status >/dev/null 2>&1 || return 0
    done
  done
  return 1
}

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
