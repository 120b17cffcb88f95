#!/usr/bin/env bash
# Does what holds at 2.8 M parameters hold at ten times the size? On a GPU, in one call of less than ten minutes:
#
#   bash tests/tools/gpu_second.sh          from the repository root; writes to $OUT (or out/gpu)
#   DRY=1 bash tests/tools/gpu_second.sh    without a GPU: the same lines for a few seconds, no numbers
#
# It trains a model of 28 M parameters on the embedded model's tasks, judges it, and measures Table 1 by KL on it: for
# one seed, then for two, then for three, as far as time goes. Processes share the GPU, which such a model leaves idle.
#
# Three files come back: log.txt, summary.txt and results.tar.gz. The archive holds the folder tiny-28m with the tables,
# the values of every example (cells.jsonl), the judgement, and the recipe (training.json, config.json), but no weights:
#
#   tar -xzf $OUT/results.tar.gz -C results
BUDGET=${BUDGET:-560} FOLDER=tiny-28m MODEL=out/tiny-28m
[ -w /dev/shm ] && export TMPDIR=${TMPDIR:-/dev/shm}  # a training writes 340 MB every 200 steps
. tests/tools/gpu_common.sh || exit 2
mkdir -p out "$WORK/model"; [ -L $MODEL ] && rm $MODEL  # what a killed run left
ln -sT "$WORK/model" $MODEL || exit 2; trap 'rm -rf "$WORK" $MODEL' EXIT
if [ -n "$DRY" ]; then
    TRAIN="--width 64 --layers 1 --steps 2 --tokens 96"; JUDGE="--problems 2"; TABLE="--quick --sequences 2"; SEEDS=1; N=2
else
    TRAIN="--width 512 --layers 8 --minutes 4.5 --steps 1000000 --tokens 6144 --lr 0.001"
    JUDGE="--problems 100"; TABLE="--nelbo"; SEEDS="1 2 3"; N=12
fi

# TF32 in the training alone
TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 step train 330 200 $PY -m tiny.train --device $DEVICE --out $MODEL $TRAIN
cp $MODEL/training.json $MODEL/config.json "$RESULTS"
step judge 60 30 $PY evaluate.py --model $MODEL --device $DEVICE --out "$RESULTS/judge.json" $JUDGE
export GLOO_SOCKET_IFNAME=lo  # no other machine takes part
for seeds in $SEEDS; do
    TAIL=20 step "table-1-of-$seeds" 200 70 $PY -m torch.distributed.run --standalone --nproc-per-node $N \
        evaluate.py --table 1 --model $MODEL --device $DEVICE --out "$RESULTS" --seeds $seeds $TABLE
done
the_end
