#!/usr/bin/env bash
# Submit a job: produce, then an array of workers, then finalize. Print the three SLURM job ids.
#
#   pipeline.sh JOB OUT [sbatch options for the workers, such as --array=0-63]
#
# The queue is a Redis server that all nodes can reach, such as `chunkq redis --bind 0.0.0.0` on the
# login node. CHUNKQ_QUEUE_FILE is the file with its address. Edit the three .sbatch files first.
set -euo pipefail
[[ -n ${HOME:-} ]] || export HOME=~
job=${1:?usage: pipeline.sh JOB OUT [sbatch options]}
output=${2:?usage: pipeline.sh JOB OUT [sbatch options]}
folder=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

submit() {
  local id
  id=$(sbatch --parsable --kill-on-invalid-dep=yes "$@")
  echo "${id%%;*}"  # without the cluster's name
}

[[ -r $job ]] || { echo "$job: missing job file" >&2; exit 2; }
address=${CHUNKQ_QUEUE_FILE:-$HOME/.local/state/chunkq/redis/url}
[[ -n ${CHUNKQ_QUEUE:-} || -r $address ]] || {
  echo "queue: missing file $address; start chunkq redis, or set CHUNKQ_QUEUE_FILE" >&2
  exit 2
}

produce_id=$(submit "$folder/produce.sbatch" "$job" "$output")
workers_id=$(submit --dependency="afterok:$produce_id" "${@:3}" "$folder/array.sbatch" "$output")
# Also after failed workers: finalize lists the missing chunks.
after="afterok:$produce_id,afterany:$workers_id"
finalize_id=$(submit --dependency="$after" "$folder/finalize.sbatch" "$output")
echo "$produce_id $workers_id $finalize_id"
