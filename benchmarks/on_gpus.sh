#!/usr/bin/env bash
# What benchmarks/results holds of a machine's GPUs, a stage at a time:
#
#     bash benchmarks/on_gpus.sh smoke|encoder|rest|autotune|sanitize FOLDER
#
#   smoke    every suite once with vit_t, one GPU, about 5 minutes: read it before a longer stage
#   encoder  encoders of vit_b, vit_l and vit_h and the PyTorch peers, about 9 minutes on 2 GPUs
#   rest     kernels, ceilings, end-to-end, scaling, ViT-H's peers, about 9 minutes on 2 GPUs
#   autotune torch.compile with max-autotune, which compiles for 5 minutes on 16 cores
#   sanitize memcheck and racecheck of every kernel, to FOLDER/sanitizer.log
#
# Records are appended to FOLDER/gpuN.jsonl as they come, what is printed to FOLDER/gpuN.log. After
# LIMIT seconds (without it 520) nothing starts; SPARSESAM_COMMIT names the tree where git cannot.
set -u
stage=${1:-} out=${2:-}
if [[ ! $stage =~ ^(smoke|encoder|rest|autotune|sanitize)$ || -z $out ]]; then
    echo "usage: bash benchmarks/on_gpus.sh smoke|encoder|rest|autotune|sanitize FOLDER" >&2
    exit 2
fi
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 CUDA_DEVICE_ORDER=PCI_BUS_ID
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/inductor}
gpus=$(nvidia-smi -L | wc -l)
((gpus > 0)) || { echo "error: no GPU here" >&2; exit 2; }
share=$(($(nproc) / gpus))
end=$((SECONDS + ${LIMIT:-520}))

bench() { # bench GPU SECONDS SUITE OPTIONS...; a GPU that is not there is one that is
    local gpu=$(($1 % gpus)) limit=$2 left
    shift 2
    (
        flock 9 # two suites never time on one GPU
        left=$((end - SECONDS))
        ((limit > left)) && limit=$left
        ((limit < 20)) && { echo "no time left for: $*" | tee -a "$out/gpu$gpu.log"; exit; }
        echo "== $(date +%T) GPU $gpu, $limit s: $*" | tee -a "$out/gpu$gpu.log"
        CUDA_VISIBLE_DEVICES=$gpu timeout -s INT -k 15 $((limit + 50)) \
            taskset -c $((gpu * share))-$((gpu * share + share - 1)) \
            python3 -m benchmarks "$@" --limit "$limit" --append --out "$out/gpu$gpu.jsonl" \
            >>"$out/gpu$gpu.log" 2>&1
    ) 9>"$out/.gpu$gpu.lock"
}
run() { for name in "$@"; do printf -- ' --implementation %s' "$name"; done; }
batches="--batch 8 --batch 1"
all="--density 1 --density 0.5 --density 0.4 --density 0.3 --density 0.25"
two="--density 1 --density 0.3"

case $stage in
sanitize)
    export XLA_FLAGS=--xla_gpu_autotune_level=0 # trials would be checked too
    for tool in memcheck racecheck; do
        echo "## $tool"
        timeout "${LIMIT:-520}" compute-sanitizer --tool "$tool" python3 -m benchmarks.suites.sanitize
    done 2>&1 | tee "$out/sanitizer.log"
    exit
    ;;
smoke)
    bench 0 110 encoder --model vit_t --batch 1 $two --decomposition 0.3 --runs 5 --width 8 \
        $(run mosaic_gpu xla eager compile flex transformers)
    bench 0 70 kernels --model vit_t --batch 1 --density 0.3 --runs 5 --width 12
    bench 0 40 ceilings --model vit_t --batch 1 --runs 5
    bench 0 80 end-to-end --model vit_t $two --runs 5 --width 8
    bench 0 60 scaling --model vit_t --axis density --runs 5 --width 14
    ;;
encoder)
    {
        bench 0 300 encoder --model vit_l $batches $all --decomposition 0.3 --width 12 $(run mosaic_gpu)
        bench 0 200 encoder --model vit_l $batches $two --width 8 $(run xla)
    } &
    {
        bench 1 300 encoder --model vit_h $batches $all --decomposition 0.3 --width 12 $(run mosaic_gpu)
    } &
    {
        bench 2 200 encoder --model vit_b $batches $all --decomposition 0.3 --width 12 $(run mosaic_gpu)
        bench 2 160 encoder --model vit_b $batches $two --width 12 $(run compile flex eager xla)
    } &
    {
        bench 3 300 encoder --model vit_l $batches $two --width 12 \
            $(run compile flex sdpa eager transformers)
    } &
    ;;
rest)
    {
        bench 0 240 kernels --model vit_l $batches $two --width 12
        bench 0 60 ceilings --width 6
    } &
    {
        bench 1 240 encoder --model vit_h $batches $two --width 8 $(run compile flex eager)
        bench 1 120 encoder --model vit_h $batches --density 1 --width 8 $(run xla)
    } &
    bench 2 300 scaling --model vit_l --axis batch --axis density --width 12 &
    {
        bench 3 150 end-to-end --model vit_l --width 8
        bench 3 200 scaling --model vit_l --axis image_size --width 8
        bench 3 120 kernels --model vit_h --batch 8 $two --width 12 $(run mosaic_gpu xla)
    } &
    ;;
autotune)
    bench 0 500 encoder --model vit_l --batch 8 --density 1 --width 4 $(run compile-max-autotune)
    ;;
esac
wait
rm -f "$out"/.gpu*.lock
wc -l "$out"/*.jsonl
