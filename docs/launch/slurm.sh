#!/bin/bash
# One run over the GPUs of several nodes, which goes on by itself after a dead node, a dead process or the time limit.
#
#     sbatch docs/launch/slurm.sh gpt large --mesh data=2,fsdp=8 --precision bf16
#     sbatch --nodes=8 --export=ALL,RUNS=/shared/runs docs/launch/slurm.sh gpt larger llama --mesh data=8,fsdp=8
#
# The experiment, the run's name, and the experiment's own words. RUNS (default: runs) must be one folder for all nodes.
#SBATCH --job-name=jaxarch
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
# A process a GPU: where Slurm starts the processes, JAX gives each the one GPU that has its number on the node.
#SBATCH --ntasks-per-node=8
#SBATCH --time=24:00:00
# Slurm starts the job again when a node fails or it is preempted, with the same output file.
#SBATCH --requeue
#SBATCH --open-mode=append
# Five minutes before the limit the processes (not this shell) get SIGTERM: they end the step, save, and exit 143.
#SBATCH --signal=TERM@300

set -u
experiment=$1 name=$2
shift 2
runs=${RUNS:-runs}
count=${SLURM_RESTART_COUNT:-0} most=${RESTARTS:-20}

# The run has begun when it has this file. Decided once, here, so that all processes agree.
resume=()
[ -e "$runs/$experiment/$name/config.json" ] && resume=(--resume)

# When one process dies the others notice and end by themselves; what still hangs two minutes later is ended.
srun --kill-on-bad-exit=0 --wait=120 \
    "${PYTHON:-python}" -m "experiments.$experiment" "$@" --distributed --name "$name" --runs "$runs" "${resume[@]}"
code=$?

case $code in
0) echo "$name is finished" ;;
2) echo "$name: the command is wrong (exit code 2), it is not started again" >&2 ;;
*)
    if [ "$count" -lt "$most" ]; then
        echo "$name ended with $code; it goes on, start $((count + 1)) of at most $most" >&2
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "$name ended with $code after $count new starts; go on with the same sbatch" >&2
    fi
    ;;
esac
exit $code
