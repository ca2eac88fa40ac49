#!/usr/bin/env bash
# A federation as one Slurm job: a Ray cluster for as long as the job lasts, one site a node.
#   sbatch docs/deploy/slurm.sh my_federation.yaml           (a copy of docs/deploy/federation.yaml)
#   sbatch docs/deploy/slurm.sh --resume /runs/hospitals     (its output.folder)
# The configuration needs resources.placement: label and address: auto. Site by site the names in SITES go to the nodes
# in the order of "scontrol show hostnames"; where data lie on certain nodes, ask for them with --nodelist.
#SBATCH --job-name=gcml
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --output=gcml-%j.log
set -euo pipefail

SITES=${SITES:-CS DU HT}
PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))} # jobs that share a node must not meet
read -ra sites <<<"$SITES"
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if ((${#sites[@]} != ${#nodes[@]})); then
  echo "error: ${#sites[@]} sites ($SITES), but ${#nodes[@]} nodes; give --nodes or SITES" >&2
  exit 2
fi

# A token of this job alone; srun hands the environment on.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
export RAY_free_objects_period_milliseconds=20 # models that nobody needs leave memory at once
head_ip=$(hostname --ip-address)
head_ip=${head_ip%% *}
export RAY_ADDRESS=$head_ip:$PORT

started=()
start_node() { # NODE SITE, then what "ray start" needs beside
  local node=$1 site=$2
  shift 2
  env -u RAY_ADDRESS srun --nodes=1 --ntasks=1 --nodelist="$node" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    ray start "$@" --num-cpus="$SLURM_CPUS_PER_TASK" --labels="site=$site" --disable-usage-stats --block &
  started+=($!)
}
trap 'kill "${started[@]}" 2>/dev/null || true' EXIT

# This script runs on the first node, which is the head and holds the first site.
start_node "${nodes[0]}" "${sites[0]}" --head --node-ip-address="$head_ip" --port="$PORT" --include-dashboard=false
for ((i = 1; i < ${#nodes[@]}; i++)); do
  start_node "${nodes[i]}" "${sites[i]}" --address="$RAY_ADDRESS"
done

# Wait for all nodes; a worker that is early tries again by itself.
count='import ray; ray.init(logging_level="ERROR"); print(sum(node["Alive"] for node in ray.nodes()))'
for ((attempt = 1; ; attempt++)); do
  present=$(python -c "$count" 2>/dev/null || echo 0)
  ((present == ${#nodes[@]})) && break
  if ((attempt == ${ATTEMPTS:-60})); then
    echo "error: $present of ${#nodes[@]} nodes have joined; see the lines of ray start above" >&2
    exit 1
  fi
  sleep 5
done

# Ten minutes before the job's time is over Slurm sends TERM: the run ends after its round, to be resumed.
gcml run "$@" &
driver=$!
is_over=false
trap 'is_over=true; kill -INT "$driver" 2>/dev/null || true' TERM
status=0
wait "$driver" || status=$?
if [[ $is_over == true ]]; then # TERM ended the wait, not the run
  status=0
  wait "$driver" || status=$?
fi
exit "$status"
