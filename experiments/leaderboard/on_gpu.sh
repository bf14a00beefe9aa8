#!/bin/bash
# The leaderboard on one GPU, in minutes: bash on_gpu.sh RESOURCES BASE FOLDER SUITE…
#
# Models and statistics of all suites are made at the same time, since a small encoder leaves a GPU idle; then every method
# is tried, chosen and tested. What is there is not made again. WORKERS processes work at once (12), each part stops after
# so many SECONDS (240), and the parts that are left go on with the same command.
set -u
resources=$1 base=$2 folder=$3
shift 3
here=$(dirname "$0") workers=${WORKERS:-12} seconds=${SECONDS_EACH:-240}
mkdir -p "$folder"
given=(--zoo "$folder/zoo" --device "${DEVICE:-cuda}")
templates() { grep -q decoder "$here/$1.yaml" && echo "decoder=$folder/decoder" || echo "base=$base"; }

for suite in "$@"; do
    [ "$suite" = decoder ] && python3 "$here/pretrain_decoder.py" "$resources" "$folder/decoder"
    timeout "$seconds" python3 -m merganser experiment "$here/$suite.yaml" "$here/prepare.yaml" "${given[@]}" \
        --templates "resources=$resources" "$(templates "$suite")" --results "$folder/prepare" \
        --workers $(((workers + $# - 1) / $#)) > "$folder/prepare-$suite.log" 2>&1 &
done
wait
files=("${@/#/$here/}")
timeout "$seconds" python3 -m merganser benchmark "${files[@]/%/.yaml}" --methods "$here/methods.yaml" "${given[@]}" \
    --templates "resources=$resources" "base=$base" --results "$folder/leaderboard" --workers "$workers"
