#!/bin/sh
# One night of bahe for cron: nightly.sh DATASET.YAML [options of `bahe daily`]
#
# Needs BAHE_HOME; BAHE says how bahe is called (default: bahe). Two nights never meet: the home has a lock of
# its own, so no flock here. What is written to standard error is what cron mails: nothing when all is well.
set -u
: "${BAHE_HOME:?set it to the home folder, as in the crontab beside this script}"
dataset=${1:?usage: nightly.sh DATASET.YAML [options of bahe daily]}
shift

date=$(date -u +%F)
mkdir -p "$BAHE_HOME/logs"
log=$BAHE_HOME/logs/$date.jsonl

tries=0
while :; do
    # shellcheck disable=SC2086 # BAHE may be several words
    ${BAHE:-bahe} --log-format json daily "$dataset" --date "$date" --wait 3600 "$@" >/dev/null 2>>"$log"
    code=$?
    tries=$((tries + 1))
    case $code in
    0) exit 0 ;;
    2) break ;; # bad input, a failed gate or a busy home: trying again would not help
    esac
    [ $tries -lt 3 ] || break # killed or a defect: the next try goes on with the step that was not finished
done

echo "bahe daily $date ended with $code after $tries tries; $log ends with:" >&2
tail -n 3 "$log" >&2
exit $code
