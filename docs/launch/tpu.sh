#!/bin/bash
# One run over all hosts of a Cloud TPU slice, which goes on by itself after a lost host or process.
#
#     POD=my-pod ZONE=us-east5-a docs/launch/tpu.sh gpt large --mesh fsdp=64 --precision bf16
#
# The experiment, the run's name, and the experiment's own words. On every host FOLDER (default: jaxarch) holds the code,
# PYTHON runs it, and RUNS is one folder for all, as a mounted bucket or Filestore. To be started where it can stay, as
# in tmux on a small machine of the same zone; begun again later, it goes on with the run.

set -u
experiment=$1 name=$2
shift 2
: "${POD:?the name of the TPU slice}" "${ZONE:?its zone}" "${RUNS:?a folder that all hosts share}"
most=${RESTARTS:-20} pause=${PAUSE:-90}

# Every host decides for itself: the run's folder is written only when all have met, so all see the same.
words=
[ $# -gt 0 ] && printf -v words ' %q' "$@"
printf -v command 'cd %q && if [ -e %q ]; then resume=--resume; else resume=; fi; exec %q -m %q%s --distributed --name %q --runs %q $resume' \
    "${FOLDER:-jaxarch}" "$RUNS/$experiment/$name/config.json" "${PYTHON:-python3}" "experiments.$experiment" \
    "$words" "$name" "$RUNS"

for ((start = 0; start <= most; start++)); do
    gcloud compute tpus tpu-vm ssh "$POD" --zone "$ZONE" --worker=all --command "$command"
    code=$?
    [ $code -eq 0 ] && echo "$name is finished" && exit 0
    [ $code -eq 2 ] && echo "$name: the command is wrong (exit code 2), it is not started again" >&2 && exit 2
    echo "$name ended with $code; new start in $pause seconds, $((start + 1)) of at most $most" >&2
    # The hosts that are left notice a dead one, end, and give their chips back.
    sleep "$pause"
done
exit $code
