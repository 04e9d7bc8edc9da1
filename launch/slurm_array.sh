#!/bin/bash
# One task of a job array: runs its line of a manifest, and has Slurm start it again unless the cell itself failed.
#
# `python -m launch.slurm` submits it so, and prints the whole line with --dry_run:
#   sbatch --array=0-N --requeue --open-mode=append --signal=B:USR1@60 ... slurm_array.sh WORKDIR/slurm
#
# WORKDIR/slurm/manifest.txt holds the command line of each task. A cell ends with 0: done; 75: stopped after a
# checkpoint, the same command goes on; 76: another process of a run over several was lost; 128 and more: killed. All
# others are failures, and stay. A cell that stopped after further steps is always started again. One that was killed,
# or stopped where it began, is started again five times: these are counted in WORKDIR/slurm/restarts-INDEX.

set -u
limit=5
folder=$1
index=$SLURM_ARRAY_TASK_ID
job=${SLURM_ARRAY_JOB_ID}_$index # the number alone would mean the whole array, for the array's last task

say() { echo "slurm: job $job: $*"; }

line=$(sed -n "$((index + 1))p" "$folder/manifest.txt")
if [ -z "$line" ]; then
    say "$folder/manifest.txt has no line $((index + 1)): start the launcher again"
    exit 1
fi
words=()
eval "words=($line)" # it is quoted for a shell
name=${words[-1]#--only_cell=} # always the last word
checkpoints() { ls "$folder/../runs/$name/checkpoints" 2>/dev/null; }

# USR1 comes some time before the limit, TERM when the job is cancelled or preempted. `wait` returns early for a signal.
pid='' signalled=''
trap 'signalled=yes; [ -z "$pid" ] || kill -TERM "$pid" 2>/dev/null' USR1 TERM
before=$(checkpoints)
say "$name starts on ${SLURMD_NODENAME:-$HOSTNAME}, $(date '+%F %T')"
"${words[@]}" &
pid=$!
[ -z "$signalled" ] || kill -TERM "$pid"
signalled=yes
while [ -n "$signalled" ]; do
    signalled=''
    wait "$pid"
    status=$?
done

if [ "$status" = 75 ] && [ "$(checkpoints)" != "$before" ]; then
    counted=''
elif [ "$status" = 75 ] || [ "$status" = 76 ] || [ "$status" -ge 128 ]; then
    counted=yes
else
    exit "$status"
fi

# A job that is being cancelled could be requeued too, but must not be, and Slurm itself starts again those that are
# preempted or whose node is lost. All of these are COMPLETING here, as are those that went over their time.
for _ in 1 2 3 4 5; do
    state=$(squeue --noheader --jobs="$job" --format='%T %r')
    [ -z "$state" ] || break
    sleep 2
done
case $state in
'COMPLETING TimeLimit') ;;
'' | COMPLETING* | PENDING* | CANCELLED*)
    say "$name ended with $status; Slurm's state is '$state'"
    exit "$status"
    ;;
esac

if [ -n "$counted" ]; then
    echo "$status $(date '+%F %T')" >>"$folder/restarts-$index"
    if [ "$(wc -l <"$folder/restarts-$index")" -gt "$limit" ]; then
        say "$name ended with $status and was started again $limit times before: it is left alone"
        exit "$status"
    fi
fi
say "$name ended with $status: it is started again"
scontrol requeue "$job"
exit "$status"
