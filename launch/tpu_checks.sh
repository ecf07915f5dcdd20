# shellcheck shell=bash disable=SC2034,SC2154 # Its variables are those of tpu.sh, which reads it.
#
# What is checked before a slice is requested.

# Checks before a slice is requested what can be checked here: the commit, the config with the batch
# for each type, the data, and the bucket of the workdir.
check_config() {
  local argument ppn checked=() scratch i types=' ' flags
  [[ -z "$unchecked" ]] || return 0
  for argument in "${arguments[@]}"; do
    case "$argument" in
      --config=*.py)
        [[ -n "$local_tree$dry_run" || "$argument" == *=[/~]* ]] ||
          git -C "$here/.." cat-file -e "$revision:${argument#*=}" 2>/dev/null ||
          fail "${argument#*=} is not in commit $revision; commit it, or give --local"
        ;;
      --workdir=gs://*) check_bucket "${argument#*=}" ;;
      *=\~/ppn/data/*)
        [[ -n "$data" ]] || fail "$argument needs --data=gs://BUCKET/FOLDER"
        check_objects "${data%/}/${argument#*=\~/ppn/data/}"
        ;;
    esac
    case "$argument" in
      --workdir=* | --distributed=* | --coordinator=*) ;;
      *) checked+=("$argument") ;;
    esac
  done
  [[ -z "$data" ]] || check_objects "${data%/}/"
  [[ "${arguments[0]}" == train ]] || return 0
  ppn="$(command -v ppn || true)"
  ppn="${ppn:-$here/../.venv/bin/ppn}"
  if [[ -z "$dry_run" && ! -x "$ppn" ]]; then
    say 'WARNING: ppn is not installed here, so the config is not checked before a slice is requested'
    return
  fi
  scratch="$(mktemp -d)/run"
  for ((i = 0; i < ${#candidates[@]}; i++)); do
    type="${candidates[i]%% *}"
    [[ "$types" != *" $type "* ]] || continue
    types+="$type "
    flags=("--check=$(devices "$type")")
    ((slices == 1)) || flags+=("--slices=$slices")
    [[ -z "$data" ]] || flags+=(--without_data)
    if [[ -n "$dry_run" ]]; then
      execute ppn "${checked[@]}" --workdir=SCRATCH "${flags[@]}"
    elif ! (cd "$here/.." && "$ppn" "${checked[@]}" "--workdir=$scratch" "${flags[@]}"); then
      rmdir "${scratch%/run}"
      ((slices == 1)) ||
        fail "the config does not fit --slices=$slices of --type=$type; no slice was requested"
      fail "the config does not fit --type=$type; no slice was requested"
    fi
  done
  rmdir "${scratch%/run}"
}

# Number of JAX's devices in all slices: v4 and v5p count two cores for each.
devices() {
  case "$1" in
    v4-* | v5p-*) echo $((slices * ${1##*-} / 2)) ;;
    *) echo $((slices * ${1##*-})) ;;
  esac
}

check_bucket() {
  local bucket="${1#gs://}" answer
  if [[ -n "$dry_run" ]]; then
    execute gcloud storage buckets describe "gs://${bucket%%/*}" '--format=value(name)'
  elif ! answer="$(gcloud storage buckets describe "gs://${bucket%%/*}" '--format=value(name)' \
    2>&1)"; then
    fail "gs://${bucket%%/*} cannot be used: $(tail -n 1 <<<"$answer")"
  fi
}

check_objects() {
  local answer
  if [[ -n "$dry_run" ]]; then
    execute gcloud storage objects list "$1**" --limit=1 '--format=value(name)'
  elif ! answer="$(gcloud storage objects list "$1**" --limit=1 '--format=value(name)' 2>&1)"; then
    fail "$1 cannot be read: $(tail -n 1 <<<"$answer")"
  elif [[ -z "$answer" ]]; then
    fail "there is nothing at $1"
  fi
}
