#!/usr/bin/env bash
# Collects the wheels that the GPU image (bench/gpu_image.txt) lacks, for `python -m bench.gpu --wheels FOLDER`.
#
#   bench/gpu_wheels.sh FOLDER [REQUIREMENT ...]
#
# Python 3.12 on Linux x86-64. It takes what the API, the worker, the clients and the benchmarks' peers need, and
# each REQUIREMENT (torchao, say), with all that these need in turn. A package of the image is used as it is
# where pyproject.toml asks for it: torch and what is built around it cannot be replaced there. Where another
# package asks for it, its version must suit. A version that the list does not tell is taken for a recent one;
# but if the requirement names the series that constraints.txt pins, a small wheel of the pin is carried.
#
# The checkout and the wheels together must stay below 64 MiB, the most that can be sent to such a machine.
# bitsandbytes is left out: with its 41 MiB they would not.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { echo "Usage: bench/gpu_wheels.sh FOLDER [REQUIREMENT ...]" >&2; exit 2; }
exec "${PYTHON:-python3}" - "$@" <<'PYTHON'
import email.parser
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name, parse_wheel_filename
    from packaging.version import Version
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename
    from pip._vendor.packaging.version import Version

LIMIT = 64 * 2**20
SMALL = 2**20
EXTRAS = ("api", "worker", "client")
PEERS = ("trl",)
LEFT_OUT = {"bitsandbytes"}
MARKERS = {
    "python_version": "3.12",
    "python_full_version": "3.12.3",
    "implementation_name": "cpython",
    "implementation_version": "3.12.3",
    "platform_python_implementation": "CPython",
    "os_name": "posix",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "platform_release": "",
    "platform_version": "",
}
# pip matches each number exactly, so every glibc up to the image's is named.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]


def versions(path):
    """Names and versions of a list's lines; None where a line has a name alone."""
    lines = (line.partition("#")[0].strip() for line in Path(path).read_text().splitlines())
    found = (line.partition("==") for line in lines if line)
    return {canonicalize_name(name): Version(version) if version else None for name, _, version in found}


def roots():
    """(requirement, who asks); nobody where any version of the image's will do."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    texts = [*project["dependencies"], *(text for extra in EXTRAS for text in extras[extra]), *PEERS]
    return [(Requirement(text), None) for text in texts]


def from_image(requirement, by):
    """Whether the image's own version will do."""
    name = canonicalize_name(requirement.name)
    if name not in IMAGE:
        return False
    if by is None:
        return True
    if IMAGE[name] is not None:
        return requirement.specifier.contains(IMAGE[name], prereleases=True)
    pinned = PINS.get(name)
    series = pinned.release[:2] if pinned else None
    return not any(
        part.operator in (">=", "==", "~=", ">") and Version(part.version.removesuffix(".*")).release[:2] == series
        for part in requirement.specifier
    )


def download(requirements):
    """One wheel for each; a pinned version where there is a pin."""
    wanted = []
    for name, requirement in requirements.items():
        pinned = PINS.get(name)
        wanted.append(f"{requirement.name}=={pinned}" if pinned else f"{requirement.name}{requirement.specifier}")
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    command += [word for abi in ("cp312", "abi3", "none") for word in ("--abi", abi)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    done = subprocess.run([*command, "-d", str(FOLDER), *wanted], capture_output=True, text=True)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if "is ignored" not in line]
        raise SystemExit("pip could not download {}:\n{}".format(" ".join(wanted), "\n".join(reasons[-12:])))


def wheels():
    """The folder's, by name: (version, path)."""
    found = {}
    for path in sorted(FOLDER.glob("*.whl")):
        name, version, *_ = parse_wheel_filename(path.name)
        if name in found:
            raise SystemExit(f"{FOLDER} holds {name} twice; empty the folder first.")
        found[name] = (version, path)
    return found


def requirements_of(path, extras):
    """What a wheel requires on the image, with these extras of its own."""
    with zipfile.ZipFile(path) as archive:
        (metadata,) = (n for n in archive.namelist() if n.count("/") == 1 and n.endswith(".dist-info/METADATA"))
        message = email.parser.Parser().parsestr(archive.read(metadata).decode())
    for text in message.get_all("Requires-Dist") or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate(MARKERS | {"extra": extra}) for extra in ("", *extras)):
            yield requirement


def collect(asked):
    """Downloads the closure of what is asked, one level after the other. Returns the names of its wheels."""
    needed, seen, waiting = set(), set(), asked
    while waiting:
        fresh, open_ = {}, []
        for requirement, by in waiting:
            name = canonicalize_name(requirement.name)
            if name in LEFT_OUT or (name not in needed and from_image(requirement, by)):
                continue
            if name not in wheels():
                fresh.setdefault(name, requirement)
            open_.append((name, requirement, by))
        if fresh:
            download(fresh)
        waiting, held = [], wheels()
        for name, requirement, by in open_:
            if name not in held:
                raise SystemExit(f"pip downloaded no wheel of {name}.")
            version, path = held[name]
            if name in IMAGE and name not in needed:
                if IMAGE[name] is None and path.stat().st_size > SMALL:
                    path.unlink()
                    print(f"{name}: the image's version is unknown and taken to suit {by}: {requirement}")
                    continue
                print(f"{name} {version} in front of the image's, because {by} asks for {requirement}")
            needed.add(name)
            if not requirement.specifier.contains(version, prereleases=True):
                raise SystemExit(f"{by or 'pyproject.toml'} asks for {requirement}, and the wheel is {version}.")
            if (name, frozenset(requirement.extras)) not in seen:
                seen.add((name, frozenset(requirement.extras)))
                waiting += [(further, name) for further in requirements_of(path, requirement.extras)]
    return needed


def tree_bytes():
    """Tracked files and untracked ones that git does not ignore; the wheels are counted apart."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True, check=True
    )
    paths = {Path(name.decode()) for name in listing.stdout.split(b"\0") if name}
    return sum(p.lstat().st_size for p in paths if p.is_file() and FOLDER not in p.resolve().parents)


FOLDER = Path(sys.argv[1]).resolve()
FOLDER.mkdir(parents=True, exist_ok=True)
IMAGE, PINS = versions("bench/gpu_image.txt"), versions("constraints.txt")
needed = collect(roots() + [(Requirement(text), "the command line") for text in sys.argv[2:]])
held = wheels()
if superfluous := sorted(set(held) - needed):
    raise SystemExit(f"{FOLDER} holds wheels that nothing asks for: {', '.join(superfluous)}. Empty it first.")
for name, (version, path) in held.items():
    print(f"{path.stat().st_size / 2**20:8.2f} MiB  {name} {version}")
of_wheels, of_tree = sum(path.stat().st_size for _, path in held.values()), tree_bytes()
total = f"{len(held)} wheels of {of_wheels / 2**20:.1f} MiB and a tree of {of_tree / 2**20:.1f} MiB"
if of_wheels + of_tree >= LIMIT:
    raise SystemExit(f"{total} are too much: together they must stay below {LIMIT / 2**20:.0f} MiB.")
print(f"{total}, {(of_wheels + of_tree) / 2**20:.1f} of {LIMIT / 2**20:.0f} MiB")
PYTHON
