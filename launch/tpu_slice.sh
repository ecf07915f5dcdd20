# shellcheck shell=bash disable=SC2034,SC2154 # Its variables are those of tpu.sh, which reads it.
#
# The request for a slice: what is asked for, its state, and its end.

tpus() {
  execute gcloud ${track:+"$track"} compute tpus "$@" "--zone=$zone" \
    ${project:+"--project=$project"} --quiet
}

# Prints the names of the nodes: one for each slice, NAME-0 and so on if there are several.
nodes() {
  local i
  if ((slices == 1)); then
    echo "$name"
    return
  fi
  for ((i = 0; i < slices; i++)); do
    echo "$name-$i"
  done
}

# state_of queued-resources|tpu-vm FIELD [NODE]: prints the state according to the API, NONE or
# UNKNOWN.
state_of() {
  local answer
  if answer="$(tpus "$1" describe "${3:-$name}" "--format=value($2)" 2>&1)"; then
    tail -n 1 <<<"$answer"
  elif [[ "$answer" == *NOT_FOUND* || "$answer" == *'was not found'* ]]; then
    echo NONE
  else
    say "$(tail -n 1 <<<"$answer")"
    echo UNKNOWN
  fi
}

# Prints READY if all slices are, GONE if one is, WAITING otherwise; NONE if there are none yet.
nodes_state() {
  local node found=' '
  for node in $(nodes); do
    case "$(state_of tpu-vm state "$node")" in
      READY) found+='READY ' ;;
      NONE) found+='NONE ' ;;
      PREEMPTED | TERMINATED | STOPPING | STOPPED | DELETING) found+='GONE ' ;;
      *) found+='WAITING ' ;; # Also REPAIRING, after which it is READY again.
    esac
  done
  case "$found" in
    *' GONE '* | *' READY '*' NONE '* | *' NONE '*' READY '*) echo GONE ;;
    *' WAITING '*) echo WAITING ;;
    *' NONE '*) echo NONE ;;
    *) echo READY ;;
  esac
}

# Prints NONE, WAITING, READY, GONE (preempted or deleted), FAILED or UNKNOWN.
slice_state() {
  local request
  request="$(state_of queued-resources state.state)"
  if [[ -n "$dry_run" ]]; then
    [[ "$assumed" == NONE ]] || nodes_state >/dev/null
    echo "$assumed"
    return
  fi
  case "$request" in
    NONE | UNKNOWN | FAILED) echo "$request" ;;
    SUSPENDING | SUSPENDED | DELETING) echo GONE ;;
    ACTIVE)
      request="$(nodes_state)"
      [[ "$request" != NONE ]] || request='GONE'
      echo "$request"
      ;;
    *) echo WAITING ;;
  esac
}

# Prints why a request has failed.
failure_reason() {
  local reason
  reason="$(tpus queued-resources describe "$name" \
    '--format=value(state.failedData.error.message,state.stateInitiator)' 2>/dev/null)" || true
  reason="$(tr -s '[:space:]' ' ' <<<"$reason" | sed 's/ $//')"
  echo "${reason:-no reason is given}"
}

# Whether a reason is one that waiting does not change.
is_final() {
  grep -qiE 'quota|permission|forbidden|billing|SERVICE_DISABLED|INVALID_ARGUMENT|not available in|does not exist|NOT_FOUND' <<<"$1"
}

# choose I: takes pair I of a type and a zone.
choose() {
  local default
  at="$1"
  type="${candidates[at]%% *}"
  zone="${candidates[at]#* }"
  # https://cloud.google.com/tpu/docs/runtimes
  case "$type" in
    v4-*) default='tpu-ubuntu2204-base' ;;
    v5litepod-*) default='v2-alpha-tpuv5-lite' ;;
    v5p-*) default='v2-alpha-tpuv5' ;;
    *) default='v2-alpha-tpuv6e' ;;
  esac
  runtime="${given_runtime:-$default}"
}

