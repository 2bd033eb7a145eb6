#!/bin/sh
# Install the program as a systemd service, or remove it: what `make install`, `uninstall` and `purge` run.
#
#   install.sh install REQUIREMENTS WHEEL    REQUIREMENTS with hashes; both into a virtual environment of their own
#   install.sh uninstall                     keeps configuration and state
#   install.sh purge                         keeps nothing
#
# With DESTDIR everything goes below that folder, made for a machine on which it will be /.
set -eu

DESTDIR=${DESTDIR:-}
program=/opt/catfeeder-cron
venv=$program/venv
config=/etc/catfeeder-cron
link=/usr/local/bin/catfeeder-cron
unit=/etc/systemd/system/catfeeder-cron.service
state=/var/lib/catfeeder-cron
here=$(dirname "$0")

fail() {
  echo "catfeeder-cron: $*" >&2
  exit 1
}

# Whether this is a machine that runs systemd, and not a folder that will be one.
manages() { [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; }

# The service runs as a user of its own that sees no home directory, so neither may its Python live in one.
find_python() {
  for python in ${PYTHON:-} /usr/bin/python3 /usr/local/bin/python3 /usr/bin/python3.1? /usr/local/bin/python3.1?; do
    "$python" - 2>/dev/null <<'CHECK' && { echo "$python"; return; }
import ensurepip, sys, venv
from pathlib import Path
hidden = [Path(folder) for folder in ("/home", "/root", "/run/user")]
home = Path(sys.executable).resolve()
sys.exit(sys.version_info < (3, 11) or any(folder in home.parents for folder in hidden))
CHECK
  done
  fail "no Python 3.11 or newer with its venv module outside of home directories." \
    "On Debian and Ubuntu: apt install python3-venv. Or name one: make install PYTHON=/path/to/python3"
}

# Scripts and messages of a virtual environment hold its path, which has to be the one without DESTDIR.
settle() {
  python=$1
  if [ -n "$DESTDIR" ]; then
    grep -rlIF "$DESTDIR$venv" "$DESTDIR$venv/bin" "$DESTDIR$venv/pyvenv.cfg" | xargs -r sed -i "s|$DESTDIR$venv|$venv|g"
  fi
  # The service can't write bytecode, and without it every start takes twice as long.
  "$python" -m compileall -q -s "$DESTDIR/" -p / "$DESTDIR$venv/lib" >/dev/null || :
}

install_program() {
  target=$DESTDIR$venv
  # One that works is upgraded as it is: an operator may have put the packages of custom jobs into it.
  if ! "$target/bin/python" -c "import pip" 2>/dev/null; then
    "$(find_python)" -m venv --clear "$target"
  fi
  "$target/bin/python" -m pip install --quiet --no-compile --require-hashes -r "$1"
  "$target/bin/python" -m pip install --quiet --no-compile --no-deps --no-index --force-reinstall "$2"
  settle "$target/bin/python"
}

install_configuration() {
  [ ! -e "$DESTDIR$config/config.toml" ] || return 0
  sed "s|^url = \"embedded:.*|url_file = \"$config/database-url\"|" "$here/../config.toml" > "$DESTDIR$config/config.toml"
}

install_all() {
  umask 022  # whatever root's is: the service's user has to read all of it
  # Without a user to install for, pip would warn of running as root, and warn in vain.
  export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
  mkdir -p "$DESTDIR$program" "$DESTDIR$config" "$DESTDIR$(dirname "$link")" "$DESTDIR$(dirname "$unit")"
  install_program "$@"
  install_configuration
  install -m 644 "$here/catfeeder-cron.service" "$DESTDIR$unit"
  ln -sfn "$venv/bin/catfeeder-cron" "$DESTDIR$link"
  if manages; then
    systemctl daemon-reload
    systemctl try-restart catfeeder-cron
  fi
  echo "Installed: $venv, $link, $unit."
  if [ ! -e "$DESTDIR$config/database-url" ]; then
    echo "Next: put the database's URL into $config/database-url (mode 0600, root), look at $config/config.toml,"
    echo "then: catfeeder-cron init-db && systemctl enable --now catfeeder-cron"
  fi
}

uninstall() {
  if manages && [ -e "$unit" ]; then
    systemctl disable --quiet --now catfeeder-cron
  fi
  rm -f "$DESTDIR$unit"
  rm -rf "$DESTDIR$program"
  [ ! -L "$DESTDIR$link" ] || rm -f "$DESTDIR$link"
  if manages; then
    systemctl daemon-reload
    systemctl reset-failed catfeeder-cron 2>/dev/null || :
  fi
}

case "${1:-}" in
  install)
    install_all "$2" "$3" ;;
  uninstall)
    uninstall
    echo "Removed. Kept: the configuration in $config, the state in $state, the schema catfeeder_cron in the database." \
      "\`make purge\` removes the first two." ;;
  purge)
    uninstall
    # The state of a DynamicUser lies in private/, and where one expects it is a link to it.
    rm -rf "$DESTDIR$config" "$DESTDIR$state" "$DESTDIR/var/lib/private/catfeeder-cron" \
      "$DESTDIR$unit.d"
    echo "Removed, configuration and state too. The schema catfeeder_cron in the database is left:" \
      "DROP SCHEMA catfeeder_cron CASCADE" ;;
  *)
    sed -n '2,8p' "$0"
    exit 64 ;;
esac
