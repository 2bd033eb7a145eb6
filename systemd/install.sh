#!/bin/sh
# Install the program as a systemd service, or remove it: what `make install`, `uninstall` and `purge` run.
#
#   install.sh install REQUIREMENTS WHEEL    REQUIREMENTS with hashes; both into a virtual environment of their own
#   install.sh uninstall                     keeps configuration and state
#   install.sh purge                         keeps nothing
#
# With DESTDIR everything goes below that folder, made for a machine on which it will be /. PYTHON names the interpreter.
set -eu

DESTDIR=${DESTDIR:-} PYTHON=${PYTHON:-}
program=/opt/catfeeder-cron
venv=$program/venv
config=/etc/catfeeder-cron
link=/usr/local/bin/catfeeder-cron
unit=/etc/systemd/system/catfeeder-cron.service
state=/var/lib/catfeeder-cron
manual=/usr/local/share/man/man1/catfeeder-cron.1
bash_completion=/usr/local/share/bash-completion/completions/catfeeder-cron
zsh_completion=/usr/local/share/zsh/site-functions/_catfeeder-cron
fish_completion=/usr/local/share/fish/vendor_completions.d/catfeeder-cron.fish
here=$(dirname "$0")

fail() {
  echo "catfeeder-cron: $*" >&2
  exit 1
}

# What is installed holds this path until it is taken out again: absolute, without links, with no slash at its end.
normalise_destdir() {
  [ -n "$DESTDIR" ] || return 0
  [ "$1" != install ] || mkdir -p "$DESTDIR"
  [ -d "$DESTDIR" ] || fail "DESTDIR is no folder: $DESTDIR"
  DESTDIR=$(cd "$DESTDIR" && pwd -P)
  DESTDIR=${DESTDIR%/}
}

# Whether this is a machine that runs systemd, and not a folder that will be one.
manages() { [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; }

# The service runs as a user of its own that sees no home directory, so neither may its Python live in one.
is_usable() {
  "$1" - 2>/dev/null <<'CHECK'
import ensurepip, sys, venv
from pathlib import Path
hidden = [Path(folder) for folder in ("/home", "/root", "/run/user")]
home = Path(sys.executable).resolve()
sys.exit(sys.version_info < (3, 11) or any(folder in home.parents for folder in hidden))
CHECK
}

find_python() {
  if [ -n "$PYTHON" ]; then
    is_usable "$PYTHON" || fail "PYTHON names $PYTHON, which won't do:" \
      "it has to be Python 3.11 or newer, with its venv module, outside of home directories"
    echo "$PYTHON"
    return
  fi
  for python in /usr/bin/python3 /usr/local/bin/python3 /usr/bin/python3.1? /usr/local/bin/python3.1?; do
    if is_usable "$python"; then
      echo "$python"
      return
    fi
  done
  fail "no Python 3.11 or newer with its venv module outside of home directories." \
    "On Debian and Ubuntu: apt install python3-venv. Or name one: make install PYTHON=/path/to/python3"
}

# One installation of one version, wherever the link to it lies.
identity() { "$1" -c 'import sys; print(sys.base_prefix, sys.version)'; }

# Scripts and messages of a virtual environment hold its path, which has to be the one without DESTDIR. Where the path is
# long or has a blank in it, pip lets sh start a script's interpreter.
settle() {
  python=$1
  [ -z "$DESTDIR" ] || "$python" - "$DESTDIR$venv" "$venv" <<'SETTLE'
import re, sys
from pathlib import Path
there, here = (path.encode() for path in sys.argv[1:])
by_sh = re.compile(rb"\A#!/bin/sh\n'''exec' \"?([^\"\n]+?)\"? \"\$0\" \"\$@\"\n' '''\n")
for file in (Path(sys.argv[1], "pyvenv.cfg"), *Path(sys.argv[1], "bin").iterdir()):
    if file.is_file() and not file.is_symlink() and there in (text := file.read_bytes()) and b"\0" not in text:
        file.write_bytes(by_sh.sub(rb"#!\1\n", text.replace(there, here)))
SETTLE
  # The service can't write bytecode, and without it every start takes twice as long.
  "$python" -m compileall -q -s "$DESTDIR/" -p / "$DESTDIR$venv/lib" >/dev/null || :
}

install_program() {
  target=$DESTDIR$venv
  # One that works is upgraded as it is: an operator may have put the packages of custom jobs into it.
  if ! "$target/bin/python" -c "import pip" 2>/dev/null; then
    python=$(find_python)
    "$python" -m venv --clear "$target"
  elif [ -n "$PYTHON" ]; then
    find_python >/dev/null
    [ "$(identity "$target/bin/python")" = "$(identity "$PYTHON")" ] ||
      fail "$target runs on another Python than $PYTHON, which PYTHON names. To have it made anew, without what you have" \
        "installed in it for jobs of your own: rm -r $target"
  fi
  "$target/bin/python" -m pip install --quiet --no-compile --only-binary :all: --require-hashes -r "$1"
  "$target/bin/python" -m pip install --quiet --no-compile --no-deps --no-index --force-reinstall "$2"
  settle "$target/bin/python"
}

# The program itself knows what is in these. (-P: the one that is installed, not the one in this folder.)
install_documentation() {
  python=$DESTDIR$venv/bin/python
  for file in "$manual" "$bash_completion" "$zsh_completion" "$fish_completion"; do
    mkdir -p "$DESTDIR$(dirname "$file")"
  done
  "$python" -P -m catfeeder_cron.console.manual > "$DESTDIR$manual"
  _CATFEEDER_CRON_COMPLETE=source_bash "$python" -P -m catfeeder_cron > "$DESTDIR$bash_completion"
  _CATFEEDER_CRON_COMPLETE=source_fish "$python" -P -m catfeeder_cron > "$DESTDIR$fish_completion"
  # zsh looks at the first line, and runs the file as the function when it first completes the command.
  _CATFEEDER_CRON_COMPLETE=source_zsh "$python" -P -m catfeeder_cron > "$DESTDIR$zsh_completion"
  sed -i '/./,$!d' "$DESTDIR$zsh_completion"
  echo '_catfeeder_cron_completion "$@"' >> "$DESTDIR$zsh_completion"
}

remove_documentation() {
  for file in "$manual" "$bash_completion" "$zsh_completion" "$fish_completion"; do
    rm -f "$DESTDIR$file"
    rmdir "$DESTDIR$(dirname "$file")" 2>/dev/null || :  # where nobody else has put anything
  done
  for shell in bash-completion zsh fish; do
    rmdir "$DESTDIR/usr/local/share/$shell" 2>/dev/null || :
  done
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
  install_documentation
  install_configuration
  install -m 644 "$here/catfeeder-cron.service" "$DESTDIR$unit"
  ln -sfn "$venv/bin/catfeeder-cron" "$DESTDIR$link"
  if manages; then
    systemctl daemon-reload
    systemctl try-restart catfeeder-cron
  fi
  echo "Installed: $venv, $link, $unit, the manual page and completions for bash, zsh and fish."
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
  remove_documentation
  [ ! -L "$DESTDIR$link" ] || rm -f "$DESTDIR$link"
  if manages; then
    systemctl daemon-reload
    systemctl reset-failed catfeeder-cron 2>/dev/null || :
  fi
}

normalise_destdir "${1:-}"
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
