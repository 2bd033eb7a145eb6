#!/bin/sh
# Make a release of what is checked out: version, changelog, sdist and wheel, commit, tag. `make release` calls it.
#
#   release.sh VERSION TOOLS    TOOLS is a virtual environment with hatchling
#
# Nothing is pushed or uploaded. Whatever fails before the commit leaves the checkout as it was.
set -eu
cd "$(dirname "$0")/.."
version=$1 tools=$2

fail() {
  echo "release: $*" >&2
  exit 1
}

case $version in
  "") fail "which version? make release VERSION=1.2.0" ;;
  *[!0-9.]* | .* | *. | *..*) fail "got VERSION=$version, expected numbers and dots such as 1.2.0" ;;
esac
[ -z "$(git status --porcelain)" ] || fail "there are uncommitted changes; commit or stash them first"
! git rev-parse --quiet --verify "refs/tags/v$version" >/dev/null || fail "there is a tag v$version already"
changes=$(awk '/^## \[/ { found = /^## \[Unreleased\]/; next } found && NF' CHANGELOG.md)
[ -n "$changes" ] || fail "CHANGELOG.md says nothing under [Unreleased]"

written=yes
undo() { [ -z "$written" ] || git checkout --quiet -- CHANGELOG.md catfeeder_cron/version.py; }
trap undo EXIT
trap 'exit 130' INT TERM

sed -i "s/^__version__ = .*/__version__ = \"$version\"/" catfeeder_cron/version.py
sed -i "s/^## \[Unreleased\]$/## [Unreleased]\n\n## [$version] - $(date -u +%Y-%m-%d)/" CHANGELOG.md
rm -rf dist
"$tools/bin/hatchling" build --directory dist >/dev/null
wheel=dist/catfeeder_cron-$version-py3-none-any.whl sdist=dist/catfeeder_cron-$version.tar.gz
[ -e "$wheel" ] && [ -e "$sdist" ] || fail "hatchling built something else: $(ls dist)"

# The wheel is installed as it is; what the sdist builds must be the same wheel, file by file.
rm -rf build/release
"$tools/bin/python" -m venv build/release
build/release/bin/python -m pip install --quiet --require-hashes -r requirements.runtime.lock
build/release/bin/python -m pip install --quiet --no-deps "$wheel"
said=$(build/release/bin/catfeeder-cron --version)
[ "$said" = "catfeeder-cron $version" ] || fail "the installed wheel says \"$said\""
mkdir build/release/source
tar -xzf "$sdist" -C build/release/source --strip-components 1
(cd build/release/source && "$OLDPWD/$tools/bin/hatchling" build --target wheel --directory ../again >/dev/null)
"$tools/bin/python" - "$wheel" "build/release/again/${wheel##*/}" <<'PYTHON' || fail "the sdist builds another wheel"
import sys, zipfile

first, second = ({each: wheel.read(each) for each in wheel.namelist()} for wheel in map(zipfile.ZipFile, sys.argv[1:]))
sys.exit(first != second)
PYTHON
rm -rf build/release

git commit --quiet --message "Release $version" CHANGELOG.md catfeeder_cron/version.py
written=
git tag --annotate "v$version" --message "catfeeder-cron $version"
echo "release: v$version is committed and tagged; $wheel and $sdist are built"
