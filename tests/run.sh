#!/usr/bin/env bash
# Installs what the tests need, builds, and runs every test. Ends with the test runner's own summary.
#
#   tests/run.sh [arguments for the runner, for instance a name]
#
#   WALRELAY_PG="13 14 15 16 17 18"   PostgreSQL majors (default "15 17 18")
#   WALRELAY_POWERCUTS=1000           power cuts in the durability test (default 25); WALRELAY_KILLS likewise,
#                                     WALRELAY_PRIMARY_KILLS of primaries while clients commit (default 20)
#   CI=true                           a missing server or tool fails instead of skipping
set -euo pipefail
cd "$(dirname "$0")/.."

tests/install.sh
cargo build --locked --all-targets
cargo test --locked --doc --quiet
if cargo nextest --version >/dev/null 2>&1; then
  # Those with real servers wait most of the time, for clocks of seconds.
  exec cargo nextest run --locked --no-fail-fast --test-threads "$(($(nproc) * 2))" "$@"
fi
exec cargo test --locked --lib --bins --tests --no-fail-fast "$@"
