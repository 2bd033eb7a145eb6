"""Do what the README promises on fresh Debian machines: `make run` and `make test`, as root in /root and as a user.

A machine is a folder that debootstrap filled with git, make and python3 (and python3-venv, which Debian keeps apart),
and a change of root into it, in namespaces of its own: whatever ends this program ends its processes and mounts. The
mirror is that of this machine's apt, and pip finds its packages as on this machine.

    FRESH=PATH       where unpacked machines are kept for the next time
    RELEASES=...     Debian's releases; the default is all that have the Python that the program needs
    USERS=...        root, kim, or both
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
RELEASES = ("bookworm", "trixie", "sid")  # Python 3.11, 3.13, and the newest that Debian has
USERS = {"root": "/root", "kim": "/home/kim"}
PACKAGES = ("git", "make", "python3", "python3-venv")
KEYRING = "usr/share/keyrings/debian-archive-keyring.gpg"
HANDED_ON = ("http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")

# What runs in the namespaces, before and after the change of root.
PREPARE = """
    mount --make-rprivate /
    mount -t proc proc "$ROOT/proc"
    mount -t tmpfs tmpfs "$ROOT/dev"
    for device in null zero full random urandom tty; do
        touch "$ROOT/dev/$device"; mount --bind "/dev/$device" "$ROOT/dev/$device"
    done
    mkdir "$ROOT/dev/pts" "$ROOT/dev/shm"
    mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts "$ROOT/dev/pts"
    ln -s pts/ptmx "$ROOT/dev/ptmx"; ln -s /proc/self/fd "$ROOT/dev/fd"
    mount -t tmpfs -o mode=1777 tmpfs "$ROOT/dev/shm"
    while IFS= read -r path; do
        if [ -d "$path" ]; then mkdir -p "$ROOT$path"; else mkdir -p "$ROOT${path%/*}"; touch "$ROOT$path"; fi
        mount --bind -o ro "$path" "$ROOT$path"
    done < "$ROOT/handed-on"
    chroot "$ROOT" sh -eu -c "$NEWCOMER"
"""
NEWCOMER = """
    id "$WHO" >/dev/null 2>&1 || useradd --create-home --shell /bin/bash "$WHO"
    chmod 700 /root
    cd "$HOME"
    exec setpriv --reuid "$WHO" --regid "$WHO" --init-groups sh -eu -c '
        git clone --quiet /cats.bundle cats
        cd cats
        exec python3 /newcomer.py'
"""


class Unable(Exception):
    """This machine can't make others."""


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def require_what_it_takes() -> None:
    if os.geteuid() != 0:
        raise Unable("fresh machines are unpacked and entered by root alone: sudo make test-fresh")
    if shutil.which("debootstrap") is None:
        raise Unable("there is no debootstrap here: apt install debootstrap")
    if shutil.which("apt-get") is None:
        raise Unable("there is no apt here, whose mirror of Debian would be used")


def mirror() -> str:
    form = "$(ORIGIN) $(LABEL) $(COMPONENT) $(REPO_URI)"
    for line in said("apt-get", "indextargets", "--format", form, "Created-By: Packages").splitlines():
        if line.startswith("Debian Debian main "):
            return line.split()[-1]
    raise Unable("this machine's apt knows no mirror of Debian (try apt-get update)")


def apts_proxies() -> dict[str, str]:
    """Return apt's own proxies as the variables that debootstrap goes by."""
    known = said("apt-config", "shell", "http_proxy", "Acquire::http::Proxy", "https_proxy", "Acquire::https::Proxy")
    return dict(word.split("=", 1) for word in shlex.split(known))


