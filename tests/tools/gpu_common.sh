# What the scripts for a GPU share. The caller sets BUDGET, in seconds, and FOLDER, the name of what comes back.
#
# $RESULTS is a folder of that name; its archive in $OUT (or out/gpu) is written anew after every step.
set -u
[ -f runtime/cuda.py ] || { echo "run me from the repository root"; exit 2; }
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 PYTHONPATH="$PWD" MPLBACKEND=Agg TQDM_DISABLE=1
DRY=${DRY:-}; DEVICE=cuda; [ -n "$DRY" ] && DEVICE=cpu
BACK=$(realpath -m "${OUT:-out/gpu}"); mkdir -p "$BACK" && WORK=$(mktemp -d) || exit 2
trap 'rm -rf "$WORK"' EXIT
export RESULTS="$WORK/$FOLDER"; mkdir "$RESULTS" || exit 2
T0=$(date +%s); PY=${PY:-python3}; LOG="$BACK/log.txt"; SUMMARY="$BACK/summary.txt"; LEFT_OUT=
{ : >"$LOG" && : >"$SUMMARY"; } || exit 2
left() { echo $((BUDGET - $(date +%s) + T0)); }

step() {  # step NAME LIMIT NEEDS command...: at most LIMIT seconds, left out if fewer than NEEDS are left
    local name=$1 limit=$2 needs=$3; shift 3
    local rest; rest=$(left)
    if [ "$rest" -lt "$needs" ]; then LEFT_OUT="$LEFT_OUT $name"; return; fi
    [ "$limit" -gt "$rest" ] && limit=$rest
    local start; start=$(date +%s)
    echo "=== $name (at most $limit s)" | tee -a "$LOG"
    local at; at=$(wc -c <"$LOG")
    timeout -k 5 "$limit" "$@" >>"$LOG" 2>&1; local rc=$?  # at once, so that a killed run loses nothing
    tail -c "+$((at + 1))" "$LOG" | grep -v -i "warn" | tail -n "${TAIL:-12}" | cut -c1-400
    local said="rc $rc"; [ $rc -eq 124 ] && said="OUT OF TIME"
    echo "$name: $said, $(($(date +%s) - start)) s" | tee -a "$SUMMARY"
    tar -czf "$BACK/.results" -C "$WORK" "${RESULTS##*/}" && mv "$BACK/.results" "$BACK/results.tar.gz"
}
into() { bash -c 'set -o pipefail; file=$1; shift; "$@" | tee "$file"' into "$@"; }  # into FILE command...
export -f into

the_end() {
    [ -n "$LEFT_OUT" ] && echo "left out for lack of time:$LEFT_OUT" >>"$SUMMARY"
    echo; cat "$SUMMARY"; ls -la "$BACK"; echo "total $(($(date +%s) - T0)) s of $BUDGET"
}
