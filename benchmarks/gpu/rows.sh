# Sourced by the scripts beside it: the rows of a table, seed by seed. A finished run is kept, an interrupted one goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
SEEDS=${SEEDS:-0 1 2}
GPUS=${GPUS:-1}
RUNS=${RUNS:-runs}
AUTO="sharpness.reuse=Decayed('auto',horizon=None)"
NONE="sharpness.reuse=Nothing()"

# row TABLE NAME CONFIG [setting...]
row() {
  local out="$RUNS/$1/$2-$seed" config=$3
  shift 3
  if [ -e "$out/result.json" ]; then return; fi
  local program=(python)
  if [ "$GPUS" -gt 1 ]; then program=(torchrun --nproc-per-node "$GPUS"); fi
  if [ -e "$out/last.pt" ]; then set -- "$@" --resume; fi
  "${program[@]}" tools/train.py "$config" "$@" ${EXTRA:-} --seed "$seed" --out "$out"
}

# rivals TABLE AT PASSES SHARE CONFIG [setting...]: ascents without reuse, evenly spaced, random and late
rivals() {
  local table=$1 at=$2 passes=$3 share=$4 config=$5
  shift 5
  row "$table" "periodic-$at" "$config" "$@" "sharpness.sampling=Budget($passes)" "$NONE"
  row "$table" "bernoulli-$at" "$config" "$@" "sharpness.sampling=Bernoulli($share)" "$NONE"
  row "$table" "late-$at" "$config" "$@" "sharpness.sampling=Tail($share)" "$NONE"
}

# table TABLE BASE CONFIGS [setting...]: BASE names the base optimizer; CONFIGS, followed by it, by sam and by arsam, its configs
table() {
  local name=$1 base=$2 configs=$3
  shift 3
  for seed in $SEEDS; do
    for optimizer in "$base" sam arsam; do row "$name" "$optimizer" "$configs$optimizer.py" "$@"; done
    local spent budget
    for budget in 1.05 1.1 1.2 1.4; do
      row "$name" "budget-$budget" "${configs}arsam.py" "$@" "sharpness.sampling=Budget($budget)" "$AUTO"
    done
    rivals "$name" 1.2 1.2 0.2 "${configs}arsam.py" "$@"
    spent=$(python -c "import json; r = json.load(open('$RUNS/$name/arsam-$seed/result.json')); print(r['passes_per_step'], r['ascents'] / r['steps'])")
    rivals "$name" arsam $spent "${configs}arsam.py" "$@"
    row "$name" looksam "${configs}arsam.py" "$@" "sharpness.sampling=Periodic(5)" "sharpness.reuse=Orthogonal(0.7)"
  done
  PYTHONPATH=. python benchmarks/gpu/summary.py "$RUNS/$name"
}