def unpacked(release: str, kept: Path) -> Path:
    """Return the folder of an untouched machine."""
    folder = kept / release
    if folder.exists():
        return folder
    new = kept / f"{release}.new"
    shutil.rmtree(new, ignore_errors=True)
    # A later release is signed with keys that only the keyrings of later machines may have.
    keyrings = [*(kept / earlier / KEYRING for earlier in reversed(RELEASES)), Path("/", KEYRING)]
    for checks in [*(("--keyring", str(each)) for each in keyrings if each.exists()), ("--no-check-gpg",)]:
        print(f"unpacking {release} ({' '.join(checks[:1])})", flush=True)
        command = ["debootstrap", *checks, "--variant=minbase", f"--include={','.join(PACKAGES)}", release, str(new)]
        done = subprocess.run(
            [*command, mirror()], env={**os.environ, **apts_proxies()}, capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            new.rename(folder)
            return folder
        shutil.rmtree(new, ignore_errors=True)
        if "key" not in done.stdout + done.stderr:
            break
    raise Unable(f"debootstrap failed for {release}:\n{(done.stdout + done.stderr)[-2000:]}")


@contextmanager
def copy_of(pristine: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fresh-", dir=pristine.parent) as scratch:
        root = Path(scratch, "root")
        subprocess.run(["cp", "-a", "--reflink=auto", str(pristine), str(root)], check=True)
        yield root


def pips_settings() -> tuple[dict[str, str], set[str]]:
    """Return how pip is set up on this machine, and the files and folders of this machine that it is told of."""
    settings = dict(line.split("=", 1) for line in said(sys.executable, "-m", "pip", "config", "list").splitlines())
    wanted = {name.partition(".")[2]: value.strip("'") for name, value in settings.items()}
    words = [*(word for value in wanted.values() for word in value.replace("\\n", " ").split()), *handed_on().values()]
    paths = {word.removeprefix("file://") for word in words if word.startswith(("/", "file:///"))}
    existing = {path for path in paths if Path(path).exists()}
    # A local index is a folder whose pages name files beside it.
    parents = {str(Path(path).parent) for path in existing if Path(path).is_dir() and Path(path).name == "simple"}
    return wanted, existing | parents


def handed_on() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in HANDED_ON or name.startswith("PIP_")}


def hand_on(root: Path) -> None:
    """Let the machine reach what this one reaches: names, and pip's packages."""
    settings, paths = pips_settings()
    lines = [f"{name} = {value}".replace("\\n", "\n    ") for name, value in settings.items()]
    (root / "etc/pip.conf").write_text("\n".join(["[global]", *lines, ""]), "utf-8")
    (root / "handed-on").write_text("".join(f"{path}\n" for path in sorted(paths)), "utf-8")
    for name in ("resolv.conf", "hosts"):
        shutil.copyfile(f"/etc/{name}", root / "etc" / name)


def visit(pristine: Path, who: str, logs: Path) -> dict[str, str]:
    """Clone the repository on a fresh machine, do what the README says there, and return what became of it."""
    with copy_of(pristine) as root:
        hand_on(root)
        shutil.copyfile(Path(__file__).with_name("newcomer.py"), root / "newcomer.py")
        bundle = ["git", "-C", str(REPOSITORY), "bundle", "create", "--quiet", str(root / "cats.bundle"), "HEAD"]
        subprocess.run(bundle, check=True)
        home = USERS[who]
        environment = {
            "ROOT": str(root),
            "NEWCOMER": NEWCOMER,
            "WHO": who,
            "USER": who,
            "HOME": home,
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            **handed_on(),
        }
        namespaces = ["unshare", "--mount", "--pid", "--ipc", "--fork", "--kill-child"]
        done = subprocess.run(
            [*namespaces, "sh", "-eu", "-c", PREPARE],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        for log in (root / home.lstrip("/") / "cats").glob("make-*.log"):
            shutil.copyfile(log, logs / f"{pristine.name}-{who}-{log.name}")
    try:
        outcome: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"python": "?", "start": f"FAILED: {done.stdout.strip()[-500:]}"}
    return outcome


def main() -> int:
    kept = Path(os.environ.get("FRESH") or Path(os.environ.get("TMPDIR", "/var/tmp"), "catfeeder-cron-fresh"))
    releases = os.environ.get("RELEASES", "").split() or RELEASES
    users = os.environ.get("USERS", "").split() or list(USERS)
    commit = said("git", "-C", str(REPOSITORY), "log", "-1", "--format=%h %s").strip()
    try:
        require_what_it_takes()
        kept.mkdir(mode=0o755, parents=True, exist_ok=True)
        machines = {release: unpacked(release, kept) for release in releases}
    except Unable as unable:
        print(unable, file=sys.stderr)
        return 2
    logs = kept / "logs"
    logs.mkdir(exist_ok=True)
    print(f"what is cloned: {commit} (what is not committed is left out); logs in {logs}", flush=True)
    failed = False
    for release, pristine in machines.items():
        for who in users:
            outcome = visit(pristine, who, logs)
            for command, told in outcome.items():
                if command != "python":
                    print(f"{release}, Python {outcome['python']}, {who}: {command} {told}", flush=True)
                    failed |= told.startswith("FAILED")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
