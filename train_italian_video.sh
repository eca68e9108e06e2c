#!/bin/bash
#SBATCH --job-name=italian_video
#SBATCH --output=logs/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=48G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#
# Trains one phase of the Italian video pipeline, under Slurm or as a plain shell script:
#
#   mkdir -p logs && EXP_ID=1 sbatch train_italian_video.sh
#   EXP_ID=2 DATA_PATH=captions.json VIDEO_FOLDER=clips ./train_italian_video.sh --num_train_epochs 10
#
# It goes on from the last complete checkpoint in OUTPUT_DIR, if there is one and it is of this very run: another
# learning rate, model or data file needs another OUTPUT_DIR (docs/running.md). On SIGUSR1, which Slurm sends two
# minutes before the time is up, it saves a checkpoint and requeues its job (docs/running.md). With sbatch --nodes=N it
# trains on all of them (docs/slurm.md).
#
# Models at milestones of words, and their scores on Italian minimal pairs, are left in OUTPUT_DIR (docs/recipes.md).
#
# Arguments go on to the trainer and override the recipe. Settings come from the environment:
#
#   EXP_ID        1 is _t_it, captions alone; 2 (default) is _vi_it, videos and captions
#   MODEL_PATH    folder of the language model (default for 1: output/gpt2_it; for 2: what 1 left)
#   VISION_MODEL  folder or hub name of the vision model, for 2 (default facebook/dinov2-large)
#   DATA_PATH     data file (default data/webvid/webvid_t_it.json or webvid_vi_it.json)
#   VIDEO_FOLDER  what the data file's video paths start from (default: the data file's folder;
#                 for the default data file, data/webvid/videos)
#   OUTPUT_DIR    where checkpoints go (default output/italian_t_it or output/italian_vi_it)
#   OVERWRITE     1 starts anew in an OUTPUT_DIR that holds a run, which is removed (default 0); a job that was
#                 requeued goes on with what it has begun
#   FEATURE_CACHE folder of the frozen tower's features, for 2: the first epoch fills it, later ones read it
#                 (default: none; docs/feature_cache.md)
#   INSPECT       1 (default) looks at data, batches and model first, for a minute on the CPU, and trains nothing if the
#                 run would be ruined (docs/inspect.md); 0 does not look
#   NUM_GPUS      how many GPUs to use, of each node (default: all that are visible; 0 trains on the CPU)
#   PYTHON        python to run (default: the active environment's, else .venv's, else python3)
#   EXTRA_ARGS    more arguments for the trainer, split at blanks
#
# The trainer reads the variables of older scripts too, MM_PERCEIVER_LATENTS, MM_PERCEIVER_LATENTS_FAST, BABYLM_ENABLED,
# BABYLM_WORD_LIMIT, USE_PLAIN_LM and WANDB_PROJECT: they override the recipe, and arguments override them. Its log says
# what became of each (docs/flags.md).

set -euo pipefail

# Slurm runs a copy of this file from its spool: there the submitting folder is the project.
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
if [[ ! -f $ROOT/llava/train/train.py && -n ${SLURM_SUBMIT_DIR:-} ]]; then
    ROOT=$SLURM_SUBMIT_DIR
fi
if [[ ! -f $ROOT/llava/train/train.py ]]; then
    echo "error: $ROOT is not the project's folder (no llava/train/train.py); submit from there" >&2
    exit 2
fi
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

EXP_ID=${EXP_ID:-2}
VISION_MODEL=${VISION_MODEL:-facebook/dinov2-large}
case $EXP_ID in
    1)
        phase=t_it
        recipe=italian_text.yaml
        MODEL_PATH=${MODEL_PATH:-$ROOT/output/gpt2_it}
        ;;
    2)
        phase=vi_it
        recipe=italian_video.yaml
        MODEL_PATH=${MODEL_PATH:-$ROOT/output/italian_t_it}
        if [[ -z ${DATA_PATH:-} ]]; then
            VIDEO_FOLDER=${VIDEO_FOLDER:-$ROOT/data/webvid/videos}
        fi
        ;;
    *)
        echo "error: EXP_ID is '$EXP_ID', expected 1 (text alone) or 2 (videos and text)" >&2
        exit 2
        ;;
esac
DATA_PATH=${DATA_PATH:-$ROOT/data/webvid/webvid_$phase.json}
VIDEO_FOLDER=${VIDEO_FOLDER:-}
OUTPUT_DIR=${OUTPUT_DIR:-$ROOT/output/italian_$phase}
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    if [[ -n ${VIRTUAL_ENV:-} ]]; then
        PYTHON=$VIRTUAL_ENV/bin/python
    elif [[ -x $ROOT/.venv/bin/python ]]; then
        PYTHON=$ROOT/.venv/bin/python
    fi
fi

problems=0
problem() {
    echo "error: $1" >&2
    problems=$((problems + 1))
}

# --- the hardware -----------------------------------------------------------------------------------

