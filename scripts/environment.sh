# Sourced by the scripts beside it: CANN's environment, and the recipe. It changes into the project's folder.
#
# Set any of these before the call, such as `VERSION=2.1 DEVICE_ID=3 bash scripts/train_lora_1p.sh`:
#
#   VERSION           model and recipe: 1.5 (pokemon), 2.0 or 2.1 (Chinese art), nano (emoji, comes with the project)
#   DATA_PATH         folder with the images and img_txt.csv, instead of the recipe's
#   CHECKPOINT        base model, instead of the version's
#   TRAIN_CONFIG      YAML file with the settings, instead of the recipe's
#   OUTPUT_PATH       folder for checkpoints, logs and the cache
#   DEVICE_TARGET     Ascend, or CPU to try a script out. A missing device is an error, not a slow run
#   DEVICE_ID         number of the card that a single process takes; msrun gives each of its processes one
#   ASCEND_RT_VISIBLE_DEVICES   CANN: the cards that may be used, such as 4,5,6,7; DEVICE_ID counts among them
#   CANN_ENVIRONMENT  script that sets CANN's variables, sourced unless ASCEND_HOME_PATH is set
#
# Further arguments of a script are settings of training or generation, which win: `... --precision fp32 --epochs 10`.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

CANN_ENVIRONMENT=${CANN_ENVIRONMENT:-/usr/local/Ascend/ascend-toolkit/set_env.sh}
if [ -z "${ASCEND_HOME_PATH:-}" ] && [ -f "$CANN_ENVIRONMENT" ]; then
    . "$CANN_ENVIRONMENT"
fi

set -eu

# CANN: an overflow in fp16 gives infinity, which loss scaling looks for. Training sets it too; it is here to be seen.
export MS_ASCEND_CHECK_OVERFLOW_MODE=${MS_ASCEND_CHECK_OVERFLOW_MODE:-INFNAN_MODE}
# HCCL: seconds for which a process waits until the other cards answer when it connects with them. All processes report
# before the first connection, but then each loads its operators and compiles its graphs, and one may take minutes
# longer than another. Images are encoded without an exchange between cards. CANN's default is 120.
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1800}
# Log levels: errors only, of CANN and of MindSpore. 1 shows what the compiler does, for a report of an error.
export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3}
export GLOG_v=${GLOG_v:-3}

VERSION=${VERSION:-1.5}
case $VERSION in
1.5)
    recipe=configs/train/train_config_lora_v1.yaml
    data=datasets/pokemon_blip/train
    base=models/sd_v1.5-d0ab7146.ckpt
    ;;
2.0)
    recipe=configs/train/train_config_lora_v2.yaml
    data=datasets/chinese_art_blip/train
    base=models/sd_v2_base-57526ee4.ckpt
    ;;
2.1)
    recipe=configs/train/train_config_lora_v2.yaml
    data=datasets/chinese_art_blip/train
    base=models/sd_v2-1_base-7c8d09ce.ckpt
    ;;
nano)
    recipe=configs/train/train_config_lora_nano.yaml
    data=datasets/emoji_fluent_hc/train
    base=models/nano/nano.safetensors
    ;;
*)
    echo "error: VERSION $VERSION is unknown: 1.5, 2.0, 2.1 or nano" >&2
    exit 2
    ;;
esac
DEVICE_TARGET=${DEVICE_TARGET:-Ascend}
CHECKPOINT=${CHECKPOINT:-$base}
OUTPUT_PATH=${OUTPUT_PATH:-output/lora_$VERSION}
TRAINING=(
    --train_config "${TRAIN_CONFIG:-$recipe}"
    --data_path "${DATA_PATH:-$data}"
    --pretrained_model_path "$CHECKPOINT"
    --output_path "$OUTPUT_PATH"
    --device_target "$DEVICE_TARGET"
)
