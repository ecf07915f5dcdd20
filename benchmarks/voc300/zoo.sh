#!/bin/bash
# Trains a model of ppn_jax/zoo, as its card says; a call that was killed may be repeated.
#
#   benchmarks/voc300/zoo.sh ppn_voc WORKDIR   # about two hours on two CPU cores
#   benchmarks/voc300/zoo.sh ssd_voc WORKDIR   # about six minutes
#
# It is to be called in a clone, with `ppn` on the PATH. PPN_SHARED is the folder that has
# data/voc300 and weights/ (default: ../shared).
set -eu

model=$1 workdir=$2
shared=${PPN_SHARED:-../shared}
data=$shared/data/voc300
mkdir -p "$workdir"

# phase NAME SIZE STEPS [FLAG...]: trains in WORKDIR/NAME, and evaluates the last step.
phase() {
  local name=$1 size=$2 steps=$3
  shift 3
  ppn train --config=own_data:coco_json --workdir="$workdir/$name" \
    --config.data.train.images="$data/train" \
    --config.data.train.annotations="$data/instances_train.json" \
    --config.data.eval.images="$data/val" \
    --config.data.eval.annotations="$data/instances_val.json" \
    --config.data.cache.where=memory --config.data.transforms="(dict(name='expand',
      probability=0.3, ratio=(1.0, 2.0)), dict(name='ssd_random_crop'),
      dict(name='horizontal_flip'), dict(name='photometric_distortion'))" \
    --config.model.image_size="$size" --config.model.backbone.depth_multiplier=0.75 \
    --config.optim.freeze="('backbone/conv2d_[0-5]',)" --config.seed=1 \
    --config.train.batch_size=16 --config.train.steps="$steps" \
    --config.train.checkpoint_every=250 --config.train.evaluate_every="$steps" "$@"
}

case $model in
  ppn_voc)
    # The first model of this name, trained by run.py --profile=coco; see the card.
    git show 171c609:ppn_jax/zoo/ppn_voc.safetensors > "$workdir/first.safetensors"
    sgd=(--config.optim.optimizer="dict(name='sgd')" --config.optim.rate_batch_size=32
      --config.optim.rate_batch_exponent=1 --config.optim.weight_decay=2e-4
      --config.optim.ema_decay=0.999)
    five=(--config.model.neck.num_levels=5 --config.model.anchors.max_scale=0.79)
    phase 160 160 6000 "${sgd[@]}" "${five[@]}" --config.optim.learning_rate=0.1 \
      --config.init.weights="$workdir/first.safetensors"
    phase 224 224 4800 "${sgd[@]}" "${five[@]}" --config.optim.learning_rate=0.08 \
      --config.init.weights="$workdir/160"
    phase 300 300 2800 "${sgd[@]}" --config.optim.learning_rate=0.05 \
      --config.init.weights="$workdir/224" --config.model.neck.num_levels=6 \
      --config.model.anchors.max_scale=0.95 --config.postprocess.iou_threshold=0.5
    ;;
  ssd_voc)
    phase 300 300 500 --config.optim.learning_rate=2e-4 --config.optim.ema_decay=0.99 \
      --config.init.weights="$shared/weights/ssd_mobilenet_v1_0.75_coco_quant.tflite" \
      --config.init.class_names=aeroplane=airplane,motorbike=motorcycle,sofa=couch,tvmonitor=tv \
      --config.model.backbone.last_block=13 --config.model.neck="dict(name='conv_pyramid',
        strides=(16, 32), depths=(384, 192, 192, 96))" \
      --config.model.head="dict(name='per_level_box_predictor', side=1)" \
      --config.model.anchors.min_scale=0.2 --config.model.anchors.reduce_lowest_level=True \
      --config.postprocess.iou_threshold=0.5
    ;;
  *)
    echo "unknown model $model; legal: ppn_voc, ssd_voc" >&2
    exit 2
    ;;
esac
