#!/bin/bash
# The leaderboard on one GPU, in minutes: bash on_gpu.sh RESOURCES BASE FOLDER SUITE…
#
# Models and statistics of all suites are made at the same time, since a small encoder leaves a GPU idle; then every method
# is tried, chosen and tested, and last come the multi-task models of the suites in MULTITASK. What is there is not made
# again. WORKERS processes work at once (12), each part stops after so many SECONDS_EACH (240), and the same command goes
# on with what is left.
set -u
resources=$1 base=$2 folder=$3
shift 3
here=$(dirname "$0") workers=${WORKERS:-12} seconds=${SECONDS_EACH:-240}
given=(--zoo "$folder/zoo" --device "${DEVICE:-cuda}")
mkdir -p "$folder"

experiment() { # SUITE PART WORKERS RESULTS
    local start="base=$base"
    [ "$1" = decoder ] && start="decoder=$folder/decoder"
    timeout "$seconds" python3 -m merganser experiment "$here/$1.yaml" "$here/$2.yaml" "${given[@]}" \
        --templates "resources=$resources" "$start" --results "$folder/$4" --workers "$3" > "$folder/$2-$1.log" 2>&1
}

case " $* " in *" decoder "*) python3 "$here/pretrain_decoder.py" "$resources" "$folder/decoder" ;; esac
for suite in "$@"; do
    experiment "$suite" prepare $(((workers + $# - 1) / $#)) prepare &
done
wait
suites=("${@/#/$here/}") starts=()
case " $* " in *" decoder "*) starts+=("decoder=$folder/decoder") ;; esac
[ "$*" = decoder ] || starts+=("base=$base")
timeout "$seconds" python3 -m merganser benchmark "${suites[@]/%/.yaml}" --methods "$here/methods.yaml" "${given[@]}" \
    --templates "resources=$resources" "${starts[@]}" --results "$folder/leaderboard" --workers "$workers"
for suite in ${MULTITASK:-}; do
    experiment "$suite" multitask 3 leaderboard/test &
done
wait