# Prints: the number of GPUs, the precision for them, and whether DeepSpeed is there.
probe() {
    "$PYTHON" - <<'END'
from importlib.util import find_spec

import torch
import transformers  # noqa: F401  (only whether it is installed)

found = torch.cuda.device_count() if torch.cuda.is_available() else 0
native = found and torch.cuda.is_bf16_supported(including_emulation=False)
print(found, "bf16" if native else "fp16" if found else "fp32", int(all(map(find_spec, ("deepspeed", "ninja")))))
END
}

gpus_found=0
precision=fp32
has_deepspeed=0
if hardware=$(probe 2>/dev/null); then
    read -r gpus_found precision has_deepspeed <<<"${hardware##*$'\n'}"
else
    problem "PYTHON=$PYTHON: cannot import torch and transformers; install with 'make install', or set PYTHON to a Python that has them"
fi
OVERWRITE=${OVERWRITE:-0}
if [[ ! $OVERWRITE =~ ^[01]$ ]]; then
    problem "OVERWRITE is '$OVERWRITE', expected 1 (start anew) or 0 (go on)"
fi
INSPECT=${INSPECT:-1}
if [[ ! $INSPECT =~ ^[01]$ ]]; then
    problem "INSPECT is '$INSPECT', expected 1 (look at the run first) or 0 (do not)"
fi
NUM_GPUS=${NUM_GPUS:-$gpus_found}
if [[ ! $NUM_GPUS =~ ^[0-9]+$ ]]; then
    problem "NUM_GPUS is '$NUM_GPUS', expected a number"
    NUM_GPUS=0
elif ((NUM_GPUS > gpus_found)); then
    problem "NUM_GPUS is $NUM_GPUS, but $gpus_found can be seen; lower it, or ask Slurm for more with --gres=gpu:$NUM_GPUS"
fi

# --- the paths --------------------------------------------------------------------------------------

if [[ ! -d $MODEL_PATH ]]; then
    problem "MODEL_PATH=$MODEL_PATH: no such folder; expected a language model (docs/recipes.md says how to make one)"
elif [[ ! -f $MODEL_PATH/config.json ]]; then
    problem "MODEL_PATH=$MODEL_PATH: has no config.json; expected the folder of a language model"
elif [[ $MODEL_PATH -ef $OUTPUT_DIR ]]; then
    problem "OUTPUT_DIR=$OUTPUT_DIR: is MODEL_PATH too, which would be overwritten; set another"
fi

has_data=1
if [[ ! -f $DATA_PATH ]]; then
    has_data=0
    problem "DATA_PATH=$DATA_PATH: no such file; expected a .json or .jsonl data file"
elif [[ ! -r $DATA_PATH ]]; then
    problem "DATA_PATH=$DATA_PATH: cannot be read; check its permissions"
fi

if ((EXP_ID == 2)); then
    if [[ -n $VIDEO_FOLDER && ! -d $VIDEO_FOLDER ]]; then
        problem "VIDEO_FOLDER=$VIDEO_FOLDER: no such folder; expected what the data file's video paths start from"
    fi
    if [[ -d $VISION_MODEL ]]; then
        if [[ ! -f $VISION_MODEL/config.json ]]; then
            problem "VISION_MODEL=$VISION_MODEL: has no config.json; expected the folder of a vision model"
        fi
    elif [[ $VISION_MODEL =~ ^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$ ]]; then
        echo "note: VISION_MODEL=$VISION_MODEL is no folder here; it will be downloaded from the Hugging Face hub, unless it is cached" >&2
    else
        problem "VISION_MODEL=$VISION_MODEL: no such folder; expected one, or a hub name such as facebook/dinov2-large"
    fi
fi

# The nearest folder that exists must be one that folders can be made in.
parent=$OUTPUT_DIR
while [[ ! -e $parent ]]; do
    parent=$(dirname -- "$parent")
done
if [[ ! -d $parent ]]; then
    problem "OUTPUT_DIR=$OUTPUT_DIR: $parent is a file; set another folder"
elif [[ ! -w $parent ]]; then
    problem "OUTPUT_DIR=$OUTPUT_DIR: $parent cannot be written to; set another folder"
fi

if ((gpus_found == 0 && has_data == 0)); then
    echo "error: no GPU and no data here; 'make demo' shows the whole pipeline on any machine, in minutes" >&2
fi
if ((problems > 0)); then
    exit 2
fi

# --- the command ------------------------------------------------------------------------------------