# Takes the pair of an earlier request of this name, if there is one.
choose_existing() {
  local i zones=' '
  ((${#candidates[@]} > 1)) && [[ -z "$dry_run" ]] || return 0
  for ((i = 0; i < ${#candidates[@]}; i++)); do
    choose "$i"
    [[ "$zones" == *" $zone "* ]] && continue
    zones+="$zone "
    [[ "$(state_of queued-resources state.state)" == @(NONE|UNKNOWN) ]] || return 0
  done
  choose 0
}

# next_candidate REASON: takes the next pair; after the last one, waits before the first.
next_candidate() {
  say "$type in $zone: $1"
  if is_final "$1"; then
    candidates=(${candidates[@]+"${candidates[@]:0:at}"} "${candidates[@]:at+1}")
    ((${#candidates[@]})) || fail "there is no slice to be had: $1" 1
    at=$((at - 1))
  fi
  if ((at + 1 < ${#candidates[@]})); then
    choose $((at + 1))
    return
  fi
  say "asking again in $pause s"
  sleep "$pause"
  pause=$((pause * 2 > 900 ? 900 : pause * 2))
  choose 0
}

# Requests the slice unless it is there already. Returns 3 if another pair should be tried.
create() {
  local answer reason
  case "$(slice_state)" in
    WAITING | READY)
      requested=yes
      return
      ;;
    GONE) delete || return ;;
    FAILED)
      reason="the request has failed: $(failure_reason)"
      delete || return
      if [[ "$command" != run ]]; then
        fail "$reason" 1
      fi
      next_candidate "$reason"
      return 3
      ;;
    UNKNOWN)
      # If it was ready before, the network is down; otherwise project or permissions may be wrong.
      [[ -n "$was_ready" ]] || fail 'the state of the request cannot be read' 1
      return
      ;;
  esac
  say "requesting $( ((slices == 1)) || echo "$slices x ")$type as $name in $zone"
  requested=yes
  if [[ -n "$dry_run" ]]; then
    request
  elif ! answer="$(request 2>&1)"; then
    reason="$(grep -m 1 ERROR <<<"$answer" || tail -n 1 <<<"$answer")"
    [[ "$command" == run ]] || fail "the request was refused: $reason" 1
    requested=''
    next_candidate "the request was refused: $reason"
    return 3
  fi
  asked_at=$SECONDS
  assumed='READY'
}

request() {
  local node=("--node-id=$name")
  ((slices == 1)) || node=("--node-count=$slices" "--node-prefix=$name")
  tpus queued-resources create "$name" "${node[@]}" "--accelerator-type=$type" \
    "--runtime-version=$runtime" ${tier:+"$tier"} ${create_flags[@]+"${create_flags[@]}"}
}

# Returns 1 if the slice is lost while waiting, 3 if another pair should be tried.
wait_for_slice() {
  local state last=''
  while :; do
    state="$(slice_state)"
    case "$state" in
      READY)
        was_ready=yes
        pause="$poll"
        return
        ;;
      NONE) fail "there is no request $name in $zone; create it first" ;;
      GONE) return 1 ;;
      FAILED)
        [[ "$command" == run ]] || fail "the request $name has failed: $(failure_reason)" 1
        return 3
        ;;
      WAITING)
        if ((${#candidates[@]} > 1 && SECONDS - asked_at >= patience)) &&
          [[ "$(nodes_state)" == NONE ]]; then
          delete && next_candidate "nothing within $patience s"
          return 3
        fi
        ;;
    esac
    [[ "$state" == "$last" ]] || say "waiting for $name: $state"
    last="$state"
    sleep "$poll"
  done
}

delete() {
  if [[ -z "$dry_run" && "$(state_of queued-resources state.state)" == NONE ]]; then
    requested=''
    return
  fi
  say "deleting $name"
  tpus queued-resources delete "$name" --force || return
  requested=''
  assumed='NONE'
}

# Called whenever `run` ends: deletes the slice, or says that it is still there.
settle() {
  local flags="--name=$name --zone=$zone${project:+ --project=$project}"
  [[ -n "$requested" && -z "$dry_run" ]] || return 0
  if [[ -n "$delete_after" && -z "$continues" ]]; then
    delete && return
    say "WARNING: $name could not be deleted and STILL BILLS; repeat: launch/tpu.sh delete $flags"
  else
    say "WARNING: $name is not deleted and STILL BILLS; when done: launch/tpu.sh delete $flags"
  fi
}
