#!/usr/bin/env bash
# All tests, in two halves at the same time: those that talk to servers, which use little more than one core, and the
# others. What the second half has to say is printed when both have ended.
#
#   scripts/run_tests.sh PYTHON [PYTEST ARGUMENTS]
set -uo pipefail

python=$1
shift
no_tests=5 # pytest's exit status if a filter leaves none

log=$(mktemp)
trap 'rm -f "$log"' EXIT
nice -n 5 "$python" -m pytest tests/unit tests/deploy tests/kernels tests/plugin tests/triton \
  -o cache_dir=.pytest_cache/others "$@" >"$log" 2>&1 &
others=$!
trap 'kill -INT "$others" 2>/dev/null' INT TERM

"$python" -m pytest tests/e2e "$@"
served=$?
echo "Waiting for the tests without servers ..."
wait "$others"
rest=$?
cat "$log"

echo "tests with servers: exit status $served; others: $rest"
if ((served == no_tests)); then
  exit "$rest"
fi
((rest == no_tests)) && rest=0
exit $((served > rest ? served : rest))