trainer=(
    --config "$recipe"
    --model_name_or_path "$MODEL_PATH"
    --data_path "$DATA_PATH"
    --output_dir "$OUTPUT_DIR"
)
if [[ $OVERWRITE == 1 && ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
    trainer+=(--overwrite_output_dir true)
else
    trainer+=(--resume_from_checkpoint auto)
fi
if ((EXP_ID == 2)); then
    trainer+=(--vision_tower "$VISION_MODEL")
    if [[ -n $VIDEO_FOLDER ]]; then
        trainer+=(--video_folder "$VIDEO_FOLDER")
    fi
    if [[ -n ${FEATURE_CACHE:-} ]]; then
        trainer+=(--feature_cache "$FEATURE_CACHE" --feature_cache_fill true)
    fi
fi

launcher=("$PYTHON")
num_nodes=${SLURM_JOB_NUM_NODES:-1}
if ((num_nodes > 1)); then
    # A launcher on each node, with a process for each GPU.
    launcher+=(-m llava.train.slurm --no_requeue --nproc_per_node "$((NUM_GPUS > 0 ? NUM_GPUS : 1))")
fi
if ((NUM_GPUS == 0)); then
    precision=fp32
    trainer+=(--use_cpu true)
    if ((gpus_found == 0)); then
        echo "note: no GPU found; training on the CPU, which the full recipe is too much for" >&2
    else
        echo "note: NUM_GPUS is 0; training on the CPU" >&2
    fi
elif ((NUM_GPUS == 1 && num_nodes == 1)); then
    # One process drives one GPU, whatever else is visible.
    visible=${CUDA_VISIBLE_DEVICES:-0}
    export CUDA_VISIBLE_DEVICES=${visible%%,*}
else
    if ((num_nodes == 1)); then
        launcher+=(-m llava.train.launch --standalone --nproc_per_node "$NUM_GPUS")
    fi
    if ((has_deepspeed)); then
        trainer+=(--deepspeed "$ROOT/llava/train/deepspeed/zero2.json")
    else
        echo "note: deepspeed and ninja are not installed; $((NUM_GPUS * num_nodes)) GPUs train with plain DDP" >&2
    fi
fi
if [[ $precision != fp32 ]]; then
    trainer+=("--$precision" true)
fi

EXTRA_ARGS=${EXTRA_ARGS:-}
read -r -a extra <<<"${EXTRA_ARGS//$'\n'/ }"
trainer+=(${extra[@]+"${extra[@]}"} "$@")
command=("${launcher[@]}" -m llava.train.train "${trainer[@]}")

mkdir -p "$ROOT/logs"
on_nodes=
((num_nodes == 1)) || on_nodes=" on each of $num_nodes nodes"
echo "phase _$phase, $NUM_GPUS of $gpus_found GPUs$on_nodes, $precision:"
printf '%q ' "${command[@]}"
echo

# --- the run ----------------------------------------------------------------------------------------

readonly PREEMPTED=85   # the trainer's status when it was asked to stop, and has saved a checkpoint
readonly NOT_YET=138    # and when that was so early that it did not listen yet, in the first moments of its start
requeue=0
interrupted=0
asked_to_stop=0
trainer_pid=
# shellcheck disable=SC2329 # The traps below invoke it.
hand_on() {
    interrupted=1
    asked_to_stop=1
    [[ -z $trainer_pid ]] || kill "-$1" "$trainer_pid" 2>/dev/null || true
}

set -m # In the background without it, the trainer would ignore an interrupt.
trap 'requeue=1; hand_on USR1' USR1
trap 'hand_on USR1' TERM # Slurm itself requeues a job that it preempts; one that was cancelled stays so.
trap 'hand_on INT' INT
trap 'hand_on HUP' HUP

# Runs a command that gets the signals of this script, and leaves its exit status in $status.
watch_over() {
    "$@" &
    trainer_pid=$!
    status=0
    wait "$trainer_pid" || status=$?
    while ((interrupted)); do # It was the signal that ended the wait.
        interrupted=0
        status=0
        wait "$trainer_pid" || status=$?
    done
}

status=0
if ((INSPECT)) && [[ ${SLURM_RESTART_COUNT:-0} == 0 ]]; then # A job that was requeued has been looked at.
    watch_over "$PYTHON" -m llava.inspect --fast "${trainer[@]}"
    if ((status == 1)); then
        echo "error: the run would be ruined, see the findings above; INSPECT=0 trains all the same" >&2
    elif ((status == 0 && asked_to_stop)); then
        status=$NOT_YET # The signal came as it ended.
    fi
fi
if ((status == 0)); then
    watch_over "${command[@]}"
fi

# A model with this beside it is finished: a signal in those moments is no reason to start again.
if ((status == NOT_YET)) && [[ -f $OUTPUT_DIR/run_identity.json ]]; then
    requeue=0
fi
if ((requeue && (status == PREEMPTED || status == NOT_YET))) && [[ -n ${SLURM_JOB_ID:-} ]]; then
    if command -v scontrol >/dev/null; then
        # One task of an array has the number of all of it.
        job=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
        echo "note: requeueing job ${job:-$SLURM_JOB_ID}, which goes on from its last checkpoint" >&2
        scontrol requeue "${job:-$SLURM_JOB_ID}"
    fi
fi
exit "$status"
