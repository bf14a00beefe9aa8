#!/bin/bash
# The leaderboard and the paper's claims on one GPU, in minutes: bash on_gpu.sh RESOURCES BASE FOLDER SUITE:WORKERS…
#
# Models and statistics of all suites are made at the same time, by so many processes each, since small encoders leave a GPU
# idle; then every method but auto is tried, chosen and tested by WORKERS processes (16), and last come the claims. Add
# auto's lines (merganser benchmark … --only auto) when its table follows from the development data. Preparing, and each
# claim, ends after LIMIT seconds (300); what is missing then is made when a merge needs it, and the same command goes on
# with what is left. CLAIMS names configurations of ../claims, each with the suite that it comes after: "alpha:ner".
set -u
resources=$1 base=$2 folder=$3
shift 3
export OMP_NUM_THREADS=1  # each suite's processes would take all cores, and all of them together many times those
here=$(dirname "$0") workers=${WORKERS:-16}
given=(--zoo "$folder/zoo" --device "${DEVICE:-cuda}")
mkdir -p "$folder/log"

start_of() { if [ "$1" = decoder ]; then echo "decoder=$folder/decoder"; else echo "base=$base"; fi; }

experiment() { # NAME WORKERS RESULTS SUITE FILE [OPTION… TEMPLATE…]
    timeout "${LIMIT:-300}" python3 -m merganser experiment "$here/$4.yaml" "$here/$5.yaml" "${given[@]}" \
        --results "$folder/$3" --workers "$2" --templates "resources=$resources" "$(start_of "$4")" "${@:6}" > "$folder/log/$1" 2>&1
}

suites=() starts=()
for one in "$@"; do
    suite=${one%:*}
    suites+=("$here/$suite.yaml") starts+=("$(start_of "$suite")")
    [ "$suite" = decoder ] && [ ! -e "$folder/decoder" ] &&
        python3 "$here/pretrain_decoder.py" "$resources" "$folder/decoder"
    experiment "prepare-$suite" "${one#*:}" prepare "$suite" prepare --prepare &
done
wait
touch "$folder/prepared"
mapfile -t starts < <(printf '%s\n' "${starts[@]}" | sort -u)
mapfile -t methods < <(sed -n 's/^  - \(method: \)\?\([a-z_]*\)$/\2/p' "$here/methods.yaml" | sort -u)
python3 -m merganser benchmark "${suites[@]}" --methods "$here/methods.yaml" --only "${methods[@]}" "${given[@]}" \
    --templates "resources=$resources" "${starts[@]}" --results "$folder/leaderboard" --workers "$workers"
touch "$folder/tested"
for claim in ${CLAIMS:-}; do
    suite=${claim#*:} claim=${claim%:*} more=()
    case $claim in *-heads) ;; *) more+=("suite=$suite") ;; esac
    case $claim in examples-*) more+=("examples=${claim#*-}") ;; esac
    experiment "$claim-$suite" "${CLAIM_WORKERS:-2}" claims "$suite" "../claims/${claim%-[0-9]*}" "${more[@]}" &
done
wait
touch "$folder/claimed"
