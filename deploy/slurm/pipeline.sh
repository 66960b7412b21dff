#!/usr/bin/env bash
# Submits a whole job: produce, then an array of workers, then finalize. Prints the three job ids.
#
#   pipeline.sh JOB OUT [sbatch options for the workers, such as --array=0-63]
#
# The queue is a Redis that all nodes reach, such as `chunkq redis --bind 0.0.0.0` on the login
# node; CHUNKQ_QUEUE_FILE names the file with its address. Edit the three .sbatch files it submits.
set -euo pipefail
job=${1:?usage: pipeline.sh JOB OUT [sbatch options]}
output=${2:?usage: pipeline.sh JOB OUT [sbatch options]}
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

submit() {
  local id
  id=$(sbatch --parsable --kill-on-invalid-dep=yes "$@")
  echo "${id%%;*}"  # without the cluster's name
}

[[ -r $job ]] || { echo "$job: no such job file" >&2; exit 2; }
address=${CHUNKQ_QUEUE_FILE:-$HOME/.local/state/chunkq/redis/url}
[[ -n ${CHUNKQ_QUEUE:-} || -r $address ]] || {
  echo "no queue: $address is missing; see CHUNKQ_QUEUE_FILE" >&2
  exit 2
}

produced=$(submit "$here/produce.sbatch" "$job" "$output")
worked=$(submit --dependency="afterok:$produced" "${@:3}" "$here/array.sbatch" "$output")
# After workers that failed, too: it says what is missing.
finalized=$(submit --dependency="afterok:$produced,afterany:$worked" "$here/finalize.sbatch" "$output")
echo "$produced $worked $finalized"
