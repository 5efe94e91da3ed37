#!/usr/bin/env bash
# Builds walrelay and shows it at work on this machine: primary -> relay -> relay -> standby, with load.
#
#   deploy/demo.sh                    a live table until Ctrl-C; away from a terminal as with --once
#   deploy/demo.sh --once             ten seconds of load, then everything is compared; exit status 0 if all is equal
#   deploy/demo.sh --help             the other options
#
# Needs a Rust toolchain and a PostgreSQL server; as root on Debian the latter is installed when it is missing. Starts
# only throwaway servers on free ports of 127.0.0.1, and leaves nothing running and nothing behind but the build.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "demo.sh: $*" >&2
  exit 1
}

has_server() {
  local folder
  for folder in "$(pg_config --bindir 2>/dev/null || true)" /usr/lib/postgresql/*/bin ${PATH//:/ }; do
    [ -x "$folder/initdb" ] && [ -x "$folder/postgres" ] && [ -x "$folder/pgbench" ] && return 0
  done
  return 1
}

# Packages of Debian: the server with its tools, and what the build of the cryptography library wants.
install_missing() {
  local packages=()
  # Whoever names a folder with --pg-bin has a server.
  case " $* " in *" --pg-bin"*) ;; *) has_server || packages+=(postgresql) ;; esac
  command -v cc >/dev/null || packages+=(gcc libc6-dev)
  [ ${#packages[@]} -gt 0 ] || return 0
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null ||
    fail "needs ${packages[*]}: install with 'sudo apt-get install ${packages[*]}', or run this as root on Debian"
  echo "installing ${packages[*]}"
  # The package would otherwise start a server of its own, which nobody asked for.
  local only_now=/etc/postgresql-common/createcluster.d/walrelay-demo.conf
  mkdir -p "${only_now%/*}"
  echo 'create_main_cluster = false' >"$only_now"
  trap "rm -f $only_now" EXIT
  local log
  log=$(mktemp)
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    -o Dpkg::Options::=--force-confold "${packages[@]}"; } >"$log" 2>&1 ||
    { tail -5 "$log" >&2; fail "apt-get could not install ${packages[*]} (all of it in $log)"; }
  rm -f "$log" "$only_now"
  trap - EXIT
}

check_rust() {
  [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ] && PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
  command -v cargo >/dev/null && command -v rustc >/dev/null ||
    fail "needs a Rust toolchain (cargo, rustc) of version $(rust_wanted) or newer, and finds none; see https://www.rust-lang.org/tools/install"
  local found
  found=$(rustc --version | awk '{print $2}')
  [ "$(printf '%s\n' "$(rust_wanted)" "$found" | sort -V | head -1)" = "$(rust_wanted)" ] ||
    fail "needs Rust $(rust_wanted) or newer, and finds $found"
}

rust_wanted() { sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml; }

check_rust
install_missing "$@"
if [ $# = 0 ] && ! [ -t 1 ]; then set -- --once; fi
cargo build --locked --release --quiet --bin walrelay || fail "the build failed"
exec "${CARGO_TARGET_DIR:-target}/release/walrelay" demo "$@"
